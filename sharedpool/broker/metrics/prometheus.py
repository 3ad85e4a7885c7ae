"""The metrics of all processes in Prometheus's text format (0.0.4). Pure: no I/O, no clock.

Names follow OpenTelemetry's semantic conventions (`db.client.connection.*`) as Prometheus spells
them: dots become underscores, a unit and `_total` are appended. Metrics without a convention are
called `sharedpool_…`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sharedpool.broker.core.histograms import Histograms
from sharedpool.broker.core.snapshot import Snapshot
from sharedpool.wire.buckets import BOUNDS_S
from sharedpool.wire.reports import HostReport, PoolReport, Report

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "db_client_connection_"
_POOL, _STATE = _PREFIX + "pool_name", _PREFIX + "state"

# OpenTelemetry defines "idle" and "used", and allows other states.
_STATES: dict[str, Callable[[PoolReport], int]] = {
    "used": lambda pool: pool.in_use,
    "idle": lambda pool: pool.idle,
    "connecting": lambda pool: pool.granted,
    "closing": lambda pool: pool.closing,
    "suspect": lambda pool: pool.suspect,
    "fencing": lambda pool: pool.fencing,
}
_POOL_METRICS: list[tuple[str, str, str, Callable[[PoolReport], int]]] = [
    (_PREFIX + "max", "gauge", "Limit of connections over all processes.",
     lambda pool: pool.max_conn),
    (_PREFIX + "idle_max", "gauge", "Maximum number of idle connections: equal to max.",
     lambda pool: pool.max_conn),
    (_PREFIX + "pending_requests", "gauge", "Requests that wait, in all processes.",
     lambda pool: pool.waiting),
    (_PREFIX + "timeouts_total", "counter", "Requests that timed out.", lambda pool: pool.timeouts),
    ("sharedpool_denials_total", "counter",
     "Requests refused at once (timeout=0, or max_waiting reached).",
     lambda pool: pool.denials),
    ("sharedpool_grants_total", "counter", "Leases granted, each for one connect.",
     lambda pool: pool.grants),
    ("sharedpool_waits_total", "counter", "Grants and hand-overs after a wait.",
     lambda pool: pool.waits),
    ("sharedpool_recalls_total", "counter", "Leases returned because others waited.",
     lambda pool: pool.recalls),
    ("sharedpool_handovers_total", "counter", "Connections passed to another process.",
     lambda pool: pool.handovers),
    ("sharedpool_fences_total", "counter", "Backends ended by the broker.",
     lambda pool: pool.fences),
    ("sharedpool_overdue_total", "counter", "Checkouts that exceeded max_checkout.",
     lambda pool: pool.overdue),
    ("sharedpool_sessions", "gauge", "Processes that use the pool.", lambda pool: pool.sessions),
    ("sharedpool_parked", "gauge", "Idle connections parked at the broker.",
     lambda pool: pool.parked),
    ("sharedpool_quarantined", "gauge", "Slots of connects whose outcome is unknown.",
     lambda pool: pool.quarantined),
    ("sharedpool_generation", "gauge", "Increases when all connections are to be replaced.",
     lambda pool: pool.generation),
    ("sharedpool_failing", "gauge", "1 while connects fail.", lambda pool: int(bool(pool.error))),
]  # fmt: skip
_BROKER_METRICS: list[tuple[str, str, str, Callable[[Report], float]]] = [
    ("sharedpool_broker_epoch", "gauge", "Increases with each start of the broker.",
     lambda report: report.epoch),
    ("sharedpool_broker_uptime_seconds", "gauge", "Time since the broker was started.",
     lambda report: report.uptime_ms / 1000),
    ("sharedpool_broker_leases", "gauge", "Occupied slots over all pools.",
     lambda report: report.leases),
    ("sharedpool_broker_max", "gauge", "Limit over all pools; 0 means none.",
     lambda report: report.max_conn),
    ("sharedpool_broker_custody", "gauge", "Sockets in custody.", lambda report: report.custody),
    ("sharedpool_broker_sessions", "gauge", "Registered processes.",
     lambda report: len(report.sessions)),
    ("sharedpool_broker_suspect_sessions", "gauge", "Registered processes that are silent.",
     lambda report: sum(session.suspect for session in report.sessions)),
    ("sharedpool_broker_serving", "gauge", "1 unless the broker waits to begin, or drains.",
     lambda report: int(report.state == "serving")),
    ("sharedpool_broker_control_connected", "gauge", "1 while there is a control connection.",
     lambda report: int(report.control == "connected")),
]  # fmt: skip
_HOST_METRICS: list[tuple[str, str, str, Callable[[HostReport], float]]] = [
    ("sharedpool_host_share", "gauge", "Slots of a shared limit that a host may use.",
     lambda host: host.share),
    ("sharedpool_host_wanted", "gauge", "Slots of a shared limit that a host wants.",
     lambda host: host.wanted),
    ("sharedpool_host_silent_seconds", "gauge", "Time since a host was last heard of.",
     lambda host: host.silent_ms / 1000),
]  # fmt: skip
_TIMES = [
    ("created", "create_time_seconds", "Time to open a connection."),
    (
        "waited",
        "wait_time_seconds",
        "Time of a successful checkout; 0 from the process's own cache.",
    ),
    ("used", "use_time_seconds", "Time that connections were checked out; short uses are sampled."),
]


def render(snapshot: Snapshot) -> str:
    """Return the page that Prometheus scrapes."""
    return "\n".join(_lines(snapshot)) + "\n"


def _lines(snapshot: Snapshot) -> Iterator[str]:
    for name, kind, text, broker_value in _BROKER_METRICS:
        yield from _head(name, kind, text)
        yield f"{name} {broker_value(snapshot.report)}"
    yield from _head(_PREFIX + "count", "gauge", "Connections, and slots kept for them, by state.")
    for pool, _ in snapshot.pools:
        for state, count in _STATES.items():
            yield f"{_PREFIX}count{_labels(pool.name, (_STATE, state))} {count(pool)}"
    yield from _hosts(snapshot.report)
    for name, kind, text, value in _POOL_METRICS:
        yield from _head(name, kind, text)
        for pool, _ in snapshot.pools:
            yield f"{name}{_labels(pool.name)} {value(pool)}"
    for kind, suffix, text in _TIMES:
        yield from _head(_PREFIX + suffix, "histogram", text)
        for pool, totals in snapshot.pools:
            yield from _histogram(_PREFIX + suffix, pool.name, totals, kind)


def _hosts(report: Report) -> Iterator[str]:
    """Yield the shares of limits that hosts have in common."""
    for name, kind, text, value in _HOST_METRICS:
        yield from _head(name, kind, text)
        for host in report.hosts:
            labels = _labels(host.pool, ("host", host.host or "self"), ("broker", host.instance))
            yield f"{name}{labels} {value(host)}"


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
