"""`sharedpool status`: what a broker counts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import click
import zmq

from sharedpool.broker.lock import is_held
from sharedpool.errors import BrokerUnavailable, ConfigError, ProtocolError
from sharedpool.wire import address as addresses
from sharedpool.wire.codec import decode_to_worker, encode
from sharedpool.wire.document import document
from sharedpool.wire.messages import PROTOCOL_VERSION, Report, Status

_ANSWER_LIMIT_S = 3.0
_NOT_RUNNING = 3  # as `service status` and systemd say it


def fetch_report(address: str, timeout_s: float = _ANSWER_LIMIT_S) -> Report:
    """Return the state of the broker at `address`; wait up to `timeout_s`, then raise `BrokerUnavailable`."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    try:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.IPV6, 1)
        dealer.connect(address)
        dealer.send(encode(Status(PROTOCOL_VERSION)))
        deadline = time.monotonic() + timeout_s
        while dealer.poll(max(0, int((deadline - time.monotonic()) * 1000))):
            message = decode_to_worker(dealer.recv())
            if isinstance(message, Report):
                return message
        raise BrokerUnavailable(f"no broker answers at {address} within {timeout_s:g} s")
    except (zmq.ZMQError, ProtocolError) as error:
        raise BrokerUnavailable(f"no broker of this version answers at {address}: {error}") from None
    finally:
        dealer.close()
        context.term()


@click.command()
@click.option("--broker", "address", envvar=addresses.BROKER_VARIABLE, show_envvar=True, help="The broker's address.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(address: str | None, as_json: bool) -> None:
    """Show sessions, leases, idle, waiting and limits of a broker, per pool.

    Without an address: of every broker in the user's runtime directory. Exit status 3 when none answers.
    """
    try:
        found = [addresses.check_address(address, "--broker")] if address else _living()
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    reports = []
    for each in found:
        try:
            reports.append(fetch_report(each))
        except BrokerUnavailable as error:
            click.echo(f"Error: {error}", err=True)
    if as_json:
        documents = [document(report) for report in reports]
        click.echo(json.dumps(documents[0] if address and documents else documents, indent=2))
    else:
        for report in reports:
            click.echo(_text(report))
    if not reports:
        if not found:
            click.echo(f"no broker is running in {addresses.runtime_dir()}", err=True)
        raise SystemExit(_NOT_RUNNING)


def _living() -> list[str]:
    """Return the addresses of this user's brokers that hold their lock."""
    sockets = sorted(addresses.runtime_dir().glob("*.sock"))
    return [f"ipc://{path}" for path in sockets if is_held(addresses.lock_path(f"ipc://{path}"))]


def _text(report: Report) -> str:
    cap = f"{report.max_conn} over all pools" if report.max_conn else "each pool's own"
    lines = [
        f"broker {report.pid} at {report.address}, up {_duration(report.uptime_ms)}, {report.state}",
        f"limit {cap}, {report.leases} leases, {report.custody} in custody; control connection: {report.control}",
    ]
    pool_header = ("POOL", "LIMIT", "LEASES", "IN USE", "IDLE", "OTHER", "WAITING", "SESSIONS", "SERVER")
    pools = [
        (
            pool.name, str(pool.max_conn), str(pool.leases), str(pool.in_use), str(pool.idle),
            str(pool.leases - pool.in_use - pool.idle), str(pool.waiting), str(pool.sessions), pool.server,
        )
        for pool in report.pools
    ]  # fmt: skip
    lines += _table(pool_header, pools)
    for pool in report.pools:
        if pool.suspect or pool.fencing:
            quarantined = (
                f" ({pool.quarantined} of them connects that nobody saw the end of)" if pool.quarantined else ""
            )
            lines.append(f"pool {pool.name!r}: {pool.suspect} suspect, {pool.fencing} being ended{quarantined}")
        if pool.error:
            lines.append(f"pool {pool.name!r} cannot open connections: {pool.error}")
    session_header = ("PROCESS", "POOL", "LEASES", "IN USE", "IDLE", "WAITING", "SILENT", "")
    sessions = [
        (
            f"{s.title}[{s.pid}]", s.pool, str(s.leases), str(s.in_use), str(s.idle), str(s.waiting),
            _duration(s.silent_ms), "suspect" if s.suspect else "",
        )
        for s in sorted(report.sessions, key=lambda session: -session.leases)
    ]  # fmt: skip
    if sessions:
        lines += ["", *_table(session_header, sessions)]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]


def _duration(ms: int) -> str:
    seconds = ms / 1000
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02}:{int(seconds % 60):02}"
