"""`sharedpool who`: who holds which connection, and what it is doing."""

from __future__ import annotations

import json
from collections.abc import Iterable

import click

from sharedpool.cli.client import (
    ANSWER_LIMIT_S,
    broker_option,
    connected,
    duration,
    find_brokers,
    from_each,
    process,
    table,
)
from sharedpool.wire.document import document
from sharedpool.wire.messages import PROTOCOL_VERSION
from sharedpool.wire.reports import (
    MOST_LISTED,
    Activity,
    BackendActivity,
    LeaseLine,
    Report,
    Status,
)

_ACTIVITY_LIMIT_S = (
    1.0  # what the books say is there already, and may be wanted all the more when the server hangs
)

_ALWAYS = ("AGE", "STATE", "POOL", "LEASE", "PROCESS")

Row = tuple[LeaseLine, BackendActivity | None]


@click.command()
@broker_option
@click.option("--pool", "name", help="Only this pool's leases.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def who(address: str | None, name: str | None, as_json: bool) -> None:
    """Show who holds which connection: one line per lease, the oldest first.

    What its worker last told of it (in use or idle, since when, in which thread), its backend, and what the server says
    that is doing, where the broker's control connection may see it. With config_pool(debug_checkouts=True) also the
    line of code that checked it out.

    Without an address: of every broker in the user's runtime directory. Exit status 3 when none answers.
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
    """One broker's answer: the books, and what the server added."""

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
    """Ask the broker at `address`, and through it the server; wait for the second only a moment.

    Raise `BrokerUnavailable`.
    """
    with connected(address) as line:
        report = line.ask(Status(PROTOCOL_VERSION, most), Report, limit_s)
        return Answer(report, line.receive(Activity, activity_limit_s) if report.activity else None)


def _remarks(report: Report, activity: Activity | None) -> Iterable[str]:
    if len(report.oldest) < report.leases:
        yield f"{report.leases - len(report.oldest)} younger leases are not shown"
    for pool in report.pools:
        if pool.paused:
            yield f"pool {pool.name!r} is paused: it lends nothing until `sharedpool resume`"
        if pool.waiting:
            yield f"pool {pool.name!r}: {pool.waiting} wait for a connection"
    if report.activity and activity is None:
        yield f"the server has not answered the broker at {report.address} within {_ACTIVITY_LIMIT_S:g} s"
    elif activity is not None and activity.error:
        yield f"the broker at {report.address} cannot ask the server: {activity.error}"
    if any(line.state == "in use" for line in report.oldest) and not any(
        line.stack for line in report.oldest
    ):
        yield "config_pool(debug_checkouts=True) shows the line of code that checked each connection out"


def lines(rows: Iterable[Row]) -> list[str]:
    """Return the table; columns in which nothing stands are left out."""
    header = (
        "AGE",
        "STATE",
        "POOL",
        "LEASE",
        "PROCESS",
        "THREAD",
        "BACKEND",
        "APPLICATION",
        "SERVER",
        "QUERY",
        "CHECKED OUT AT",
    )
    cells = [
        (
            duration(line.age_ms), line.state, line.pool, str(line.token), process(line.title, line.pid, line.host),
            line.thread, str(line.backend.pid) if line.backend else "", application(activity), server_says(activity),
            activity.query if activity else "", line.stack[0] if line.stack else "",
        )
        for line, activity in rows
    ]  # fmt: skip
    used = [i for i, _ in enumerate(header) if i < len(_ALWAYS) or any(row[i] for row in cells)]
    return table([header[i] for i in used], [[row[i] for i in used] for row in cells])


def application(activity: BackendActivity | None) -> str:
    """Return the tag that the application gave itself; the pool's own says nothing new."""
    name = activity.application if activity else ""
    return "" if name.startswith("sharedpool ") else name


def server_says(activity: BackendActivity | None) -> str:
    """Return what the server says that a backend is doing, and what it waits for."""
    if activity is None:
        return ""
    if not activity.visible:
        return "(not to be seen)"
    waits = activity.wait_event
    # An idle backend waits for its client: that goes without saying.
    return (
        f"{activity.state}, {waits}" if waits and waits != "Client: ClientRead" else activity.state
    )


def _document(line: LeaseLine, activity: BackendActivity | None) -> dict[str, object]:
    visible = activity is not None and activity.visible
    return {
        **{name: document(getattr(line, name)) for name in line.__struct_fields__},
        "application": activity.application if activity else None,
        "server_state": activity.state if activity and visible else None,
        "wait_event": activity.wait_event if activity and visible else None,
        "query": activity.query if activity and visible else None,
    }
