"""What the command line asks a broker, and what it is told: the other half of the protocol (see `messages.py`).

    command                                            broker
      STATUS(leases)                            ─────►
                                                ◄─────  REPORT                       the books
                                                ◄─────  ACTIVITY                     if the report announces it
      ORDER(kind, ...)                          ─────►                               see `admin.py`
                                                ◄─────  DONE(what was done)

No HELLO is needed. Before it tells of leases the broker has the workers REPORT_NOW of them, and waits a moment for
that. ACTIVITY is what PostgreSQL says of the leases' backends: it comes when the control connection has an answer, so
that a server that hangs keeps nobody from seeing the books.
"""

from __future__ import annotations

from msgspec import field

from sharedpool.wire.admin import Done, Order
from sharedpool.wire.messages import Backend, Struct, Token

MOST_LISTED = 500  # leases in one report: it must fit into a frame


class Status(Struct, frozen=True, tag="status"):
    """Ask for a REPORT with the `leases` oldest leases (at most `MOST_LISTED`).

    `read` is how many have been read on this line: one that does not read gets no more.
    """

    version: int
    leases: int = 0
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
    """One lease: who has it, and what it was doing, for how long, when its worker last spoke of it.

    `state` is "in use", "idle", "parked" (for whoever asks next; `pid` is 0 where no process has it), "connecting",
    "closing", "suspect" or "being ended"; `age_ms` is -1 where nobody knows. `stack` is where it was checked out,
    innermost first, if the pool has `debug_checkouts`.
    """

    token: Token
    pool: str
    pid: int
    host: str
    title: str
    thread: str
    state: str
    age_ms: int
    backend: Backend | None = None
    stack: list[str] = field(default_factory=list)


class PoolReport(Struct, frozen=True):
    """One pool; the counters count since the broker started.

    `wait_p50_us` and `wait_p99_us` are of the last hundreds of requests that got a slot: from their arrival until then;
    -1 while there were none. Those that were served past the broker are known by the histograms' buckets. `history` is
    how many slots were in use at every tenth second, the newest last.
    """

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
    wait_p50_us: int = -1
    wait_p99_us: int = -1
    history: list[int] = field(default_factory=list)
    paused: bool = False
    overdue: int = 0


class Report(Struct, frozen=True, tag="report"):
    """The broker's state. `oldest` are the leases that were asked for; `activity`: an ACTIVITY on them follows."""

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
    oldest: list[LeaseLine] = field(default_factory=list)
    activity: bool = False


class BackendActivity(Struct, frozen=True):
    """What the server says of a backend. `visible`: the control connection may see more than the `application`."""

    backend: Backend
    application: str
    visible: bool
    state: str = ""
    wait_event: str = ""
    query: str = ""


class Activity(Struct, frozen=True, tag="activity"):
    """What the server says of the backends in a REPORT; `error`: why it could not be asked."""

    backends: list[BackendActivity]
    error: str = ""


FromOperator = Status | Order
ToOperator = Report | Activity | Done
