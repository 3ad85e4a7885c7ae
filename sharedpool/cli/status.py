"""`sharedpool status`: the leases, pools and sessions of a broker."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import click

from sharedpool.cli.client import (
    broker_option,
    duration,
    fetch_report,
    find_brokers,
    from_each,
    table,
)
from sharedpool.wire.codec import document
from sharedpool.wire.reports import PoolReport, Report, SessionReport, process_name


@click.command()
@broker_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(address: str | None, as_json: bool) -> None:
    """Show a broker's pools and processes: limits, leases, idle connections, waiters.

    Without an address, of every broker in the user's runtime directory. Exit status 3 when none
    answers.
    """
    reports = from_each(find_brokers(address), fetch_report, as_json=as_json)
    if as_json:
        documents = [document(report) for report in reports]
        click.echo(json.dumps(documents[0] if address else documents, indent=2))
    else:
        for report in reports:
            click.echo(_text(report))


def _text(report: Report) -> str:
    cap = f"{report.max_conn} over all pools" if report.max_conn else "each pool's own"
    lines = [
        f"broker {report.pid} at {report.address}, up {duration(report.uptime_ms)}, {report.state}",
        f"limit {cap}, {report.leases} leases, {report.custody} in custody;"
        f" control connection: {report.control}",
        *_pool_table(report.pools),
    ]
    for pool in report.pools:
        lines += _remarks(pool)
    lines += hosts_text(report)
    if report.sessions:
        lines += ["", *_session_table(report.sessions)]
    return "\n".join(lines)


def _pool_table(pools: Sequence[PoolReport]) -> list[str]:
    header = ("POOL", "LIMIT", "LEASES", "IN USE", "IDLE", "OTHER", "WAITING", "SESSIONS", "SERVER")
    rows = [
        (
            pool.name,
            str(pool.max_conn),
            str(pool.leases),
            str(pool.in_use),
            str(pool.idle),
            str(pool.leases - pool.in_use - pool.idle),
            str(pool.waiting),
            str(pool.sessions),
            pool.server,
        )
        for pool in pools
    ]
    return table(header, rows)


def _remarks(pool: PoolReport) -> Iterator[str]:
    if pool.suspect or pool.fencing:
        text = f"pool {pool.name!r}: {pool.suspect} suspect, {pool.fencing} being ended"
        if pool.quarantined:
            text += f" ({pool.quarantined} of them connects whose outcome is unknown)"
        yield text
    if pool.paused:
        yield f"pool {pool.name!r} is paused: nothing is granted until `sharedpool resume`"
    if pool.error:
        yield f"pool {pool.name!r} cannot open connections: {pool.error}"


def hosts_text(report: Report) -> Iterator[str]:
    """Yield what is known of the hosts that share limits with this one; nothing if it is alone."""
    if any(host.host for host in report.hosts):
        rows = [
            (
                host.host or "this one",
                host.pool or "all pools",
                str(host.share),
                str(host.wanted),
                duration(host.silent_ms),
                "" if host.connected else "its broker has no session",
            )
            for host in report.hosts
        ]
        yield ""
        yield from table(("HOST", "LIMIT OF", "SHARE", "WANTED", "HEARD", ""), rows)
    for host in report.hosts:
        if host.trouble:
            limit = f"pool {host.pool!r}" if host.pool else "limit over all pools"
            yield f"{limit}: {host.trouble}"


def _session_table(sessions: Sequence[SessionReport]) -> list[str]:
    header = ("PROCESS", "POOL", "LEASES", "IN USE", "IDLE", "WAITING", "SILENT", "")
    rows = [
        (
            process_name(session.title, session.pid, session.host),
            session.pool,
            str(session.leases),
            str(session.in_use),
            str(session.idle),
            str(session.waiting),
            duration(session.silent_ms),
            "suspect" if session.suspect else "",
        )
        for session in sorted(sessions, key=lambda session: -session.leases)
    ]
    return table(header, rows)
