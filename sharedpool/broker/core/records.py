"""What the broker records of leases, waiters, sessions and pools; `slots.py` keeps them consistent.

Times are whatever the caller's clock says.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from sharedpool.broker.core.backoff import Backoff
from sharedpool.broker.core.commands import Process
from sharedpool.broker.core.connect_refusals import Refusal, Refusals
from sharedpool.broker.core.group_terms import GroupTerms
from sharedpool.broker.core.histograms import Histograms
from sharedpool.wire.board import Board
from sharedpool.wire.desk import Live
from sharedpool.wire.messages import Backend, PoolSpec, Timings, Token

# What counts for as long as the broker lives.
_COUNTERS = (
    "handovers",
    "grants",
    "waits",
    "denials",
    "timeouts",
    "recalls",
    "fences",
    "overdue",
    "totals",
)
WAITS_KEPT = 500  # of the last requests that got a slot: how long they waited
_SAMPLES_KEPT = 60


class SlotState(Enum):
    """Where a slot is, as the broker knows it."""

    FREE = "free"
    GRANTED = "granted"
    OPEN = "open"
    CLOSING = "closing"
    SUSPECT = "suspect"
    FENCING = "fencing"

    __hash__ = object.__hash__  # there is one object of each, and Enum's own is no C function


@dataclass(slots=True, eq=False)
class GrantStop:
    """Why nothing is granted to any pool, if that is so."""

    holding_back: bool = False  # it is not known yet what is held
    because: str = ""  # told to requests that time out while the broker holds back
    draining: bool = False  # the broker is about to end: everything is asked back

    @property
    def active(self) -> bool:
        return self.holding_back or self.draining


# Python 3.11 takes as long for a member by its class as for five names of a module.
FREE, GRANTED, OPEN, CLOSING, SUSPECT, FENCING = SlotState


@dataclass(slots=True, eq=False)
class Lease:
    """A slot held by a session; `idle_since` is set while it lies in the worker's cache, `used_since` while it is out.

    `reported_at` is when a checkout that is too long was last reported: one that began later has not been;
    `inquired_at` when its worker was last asked whether it lasts, by recall number `inquiry`. `custody`: the broker has
    a duplicate of the connection's socket, on which it sees the backend's end. `live` is set while it is parked.
    `cancels`: cancels under way. `since` is when what it does now began, if that is known; `stack` where it was checked
    out, if its worker tells. `granted_at` is when it was granted, or later; its request had waited for `waited_s`.
    `closed`: the connection is over on its worker's side, or on a proxy's. `cell` is where it is on the pool's board,
    -1 while it may not move; `moves` how often it has, -1 for one that never could. `unconfirmed`: it was passed on or
    seen to move, at `unconfirmed_since`, and its new holder has not spoken of it yet; `confirm_recall` is the recall by
    which that one is asked.
    """

    token: Token
    session: Session
    pool: Pool
    state: SlotState = SlotState.FREE
    request: int = 0
    granted_at: float = -math.inf
    waited_s: float = 0.0
    backend: Backend | None = None
    custody: bool = False
    closed: bool = False
    idle_since: float | None = None
    used_since: float | None = None
    since: float | None = None
    thread: str = ""
    stack: Sequence[str] = ()
    reported_at: float = -math.inf
    inquired_at: float = -math.inf
    inquiry: int = 0
    expiry_armed: bool = False
    checkout_armed: bool = False
    live: Live | None = None
    cancels: int = 0
    cell: int = -1
    moves: int = -1
    unconfirmed: bool = False
    unconfirmed_since: float = -math.inf
    confirm_recall: int = 0

    @property
    def findable(self) -> bool:
        """Whether there is something to end and to look for."""
        return self.backend is not None or self.custody


@dataclass(slots=True, eq=False)
class Waiter:
    """A request in the queue. `round` is the poll that may decide that a `nowait` one cannot be served.

    `lane_place` is where it waits in the pool's lane, -1 if a connection cannot be sent to it.
    """

    session: Session
    request: int
    seq: int
    since: float
    nowait: bool
    round: int | None = None
    lane_place: int = -1


@dataclass(slots=True, eq=False)
class Session:
    """One worker process's registration; `returns_due` and `taking` mirror what the worker was last asked for.

    `asked` and `answered` are serials of recalls, `awaited` is the one whose answer a timer watches for (0: none).
    `vanished` are leases whose backends ended before the worker gave them back. `passes` counts what was granted or
    handed over to it; `nudged` is that count when it was last asked for what it keeps, `nudge_at` when it may be asked
    again. `restored`: known from a former broker, and has not said HELLO since; it is not fenced before `spared_until`.
    `draining` are leases that an operator wants back: it owes as many checkins at least. `inquired`: the newest waiter,
    of a less important group, for whom it was asked what lies idle. `refusal`: what stands against its connects.
    `is_elsewhere`: it finds no server where others do. `number` and `index` are its own in its pool's lane, 0 and -1
    before it was let in; `joined`: it uses it, or else may by `joins_by`. `shelf`: it is no worker's, but the pool's
    own (`Pool.shelf`). `hands_over`: it was told that it may pass connections on.
    """

    id: bytes
    pid: int
    host: str
    title: str
    pool: Pool
    expiration_s: float
    heard_at: float
    process: Process | None = None
    leases: dict[Token, Lease] = field(default_factory=dict)
    granted: dict[int, Lease] = field(default_factory=dict)  # by request, until confirmed
    waiters: dict[int, Waiter] = field(default_factory=dict)
    vanished: set[Token] = field(default_factory=set)
    draining: set[Token] = field(default_factory=set)
    recall_confirmed: int = (
        0  # the newest recall that it has answered itself; `answered` may be a guess
    )
    restored: bool = False
    spared_until: float = -math.inf
    returns_due: int = 0
    taking: int = 0
    asked: int = 0
    answered: int = 0
    awaited: int = 0
    inquired: int = 0
    refusal: Refusal | None = None
    is_elsewhere: bool = False
    expiring: bool = False
    passes: int = 0
    nudged: int = -1
    nudge_s: float = 0.0
    nudge_at: float = -math.inf
    timings: Timings | None = None  # the newest that it has told
    unresponsive: bool = False
    suspect: bool = False
    ended: bool = False
    number: int = 0
    index: int = -1
    joined: bool = False
    joins_by: float = -math.inf
    shelf: bool = False
    hands_over: bool = False

    @property
    def silent(self) -> bool:
        """Whether nothing can be asked of it."""
        return self.unresponsive or self.suspect or self.ended or self.shelf

    @property
    def label(self) -> str:
        where = f"{self.title}[{self.pid}]"
        return f"{where}@{self.host}" if self.host else where


@dataclass(slots=True, eq=False)
class Lane:
    """A pool's lane as the books have it. `members` are the sessions that were let in, by number; `outside` the others.

    `free` are cells of the board, the longest unused first, `used` how many leases have one. `last_snapshot` is what
    the cells were when they were last looked at. `requests` is what the board then said of who asks; `armed`: a timer
    looks again. `emptied_at`: then nothing was left on the shelf. `queued`: so often the broker has joined the queue,
    for those who wait at the broker, and has not been given anything yet.
    """

    board: Board
    free: deque[int]
    cells: int
    members: dict[int, Session] = field(default_factory=dict)
    outside: dict[bytes, Session] = field(default_factory=dict)
    indices: set[int] = field(default_factory=set)
    newest: int = 0
    used: int = 0
    moving: bool = False
    last_snapshot: bytes = b""
    requests: int = 0
    armed: bool = False
    queued: int = 0
    emptied_at: float = -math.inf


@dataclass(slots=True, eq=False)
class Group:
    """One group and its pools. `unknown` are pools of which nobody knows the group: they may be this one's."""

    name: str
    unknown: list[Pool]
    terms: GroupTerms = field(default_factory=GroupTerms)
    pools: list[Pool] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Slots in use."""
        return sum(len(pool.leases) for pool in self.pools)

    @property
    def room(self) -> int:
        """Slots that it may have yet under its own limit."""
        if self.terms.max_conn is None:
            return 1 << 30
        return self.terms.max_conn - self.count - sum(len(pool.leases) for pool in self.unknown)

    @property
    def unused(self) -> int:
        """Slots reserved for it and not in use."""
        return max(0, self.terms.reserved - self.count)

    @property
    def beyond(self) -> int:
        """Slots in use beyond the reservation: those that others may want back."""
        return max(0, self.count - self.terms.reserved)

    @property
    def spare(self) -> int:
        """Slots of those that are not on their way back yet."""
        return max(0, self.beyond - sum(pool.coming for pool in self.pools))


@dataclass(slots=True, eq=False)
class Pool:
    """One limit. `idle`, `incoming`, `asked_to_return` and `not_asked_to_return` are indexes over its leases and
    sessions.

    `known_as` is its name at this broker: with the database's, where another database has a pool of that name.
    `paused`: an operator has paused it, nothing is granted and everything comes back. `direct`: whether nobody was
    found between its workers and the server, in no connection so far; None before the first. `unsuitable`: what its
    connections have shown that makes it useless. `movable`: some connection could be passed on. `hands_over`: some
    session may pass connections on. `opens_by`: so long who waits is not beyond reach, as the lane is being made.
    """

    spec: PoolSpec
    max_conn: int
    backoff: Backoff
    known_as: str = ""
    group: Group | None = None
    generation: int = 1
    doubted: int = 0  # the generation about which the server is being asked
    paused: bool = False
    unnamed: bool = False  # known by its backends alone: no session has named it yet
    direct: bool | None = None
    unsuitable: str = ""
    movable: bool = False
    leases: dict[Token, Lease] = field(default_factory=dict)
    sessions: dict[bytes, Session] = field(default_factory=dict)
    waiters: OrderedDict[int, Waiter] = field(default_factory=OrderedDict)
    nowaits: OrderedDict[int, Waiter] = field(default_factory=OrderedDict)
    # Idle leases nobody has been asked for yet, longest idle first (as far as reports tell).
    idle: OrderedDict[Token, Lease] = field(default_factory=OrderedDict)
    # Slots on their way back: CLOSING or FENCING, and not for so long that one must doubt it.
    incoming: dict[Token, Lease] = field(default_factory=dict)
    suspects: OrderedDict[Token, Lease] = field(default_factory=OrderedDict)
    # Holders told to give back checkins, and holders that were not.
    asked_to_return: dict[bytes, Session] = field(default_factory=dict)
    not_asked_to_return: dict[bytes, Session] = field(default_factory=dict)
    # Given and not passed on yet, the most recent at the end.
    parked: OrderedDict[Token, Lease] = field(default_factory=OrderedDict)
    shared_until: float = -math.inf
    strangers: set[str] = field(
        default_factory=set
    )  # servers, not the pool's own, that processes connect to
    nudging: bool = False
    nudged: dict[bytes, int] = field(default_factory=dict)
    # Sessions that may have what a former broker's lane has moved, and the recall that each is to answer; 0: none yet.
    former: dict[bytes, int] = field(default_factory=dict)
    # Whether the broker may cancel what this pool's backends execute; None until it was tried. Not to be tried before.
    cancel_works: bool | None = None
    try_at: float = -math.inf
    handovers: int = 0
    taking: int = 0
    grants: int = 0
    waits: int = 0
    denials: int = 0
    timeouts: int = 0
    recalls: int = 0
    fences: int = 0
    overdue: int = 0
    waited: deque[float] = field(default_factory=lambda: deque(maxlen=WAITS_KEPT))
    history: deque[int] = field(
        default_factory=lambda: deque(maxlen=_SAMPLES_KEPT)
    )  # slots in use, now and then
    opened_at: float = -math.inf  # when a connect last succeeded, and in which session
    opener: bytes = b""
    last_unreachable: bytes = b""  # the session that found no server last
    totals: Histograms = field(default_factory=Histograms)
    refusals: Refusals = field(default_factory=Refusals)
    lane: Lane | None = None
    hands_over: bool = False
    opens_by: float = -math.inf
    shelf: Session | None = None  # for which is counted what moves and is in nobody's hands

    @property
    def holders(self) -> list[Session]:
        """The sessions that hold leases and can be asked for them."""
        return [*self.asked_to_return.values(), *self.not_asked_to_return.values()]

    def inherit_counters(self, past: Pool) -> None:
        """Go on counting where a pool of the same name, which nobody used for a while, has ended."""
        for counter in _COUNTERS:
            setattr(self, counter, getattr(past, counter))

    def note_backend(self, backend: Backend) -> None:
        """Note how one more connection reaches the server."""
        self.direct = backend.direct and self.direct is not False
        self.movable = self.movable or not backend.fixed

    @property
    def name(self) -> str:
        """The name by which this broker knows it: no other pool here has it."""
        return self.known_as or self.spec.name

    @property
    def room(self) -> int:
        """Slots that may be granted under this pool's limit and its group's (negative after a claim beyond it)."""
        return self.own_room if self.group is None else min(self.own_room, self.group.room)

    @property
    def own_room(self) -> int:
        """The same under this pool's own limit."""
        limit = self.target
        if self.backoff.ceiling is not None:
            # A probe is alone: its start-up would take the place on a full server that another's connect needs.
            connecting = any(lease.state is SlotState.GRANTED for lease in self.leases.values())
            limit = self.backoff.allowance(limit, len(self.leases), connecting=connecting)
        return limit - len(self.leases)

    @property
    def priority(self) -> int:
        """Whose waiters come first, where slots are short over all pools."""
        return 0 if self.group is None else self.group.terms.priority

    @property
    def moving(self) -> bool:
        """Whether its connections move past the broker."""
        return self.lane is not None and self.lane.moving

    @property
    def limit(self) -> int:
        """How many slots it may have, by its own limit and its group's."""
        most = None if self.group is None else self.group.terms.max_conn
        return self.max_conn if most is None else min(self.max_conn, most)

    @property
    def target(self) -> int:
        """How many slots may be in use."""
        return 0 if self.paused else self.max_conn

    @property
    def has_connections(self) -> bool:
        """Whether any lease has a connection, gives one back, or opens one that is not the probe."""
        return self.connected > 0

    @property
    def connected(self) -> int:
        """How many leases have a connection, give one back, or open one that is not the probe. O(n)."""
        states = (SlotState.OPEN, SlotState.CLOSING, SlotState.GRANTED)
        return sum(
            lease.state in states and token != self.backoff.probe
            for token, lease in self.leases.items()
        )

    @property
    def coming(self) -> int:
        """Slots that a worker has been asked for or is closing."""
        return len(self.incoming) + self.taking
