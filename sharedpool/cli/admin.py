"""The orders to a running broker.

`sharedpool pause`, `resume`, `set`, `drain`, `kill` and `reconnect`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import click

from sharedpool.cli.client import broker_option, connected, fetch_report, find_brokers, from_each
from sharedpool.cli.options import SECONDS
from sharedpool.wire.admin import Done, Order, OrderKind
from sharedpool.wire.messages import PROTOCOL_VERSION
from sharedpool.wire.reports import Report
from sharedpool.wire.values import Token

_POLL_EVERY_S = 0.1
_REPORT_EVERY_S = 2.0

_pool_option = click.option("--pool", "name", default="", help="Only this pool.  [default: all]")
_wait_option = click.option("--wait", is_flag=True, help="Return when all leases have come back.")
_all_hosts_option = click.option(
    "--all-hosts", is_flag=True, help="On all hosts that share the limit, and not only on this one."
)
_timeout_option = click.option(
    "--timeout",
    type=SECONDS,
    help="With --wait: give up after this time, with exit status 1.  [default: never]",
)


class _Lease(click.ParamType[Token]):
    """The name of a lease, as `sharedpool who` and the log show it."""

    name = "lease"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Token:
        epoch, _, serial = str(value).partition("-")
        if not (epoch.isdecimal() and serial.isdecimal()):
            self.fail(
                f"{value!r} is not the name of a lease, such as 1764170000000-12"
                " (`sharedpool who` shows them)",
                param,
                ctx,
            )
        return Token(int(epoch), int(serial))


def _send(address: str | None, order: Order) -> list[str]:
    """Send an order to the brokers that `find_brokers` finds, and print their answers.

    Return the brokers' addresses.
    """
    found = find_brokers(address)

    def ask(address: str) -> Done:
        with connected(address) as client:
            return client.ask(order, Done)

    answers = from_each(found, ask)
    for done in answers:
        for text in done.said:
            click.echo(text)
    if not any(done.said for done in answers):
        raise click.ClickException("\n".join(dict.fromkeys(done.error for done in answers)))
    return found


@click.command()
@broker_option
@_pool_option
@_all_hosts_option
@_wait_option
@_timeout_option
def pause(
    address: str | None, name: str, all_hosts: bool, wait: bool, timeout: float | None
) -> None:
    """Grant nothing until `sharedpool resume`, and call every connection back.

    For a failover or a migration. Checkouts wait, as long as their callers' timeouts allow. Idle
    connections are closed at once, those in use at their checkin. With --wait the command returns
    when all are closed.

    A pause ends with the broker; with --all-hosts it ends when no host uses the limit any more.
    Without an address the order goes to every broker in the user's
    runtime directory. Exit status 1 when there is no such pool, or when --timeout has passed; 3
    when no broker answers.
    """
    order = Order(PROTOCOL_VERSION, OrderKind.PAUSE, name, all_hosts=all_hosts)
    found = _send(address, order)
    if wait:
        _wait(
            found,
            timeout,
            lambda report: _leases_left(report, name, all_hosts=all_hosts),
        )


def _leases_left(report: Report, name: str, *, all_hosts: bool) -> int:
    """Return how many leases a pause still has to wait for."""
    left = sum(pool.leases for pool in report.pools if name in ("", pool.name))
    if all_hosts:  # a paused host keeps no more of the limit than it has in use
        left += sum(not pool.paused for pool in report.pools if name in ("", pool.name))
        left += sum(x.share for x in report.hosts if x.host and name in ("", x.pool))
    return left


@click.command()
@broker_option
@_pool_option
@_all_hosts_option
def resume(address: str | None, name: str, all_hosts: bool) -> None:
    """Grant leases again after `sharedpool pause`."""
    _send(address, Order(PROTOCOL_VERSION, OrderKind.RESUME, name, all_hosts=all_hosts))


@click.group(name="set")
def set_() -> None:
    """Change a limit of a running broker, until the broker ends."""


@set_.command(name="max-conn")
@broker_option
@click.argument("max_conn", type=click.IntRange(min=1, max=2**31 - 1))
@click.option(
    "--pool", "name", default="", help="This pool's limit.  [default: the limit over all pools]"
)
@_all_hosts_option
def max_conn_(address: str | None, max_conn: int, name: str, all_hosts: bool) -> None:
    """Set a limit. With --all-hosts it is the one that all hosts share.

    A lower limit holds at once: idle connections beyond it are closed, those in use at their
    checkin.
    """
    order = Order(PROTOCOL_VERSION, OrderKind.LIMIT, name, max_conn, all_hosts=all_hosts)
    _send(address, order)


@click.command()
@broker_option
@click.argument("pid", type=click.IntRange(min=1, max=2**31 - 1))
@_wait_option
@_timeout_option
def drain(address: str | None, pid: int, wait: bool, timeout: float | None) -> None:
    """Have process PID give back all leases that it holds now.

    It closes its idle connections at once, those in use at their checkin, and may check out again
    afterwards. With --wait the command returns when the process holds none.
    """
    found = _send(address, Order(PROTOCOL_VERSION, OrderKind.DRAIN, number=pid))
    if wait:
        _wait(
            found,
            timeout,
            lambda report: sum(each.leases for each in report.sessions if each.pid == pid),
        )


@click.command()
@broker_option
@click.argument("lease", type=_Lease())
def kill(address: str | None, lease: Token) -> None:
    """End one lease's connection, even in the middle of a query. Its user gets an error.

    LEASE is the name that `sharedpool who` shows. The slot is free once the backend is confirmed
    gone.
    """
    _send(address, Order(PROTOCOL_VERSION, OrderKind.KILL, token=lease))


@click.command()
@broker_option
@_pool_option
def reconnect(address: str | None, name: str) -> None:
    """Have every worker replace the connections that are open now.

    For a new password, a new certificate, or a server that moved. Idle connections are closed at
    once, those in use at their checkin. No query is broken. Repeating the order does no harm.

    Without an address the order goes to every broker in the user's runtime directory. Exit status 1
    when there is no such pool, 3 when no broker answers.
    """
    _send(address, Order(PROTOCOL_VERSION, OrderKind.RECONNECT, name))


def _wait(found: Sequence[str], timeout_s: float | None, left: Callable[[Report], int]) -> None:
    """Wait until `left` is 0 for the reports of all these brokers. Print the count now and then."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    report_at = time.monotonic() + _REPORT_EVERY_S
    while count := sum(map(left, from_each(found, fetch_report))):
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            raise click.ClickException(
                f"{count} connections are still out: `sharedpool who` shows who holds them"
            )
        if now >= report_at:
            click.echo(f"waiting for {count} connections", err=True)
            report_at = now + _REPORT_EVERY_S
        time.sleep(_POLL_EVERY_S)
