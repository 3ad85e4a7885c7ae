"""`sharedpool status`: what a broker counts."""

from __future__ import annotations

import json

import click

from sharedpool.cli.client import (
    broker_option,
    duration,
    fetch_report,
    find_brokers,
    from_each,
    process,
    table,
)
from sharedpool.wire.document import document
from sharedpool.wire.reports import Report


@click.command()
@broker_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(address: str | None, as_json: bool) -> None:
    """Show sessions, leases, idle, waiting and limits of a broker, per pool.

    Without an address: of every broker in the user's runtime directory. Exit status 3 when none answers.
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
        f"limit {cap}, {report.leases} leases, {report.custody} in custody; control connection: {report.control}",
    ]
    pool_header = (
        "POOL",
        "LIMIT",
        "LEASES",
        "IN USE",
        "IDLE",
        "OTHER",
        "WAITING",
        "SESSIONS",
        "SERVER",
    )
    pools = [
        (
            pool.name, str(pool.max_conn), str(pool.leases), str(pool.in_use), str(pool.idle),
            str(pool.leases - pool.in_use - pool.idle), str(pool.waiting), str(pool.sessions), pool.server,
        )
        for pool in report.pools
    ]  # fmt: skip
    lines += table(pool_header, pools)
    for pool in report.pools:
        if pool.suspect or pool.fencing:
            quarantined = (
                f" ({pool.quarantined} of them connects that nobody saw the end of)"
                if pool.quarantined
                else ""
            )
            lines.append(
                f"pool {pool.name!r}: {pool.suspect} suspect, {pool.fencing} being ended{quarantined}"
            )
        if pool.paused:
            lines.append(
                f"pool {pool.name!r} is paused: it lends nothing until `sharedpool resume`"
            )
        if pool.error:
            lines.append(f"pool {pool.name!r} cannot open connections: {pool.error}")
    session_header = ("PROCESS", "POOL", "LEASES", "IN USE", "IDLE", "WAITING", "SILENT", "")
    sessions = [
        (
            process(s.title, s.pid, s.host), s.pool, str(s.leases), str(s.in_use), str(s.idle), str(s.waiting),
            duration(s.silent_ms), "suspect" if s.suspect else "",
        )
        for s in sorted(report.sessions, key=lambda session: -session.leases)
    ]  # fmt: skip
    if sessions:
        lines += ["", *table(session_header, sessions)]
    return "\n".join(lines)
