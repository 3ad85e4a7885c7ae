"""What an operator orders: `sharedpool pause`, `resume`, `set`, `drain`, `kill`, `reconnect`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import click

from sharedpool.cli.client import broker_option, connected, fetch_report, find_brokers, from_each
from sharedpool.cli.options import SECONDS
from sharedpool.wire.admin import Done, Order, OrderKind
from sharedpool.wire.messages import PROTOCOL_VERSION, Token
from sharedpool.wire.reports import Report

_POLL_EVERY_S = 0.1
_SAY_EVERY_S = 2.0

_pool_option = click.option("--pool", "name", default="", help="Only this pool.  [default: all]")
_wait_option = click.option("--wait", is_flag=True, help="Return when everything has come back.")
_timeout_option = click.option(
    "--timeout",
    type=SECONDS,
    help="With --wait: give up after so many seconds, with exit status 1.  [default: never]",
)


class _Lease(click.ParamType[Token]):
    """A lease's name, as `sharedpool who --json` and the log show it."""

    name = "lease"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Token:
        epoch, _, serial = str(value).partition("-")
        if not (epoch.isdecimal() and serial.isdecimal()):
            self.fail(
                f"{value!r} is no lease (as `sharedpool who` shows them: 1764170000000-12)",
                param,
                ctx,
            )
        return Token(int(epoch), int(serial))


def _send(address: str | None, order: Order) -> list[str]:
    """Give an order to the broker, or to all there are; say what was done. Return who was asked."""
    found = find_brokers(address)

    def ask(address: str) -> Done:
        with connected(address) as line:
            return line.ask(order, Done)

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
@_wait_option
@_timeout_option
def pause(address: str | None, name: str, wait: bool, timeout: float | None) -> None:
    """Lend nothing until `sharedpool resume`, and have every connection brought back.

    For a failover or a migration: checkouts wait (as long as their callers would), what is in use goes on and comes
    back at its checkin. With --wait the command returns when the server has none of our connections any more.

    A pause ends with the broker. Without an address: at every broker in the user's runtime directory. Exit status 1
    when there is no such pool, or --timeout has passed; 3 when no broker answers.
    """
    found = _send(address, Order(PROTOCOL_VERSION, OrderKind.PAUSE, name))
    if wait:
        _wait(
            found,
            timeout,
            lambda report: sum(pool.leases for pool in report.pools if name in ("", pool.name)),
        )


@click.command()
@broker_option
@_pool_option
def resume(address: str | None, name: str) -> None:
    """Lend again after `sharedpool pause`."""
    _send(address, Order(PROTOCOL_VERSION, OrderKind.RESUME, name))


@click.group(name="set")
def set_() -> None:
    """Change what a running broker enforces, until it ends."""


@set_.command(name="max-conn")
@broker_option
@click.argument("max_conn", type=click.IntRange(min=1, max=2**31 - 1))
@click.option(
    "--pool", "name", default="", help="This pool's limit.  [default: the limit over all pools]"
)
def max_conn_(address: str | None, max_conn: int, name: str) -> None:
    """Set a limit. A lower one holds at once: what is beyond it is recalled, and comes back at its checkin."""
    _send(address, Order(PROTOCOL_VERSION, OrderKind.LIMIT, name, max_conn))


@click.command()
@broker_option
@click.argument("pid", type=click.IntRange(min=1, max=2**31 - 1))
@_wait_option
@_timeout_option
def drain(address: str | None, pid: int, wait: bool, timeout: float | None) -> None:
    """Have process PID give back what it holds now: idle connections at once, others at their checkin.

    It may check out again afterwards. With --wait the command returns when it holds none.
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
    """End one lease's connection, whatever it is doing; whoever uses it gets an error.

    LEASE is as `sharedpool who` shows it. Its slot is free once the server's process is seen to be gone.
    """
    _send(address, Order(PROTOCOL_VERSION, OrderKind.KILL, token=lease))


@click.command()
@broker_option
@_pool_option
def reconnect(address: str | None, name: str) -> None:
    """Have every worker replace its connections: what is open now is closed at its next checkout or checkin.

    For a new password, a new certificate, or a server that moved. Nothing in use is broken; a connection that lies idle
    is closed at once. Doing it again does no harm.

    Without an address: at every broker in the user's runtime directory. Exit status 1 when there is no such pool, 3
    when no broker answers.
    """
    _send(address, Order(PROTOCOL_VERSION, OrderKind.RECONNECT, name))


def _wait(found: Sequence[str], timeout_s: float | None, left: Callable[[Report], int]) -> None:
    """Wait until `left` of every broker's report is 0; say from time to time what it is."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    say_at = time.monotonic() + _SAY_EVERY_S
    while count := sum(map(left, from_each(found, fetch_report))):
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            raise click.ClickException(
                f"{count} connections are still out: `sharedpool who` shows who has them"
            )
        if now >= say_at:
            click.echo(f"waiting for {count} connections", err=True)
            say_at = now + _SAY_EVERY_S
        time.sleep(_POLL_EVERY_S)
