"""`sharedpool who`: which process holds which connection, and what the server does for it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import click

from sharedpool.cli.client import (
    ANSWER_LIMIT_S,
    broker_option,
    connected,
    duration,
    find_brokers,
    from_each,
    table,
)
from sharedpool.wire.codec import document
from sharedpool.wire.messages import PROTOCOL_VERSION
from sharedpool.wire.reports import (
    MOST_LISTED,
    Activity,
    BackendActivity,
    LeaseLine,
    Report,
    Status,
    process_name,
)

# Short: the broker's own report has arrived by then, and matters most when the server hangs.
_ACTIVITY_LIMIT_S = 1.0
_MOST_HOSTS = 8

Row = tuple[LeaseLine, BackendActivity | None]


@click.command()
@broker_option
@click.option("--pool", "name", help="Only this pool's leases.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def who(address: str | None, name: str | None, as_json: bool) -> None:
    """Show which process holds which connection: one line per lease, the oldest first.

    A line has the worker's last report (in use or idle, since when, in which thread) and the
    backend. If the broker's control connection may see the backend's state and query, it has those,
    too. With config_pool(debug_checkouts=True) it has the line of code that checked the connection
    out.

    Without an address, of every broker in the user's runtime directory. Exit status 3 when none
    answers.
    """
    found = from_each(find_brokers(address), fetch_leases, as_json=as_json)
    rows = [row for report in found for row in report.rows if name in (None, row[0].pool)]
    rows.sort(key=lambda row: -row[0].age_ms)
    if as_json:
        click.echo(json.dumps([_document(*row) for row in rows], indent=2))
        return
    for line in lines(rows):
        click.echo(line)
    for answer in found:
        for remark in answer.remarks:
            click.echo(remark, err=True)


class Answer:
    """One broker's report on its leases, and the server's view of their backends."""

    def __init__(self, report: Report, activity: Activity | None) -> None:
        self.report = report
        seen = {each.backend: each for each in activity.backends} if activity is not None else {}
        self.rows: list[Row] = [
            (line, seen.get(line.backend) if line.backend is not None else None)
            for line in report.oldest
        ]
        self.remarks = list(_remarks(report, activity))


def fetch_leases(
    address: str,
    most: int = MOST_LISTED,
    limit_s: float = ANSWER_LIMIT_S,
    activity_limit_s: float = _ACTIVITY_LIMIT_S,
) -> Answer:
    """Ask the broker at `address`, and through it the server.

    Without the server's answer in `activity_limit_s`, return the broker's alone. Raise
    `BrokerUnavailable` without the broker's in `limit_s`.
    """
    with connected(address) as client:
        report = client.ask(Status(PROTOCOL_VERSION, most), Report, limit_s)
        activity = client.receive(Activity, activity_limit_s) if report.activity else None
    return Answer(report, activity)


def _remarks(report: Report, activity: Activity | None) -> Iterable[str]:
    if len(report.oldest) < report.leases:
        yield f"{report.leases - len(report.oldest)} younger leases are not shown"
    for pool in report.pools:
        if pool.paused:
            yield f"pool {pool.name!r} is paused: nothing is granted until `sharedpool resume`"
        if pool.waiting:
            yield f"pool {pool.name!r}: {pool.waiting} wait for a connection"
    shares = [f"{host.host} has {host.share}" for host in report.hosts if host.host]
    if shares:
        shown = ", ".join(shares[:_MOST_HOSTS])
        more = f" and {len(shares) - _MOST_HOSTS} more" if len(shares) > _MOST_HOSTS else ""
        yield f"other hosts share the limit: {shown}{more} (ask there who holds them)"
    if report.activity and activity is None:
        yield (
            f"the server has not answered the broker at {report.address}"
            f" within {_ACTIVITY_LIMIT_S:g} s"
        )
    elif activity is not None and activity.error:
        yield f"the broker at {report.address} cannot ask the server: {activity.error}"
    in_use = any(line.state == "in use" for line in report.oldest)
    if in_use and not any(line.stack for line in report.oldest):
        yield (
            "config_pool(debug_checkouts=True) shows the line of code that checked each"
            " connection out"
        )


def lines(rows: Sequence[Row]) -> list[str]:
    """Return the table. Columns after the fifth are left out if all their cells are empty."""
    cells = {
        "AGE": [duration(line.age_ms) for line, _ in rows],
        "STATE": [line.state for line, _ in rows],
        "POOL": [line.pool for line, _ in rows],
        "LEASE": [str(line.token) for line, _ in rows],
        "PROCESS": [process_name(line.title, line.pid, line.host) for line, _ in rows],
        "THREAD": [line.thread for line, _ in rows],
        "BACKEND": [str(line.backend.pid) if line.backend else "" for line, _ in rows],
        "APPLICATION": [application(activity) for _, activity in rows],
        "SERVER": [server_says(activity) for _, activity in rows],
        "QUERY": [activity.query if activity else "" for _, activity in rows],
        "CHECKED OUT AT": [line.stack[0] if line.stack else "" for line, _ in rows],
    }
    shown = {name: cells[name] for at, name in enumerate(cells) if at < 5 or any(cells[name])}
    return table(list(shown), list(zip(*shown.values(), strict=True)))


def application(activity: BackendActivity | None) -> str:
    """Return the backend's application_name, unless it is the one that the pool gave it."""
    name = activity.application if activity else ""
    return "" if name.startswith("sharedpool ") else name


def server_says(activity: BackendActivity | None) -> str:
    """Return a backend's state on the server, and its wait event."""
    if activity is None:
        return ""
    if not activity.visible:
        return "(not visible)"
    if activity.wait_event in ("", "Client: ClientRead"):  # every idle backend waits for its client
        return activity.state
    return f"{activity.state}, {activity.wait_event}"


def _document(line: LeaseLine, activity: BackendActivity | None) -> dict[str, object]:
    visible = activity is not None and activity.visible
    return {
        **{name: document(getattr(line, name)) for name in line.__struct_fields__},
        "application": activity.application if activity else None,
        "server_state": activity.state if activity and visible else None,
        "wait_event": activity.wait_event if activity and visible else None,
        "query": activity.query if activity and visible else None,
    }
