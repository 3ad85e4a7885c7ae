"""The metrics as Prometheus reads them (text format 0.0.4), for the whole fleet. Pure.

The names are OpenTelemetry's (semantic conventions, `db.client.connection.*`) as Prometheus spells them: dots become
underscores, a unit and `_total` are appended. What they do not know is called `sharedpool_…`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sharedpool.broker.core.histograms import Histograms
from sharedpool.broker.core.snapshot import Snapshot
from sharedpool.wire.buckets import BOUNDS_S
from sharedpool.wire.reports import PoolReport, Report

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "db_client_connection_"
_POOL, _STATE = _PREFIX + "pool_name", _PREFIX + "state"

# "idle" and "used" are OpenTelemetry's words, which allow more.
_STATES: dict[str, Callable[[PoolReport], int]] = {
    "used": lambda pool: pool.in_use,
    "idle": lambda pool: pool.idle,
    "connecting": lambda pool: pool.granted,
    "closing": lambda pool: pool.closing,
    "suspect": lambda pool: pool.suspect,
    "fencing": lambda pool: pool.fencing,
}
_POOL_METRICS: list[tuple[str, str, str, Callable[[PoolReport], int]]] = [
    (_PREFIX + "max", "gauge", "The limit over all processes.", lambda pool: pool.max_conn),
    (_PREFIX + "idle_max", "gauge", "How many may lie idle: all.", lambda pool: pool.max_conn),
    (_PREFIX + "pending_requests", "gauge", "Callers of all processes that wait.", lambda pool: pool.waiting),
    (_PREFIX + "timeouts_total", "counter", "Waits that ended without one.", lambda pool: pool.timeouts),
    ("sharedpool_denials_total", "counter", "Requests refused, by those who did not want to wait, or were too many.",
     lambda pool: pool.denials),
    ("sharedpool_grants_total", "counter", "Leases granted: each for one connect.", lambda pool: pool.grants),
    ("sharedpool_waits_total", "counter", "Grants and hand-overs that were waited for.", lambda pool: pool.waits),
    ("sharedpool_recalls_total", "counter", "Leases asked back since others waited.", lambda pool: pool.recalls),
    ("sharedpool_handovers_total", "counter", "Connections passed to another process.", lambda pool: pool.handovers),
    ("sharedpool_fences_total", "counter", "Backends that the broker had to end.", lambda pool: pool.fences),
    ("sharedpool_overdue_total", "counter", "Checkouts beyond max_checkout.", lambda pool: pool.overdue),
    ("sharedpool_sessions", "gauge", "Processes that use the pool.", lambda pool: pool.sessions),
    ("sharedpool_parked", "gauge", "Idle connections that lie at the broker.", lambda pool: pool.parked),
    ("sharedpool_quarantined", "gauge", "Slots of connects whose end nobody saw.", lambda pool: pool.quarantined),
    ("sharedpool_generation", "gauge", "Grows when all connections are to be replaced.", lambda pool: pool.generation),
    ("sharedpool_failing", "gauge", "1 while connections cannot be opened.", lambda pool: int(bool(pool.error))),
]  # fmt: skip
_BROKER_METRICS: list[tuple[str, str, str, Callable[[Report], float]]] = [
    ("sharedpool_broker_epoch", "gauge", "Grows with each start of the broker.", lambda report: report.epoch),
    ("sharedpool_broker_uptime_seconds", "gauge", "Since this start.", lambda report: report.uptime_ms / 1000),
    ("sharedpool_broker_leases", "gauge", "Slots that are not free, over all pools.", lambda report: report.leases),
    ("sharedpool_broker_max", "gauge", "The limit over all pools; 0: none.", lambda report: report.max_conn),
    ("sharedpool_broker_custody", "gauge", "Sockets in custody.", lambda report: report.custody),
    ("sharedpool_broker_sessions", "gauge", "Processes registered.", lambda report: len(report.sessions)),
    ("sharedpool_broker_suspect_sessions", "gauge", "Processes that have fallen silent.",
     lambda report: sum(session.suspect for session in report.sessions)),
    ("sharedpool_broker_serving", "gauge", "1 unless it waits to begin, or drains.",
     lambda report: int(report.state == "serving")),
    ("sharedpool_broker_control_connected", "gauge", "1 while there is a control connection.",
     lambda report: int(report.control == "connected")),
]  # fmt: skip
_TIMES = [
    ("created", "create_time_seconds", "How long it took to open a connection."),
    (
        "waited",
        "wait_time_seconds",
        "How long a checkout took that succeeded; 0 from the process's own cache.",
    ),
    ("used", "use_time_seconds", "How long connections were checked out; short uses are sampled."),
]


def render(snapshot: Snapshot) -> str:
    """Return the page that Prometheus scrapes."""
    return "\n".join(_lines(snapshot)) + "\n"


def _lines(snapshot: Snapshot) -> Iterator[str]:
    for name, kind, text, broker_value in _BROKER_METRICS:
        yield from _head(name, kind, text)
        yield f"{name} {broker_value(snapshot.report)}"
    yield from _head(_PREFIX + "count", "gauge", "Connections, or slots kept for them, by state.")
    for pool, _ in snapshot.pools:
        for state, count in _STATES.items():
            yield f"{_PREFIX}count{_labels(pool.name, (_STATE, state))} {count(pool)}"
    for name, kind, text, value in _POOL_METRICS:
        yield from _head(name, kind, text)
        for pool, _ in snapshot.pools:
            yield f"{name}{_labels(pool.name)} {value(pool)}"
    for kind, suffix, text in _TIMES:
        yield from _head(_PREFIX + suffix, "histogram", text)
        for pool, totals in snapshot.pools:
            yield from _histogram(_PREFIX + suffix, pool.name, totals, kind)


def _histogram(name: str, pool: str, totals: Histograms, kind: str) -> Iterator[str]:
    count = 0
    for bound, more in zip([*map(str, BOUNDS_S), "+Inf"], totals.counts[kind], strict=True):
        count += more
        yield f"{name}_bucket{_labels(pool, ('le', bound))} {count}"
    yield f"{name}_sum{_labels(pool)} {totals.total_us[kind] / 1e6}"
    yield f"{name}_count{_labels(pool)} {count}"


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _labels(pool: str, *more: tuple[str, str]) -> str:
    return (
        "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in ((_POOL, pool), *more)) + "}"
    )


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
