"""The protocol between the command line and the broker; `messages.py` has the workers' part.

    command                            broker
      STATUS(leases)            ─────►
                                ◄─────  REPORT         what the ledger holds
                                ◄─────  ACTIVITY       if the report announces it
      ORDER(kind, ...)          ─────►                 see `admin.py`
                                ◄─────  DONE           what was done

No HELLO is needed. Before a report on leases the broker sends REPORT_NOW to the workers, and waits
a moment for their answers. ACTIVITY is what PostgreSQL says of the leases' backends. It comes when
the control connection has an answer, so a server that hangs does not delay the report.
"""

from __future__ import annotations

from msgspec import field

from sharedpool.wire.admin import Done, Order
from sharedpool.wire.values import Backend, Struct, Token

MOST_LISTED = 500  # leases in one report, which must fit into a frame


class Status(Struct, frozen=True, tag="status"):
    """Ask for a REPORT."""

    version: int
    # How many of the oldest leases to list, at most `MOST_LISTED`.
    leases: int = 0
    # Reports read so far on this line. A command that does not read gets no more.
    read: int = 0


class SessionReport(Struct, frozen=True):
    """One session."""

    pid: int
    host: str
    title: str
    pool: str
    leases: int
    in_use: int
    idle: int
    waiting: int
    silent_ms: int
    suspect: bool


class LeaseLine(Struct, frozen=True):
    """One lease, as its worker last reported it."""

    token: Token
    pool: str
    # 0 if no process has it.
    pid: int
    host: str
    title: str
    thread: str
    # "in use", "idle", "parked" (at the broker, for the next request), "connecting", "closing",
    # "suspect" or "being ended".
    state: str
    # Time in this state, -1 if unknown.
    age_ms: int
    backend: Backend | None = None
    # Where it was checked out, innermost call first, if the pool has `debug_checkouts`.
    stack: list[str] = field(default_factory=list)


class PoolReport(Struct, frozen=True):
    """One pool. The counters count since the broker started."""

    name: str
    server: str
    max_conn: int
    sessions: int
    leases: int
    granted: int
    in_use: int
    idle: int
    closing: int
    suspect: int
    fencing: int
    waiting: int
    grants: int
    waits: int
    denials: int
    timeouts: int
    recalls: int
    fences: int
    quarantined: int = 0
    generation: int = 0
    error: str = ""
    handovers: int = 0
    parked: int = 0
    # How long the last hundreds of requests waited for a slot; -1 if there were none. Requests
    # that were served past the broker are known by their histogram's bucket alone.
    wait_p50_us: int = -1
    wait_p99_us: int = -1
    # Slots in use at every tenth second, the newest last.
    history: list[int] = field(default_factory=list)
    paused: bool = False
    overdue: int = 0


class HostReport(Struct, frozen=True):
    """One host's share of a limit, by what the table of the shares said last."""

    # Empty for the limit over all pools.
    pool: str
    # Empty for the host that reports, which alone is up to date.
    host: str
    # The host's broker, as in the tags of its connections.
    instance: str
    share: int
    wanted: int
    # Since its last sync.
    silent_ms: int
    # Its broker has a session on the server.
    connected: bool
    # Why it opens nothing, or does not share the limit.
    trouble: str = ""


class Report(Struct, frozen=True, tag="report"):
    """The broker's state."""

    version: int
    epoch: int
    pid: int
    address: str
    uptime_ms: int
    max_conn: int
    leases: int
    control: str
    pools: list[PoolReport]
    sessions: list[SessionReport]
    custody: int = 0
    state: str = "serving"
    # The leases that STATUS asked for.
    oldest: list[LeaseLine] = field(default_factory=list)
    # An ACTIVITY on them follows.
    activity: bool = False
    # The hosts that share limits with this one, and this one: none while it is alone.
    hosts: list[HostReport] = field(default_factory=list)


class BackendActivity(Struct, frozen=True):
    """What the server says of a backend."""

    backend: Backend
    application: str
    # The control connection may see the fields below, too.
    visible: bool
    state: str = ""
    wait_event: str = ""
    query: str = ""


class Activity(Struct, frozen=True, tag="activity"):
    """What the server says of the backends in a REPORT."""

    backends: list[BackendActivity]
    # Why the server could not be asked.
    error: str = ""


FromOperator = Status | Order
ToOperator = Report | Activity | Done


def process_name(title: str, pid: int, host: str) -> str:
    """Return the name of a worker process, as in the texts of errors."""
    if not pid:  # a lease that no process holds
        return ""
    return f"{title}[{pid}]" + (f"@{host}" if host else "")
