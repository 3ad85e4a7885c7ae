"""What the broker records of leases, waiters, sessions and pools; `slots.py` keeps it consistent.

Times are readings of the caller's clock, in seconds; -inf stands for "never".
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from sharedpool.broker.core.backoff import Backoff
from sharedpool.broker.core.commands import Process
from sharedpool.broker.core.connect_refusals import Refusal, Refusals
from sharedpool.broker.core.counters import Counters
from sharedpool.broker.core.group_terms import GroupTerms
from sharedpool.broker.core.histograms import waits
from sharedpool.broker.core.session_states import ENDED, LIVE, SUSPECT, SessionState
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.board import Board
from sharedpool.wire.desk import Live
from sharedpool.wire.values import Backend, PoolSpec, Timings, Token

_WAITS_KEPT = 500
# A share of a limit that this host does not share with others; beyond every number of a request.
UNSHARED = 1 << 30
_SAMPLES_KEPT = 60


@dataclass(slots=True, eq=False)
class GrantStop:
    """Why nothing is granted to any pool, if that is so."""

    holding_back: bool = False  # what is held is not known yet
    because: str = ""  # told to requests that time out while the broker holds back
    draining: bool = False  # the broker is about to end: everything is asked back

    @property
    def active(self) -> bool:
        return self.holding_back or self.draining


@dataclass(slots=True, eq=False)
class Lease:
    """A slot held by a session."""

    token: Token
    session: Session
    pool: Pool
    state: SlotState = SlotState.FREE
    request: int = 0  # the request that it was granted for
    granted_at: float = -math.inf  # or later, when the lease was claimed
    waited_s: float = 0.0  # how long its request had waited

    # --- the connection
    backend: Backend | None = None
    custody: bool = False  # the broker has a duplicate of its socket, and sees the backend's end
    left: bool = False  # its client's side is over: closed, by the worker or a proxy, or dead
    cancels: int = 0  # cancels under way
    live: Live | None = None  # set while the connection is parked at the broker

    # --- what the worker does with it
    idle_since: float | None = None  # in the worker's cache
    used_since: float | None = None  # checked out
    since: float | None = None  # when its present state or phase began, if that is known
    thread: str = ""
    stack: Sequence[str] = ()  # where it was checked out, if its worker tells

    # --- watching how long
    expiry_armed: bool = False
    checkout_armed: bool = False
    reported_at: float = -math.inf  # when a long checkout was last reported; later ones were not
    inquired_at: float = -math.inf  # when the worker was last asked whether the checkout lasts,
    inquiry: int = 0  # and by which recall

    # --- moves in the lane
    cell: int = -1  # on the pool's board; -1 while the lease may not move
    moves: int = -1  # how often it has moved; -1 if it never could
    # It was passed on, or was seen to move, and its new holder has not listed it yet:
    unconfirmed: bool = False
    unconfirmed_since: float = -math.inf
    confirm_recall: int = 0  # the recall by which the new holder is asked; -1: asked enough

    @property
    def findable(self) -> bool:
        """Return True if there is a backend or a socket to end, and to look for."""
        return self.backend is not None or self.custody


@dataclass(slots=True, eq=False)
class Waiter:
    """A request in the queue."""

    session: Session
    request: int
    seq: int  # its number over all sessions: first come, first served
    since: float
    nowait: bool  # `timeout=0`: refused as soon as nothing is idle anywhere
    round: int | None = None  # the round (`rounds.py`) that may refuse it
    lane_place: int = -1  # where it waits in the pool's lane; -1: no connection can be sent to it


@dataclass(slots=True, eq=False)
class Session:
    """One worker process's registration, for one pool."""

    id: bytes
    pid: int
    host: str
    title: str
    pool: Pool
    expiration_s: float
    heard_at: float
    process: Process | None = None

    # --- what it holds and wants
    leases: dict[Token, Lease] = field(default_factory=dict)
    granted: dict[int, Lease] = field(default_factory=dict)  # by request, until confirmed
    waiters: dict[int, Waiter] = field(default_factory=dict)  # by request
    vanished: set[Token] = field(default_factory=set)  # leases whose backends ended first
    timings: Timings | None = None  # the newest it has told

    # --- its life
    state: SessionState = LIVE
    restored: bool = False  # known from a former broker, and has not said HELLO since
    spared_until: float = -math.inf  # its suspect leases are not fenced before
    shelf: bool = False  # no worker's, but the pool's own (`Pool.shelf`)

    # --- recalls (`recalls.py`)
    asked: int = 0  # the newest recall that was sent
    answered: int = 0  # the newest recall that is answered, or given up
    recall_confirmed: int = 0  # the newest recall that the worker itself has answered
    awaited: int = 0  # the recall whose answer an alarm watches for; 0: none
    taking: int = 0  # idle leases it was asked for, and has not answered about
    returns_due: int = 0  # checkins it was told to give back
    draining: set[Token] = field(default_factory=set)  # leases that an operator wants back
    expiring: bool = False  # it was asked to give back what was idle for too long
    inquired: int = 0  # the newest waiter of a less important group that it was asked for

    # --- keeping connections while others wait (`Handover.watch_keepers`)
    passes: int = 0  # how often it was granted or handed a connection
    nudged: int = -1  # `passes` when it was last asked for what it keeps
    nudge_s: float = 0.0
    nudge_at: float = -math.inf  # when it may be asked again

    # --- connects
    refusal: Refusal | None = None  # what stands against its connects
    is_elsewhere: bool = False  # it finds no server where others do

    # --- the lane
    hands_over: bool = False  # it was told that it may pass connections on
    member_number: int = 0  # its own in the pool's lane; 0 before it was let in
    index: int = -1  # where its places are on the board
    joined: bool = False  # it uses the lane,
    joins_by: float = -math.inf  # or may do so until then

    @property
    def silent(self) -> bool:
        """Return True if the session cannot be asked for anything."""
        return self.state is not LIVE or self.shelf

    @property
    def suspect(self) -> bool:
        return self.state is SUSPECT

    @property
    def ended(self) -> bool:
        return self.state is ENDED

    @property
    def label(self) -> str:
        where = f"{self.title}[{self.pid}]"
        return f"{where}@{self.host}" if self.host else where

    def note_timings(self, times: Timings | None) -> None:
        """Add what the session tells of its times to its pool's."""
        pool = self.pool
        if times is not None and pool.counters.totals.note(self.timings, times):
            if pool.moving:  # else the broker has seen the waits itself
                pool.waited.extend(waits(self.timings, times, _WAITS_KEPT))
            self.timings = times


@dataclass(slots=True, eq=False)
class Lane:
    """A pool's lane, as the broker records it."""

    board: Board
    free: deque[int]  # cells of the board without a lease, longest unused first
    cells: int
    used: int = 0  # how many leases have a cell
    members: dict[int, Session] = field(default_factory=dict)  # let in, by number
    outside: dict[bytes, Session] = field(default_factory=dict)  # all other sessions
    indices: set[int] = field(default_factory=set)  # of the members
    newest: int = 0  # the newest member's number
    moving: bool = False  # connections move past the broker
    last_snapshot: bytes = b""  # the cells when they were last read
    requests: int = 0  # the board's count of requests when the last alarm was set
    armed: bool = False  # an alarm looks whether anybody asks
    queued: int = 0  # tickets of the broker, for its own waiters, that are not served yet
    emptied_at: float = -math.inf  # when nothing was left on the shelf


@dataclass(slots=True, eq=False)
class Group:
    """One group and its pools."""

    name: str
    unknown: list[Pool]  # pools whose group nobody knows: they may be this one's
    terms: GroupTerms = field(default_factory=GroupTerms)
    pools: list[Pool] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Slots in use."""
        return sum(len(pool.leases) for pool in self.pools)

    @property
    def room(self) -> int:
        """Slots that the group may still have under its own limit."""
        if self.terms.max_conn is None:
            return 1 << 30
        return self.terms.max_conn - self.count - sum(len(pool.leases) for pool in self.unknown)

    @property
    def unused(self) -> int:
        """Slots that are reserved for the group and not in use."""
        return max(0, self.terms.reserved - self.count)

    @property
    def beyond(self) -> int:
        """Slots in use beyond the reservation: others may want them back."""
        return max(0, self.count - self.terms.reserved)

    @property
    def spare(self) -> int:
        """Slots beyond the reservation that are not on their way back yet."""
        return max(0, self.beyond - sum(pool.coming for pool in self.pools))


@dataclass(slots=True, eq=False)
class Pool:
    """One limit, and the sessions that share it."""

    spec: PoolSpec
    max_conn: int
    backoff: Backoff
    refusals: Refusals = field(default_factory=Refusals)
    counters: Counters = field(default_factory=Counters)

    # --- its place at this broker
    known_as: str = ""  # with the database's name, where another database has a pool of this name
    unnamed: bool = False  # known by its backends alone: no session has named it yet
    group: Group | None = None
    generation: int = 1
    doubted: int = 0  # the generation about which the server is being asked
    paused: bool = False  # by an operator: nothing is granted, and everything comes back
    allowed: int = UNSHARED  # how many of the limit's slots are this host's (`sharing.py`)
    # The newest request that may be refused because nothing is idle: other hosts have answered.
    refusable: int = UNSHARED

    # --- leases and sessions, and indexes over them
    leases: dict[Token, Lease] = field(default_factory=dict)
    sessions: dict[bytes, Session] = field(default_factory=dict)
    # Idle leases that nobody has been asked for yet, longest idle first (as far as reports tell).
    idle: OrderedDict[Token, Lease] = field(default_factory=OrderedDict)
    # Slots on their way back: CLOSING or FENCING, and not for so long that it is doubtful.
    incoming: dict[Token, Lease] = field(default_factory=dict)
    suspects: OrderedDict[Token, Lease] = field(default_factory=OrderedDict)
    # Given to the broker and not passed on yet, the most recent at the end.
    parked: OrderedDict[Token, Lease] = field(default_factory=OrderedDict)
    # Holders told to give back checkins, and holders that were not.
    asked_to_return: dict[bytes, Session] = field(default_factory=dict)
    not_asked_to_return: dict[bytes, Session] = field(default_factory=dict)
    taking: int = 0  # the sum over its sessions

    # --- the queue, by `Waiter.seq`
    waiters: OrderedDict[int, Waiter] = field(default_factory=OrderedDict)
    nowaits: OrderedDict[int, Waiter] = field(default_factory=OrderedDict)  # those that do not wait

    # --- the way to the server
    # Whether no connection so far has a proxy between its worker and the server; None before any.
    direct: bool | None = None
    unsuitable: str = ""  # what connections have shown that makes the server useless
    # Servers, not the pool's own, to which processes of this pool connect.
    strangers: set[str] = field(default_factory=set)
    opened_at: float = -math.inf  # when a connect last succeeded,
    opener: bytes = b""  # and in which session
    last_unreachable: bytes = b""  # the session that found no server last

    # --- the hand-over
    movable: bool = False  # some connection could be passed on
    hands_over: bool = False  # some session may pass connections on
    # Whether the broker may cancel queries of the pool's backends; None until it was tested.
    cancel_works: bool | None = None
    try_at: float = -math.inf  # no test before that
    shared_until: float = -math.inf  # connections change hands until then
    nudging: bool = False  # an alarm looks for holders that keep connections while others wait
    nudged: dict[bytes, int] = field(default_factory=dict)  # their `passes` when it was set

    # --- the lane
    lane: Lane | None = None
    opens_by: float = -math.inf  # while the lane is made, waiters may be reached until then
    shelf: Session | None = None  # holds the leases that have moved and are in nobody's hands
    # Sessions that may have what a former broker's lane has moved, and the recall that each is to
    # answer; 0: none yet.
    former: dict[bytes, int] = field(default_factory=dict)

    # --- for reports
    waited: deque[float] = field(default_factory=lambda: deque(maxlen=_WAITS_KEPT))  # seconds
    history: deque[int] = field(default_factory=lambda: deque(maxlen=_SAMPLES_KEPT))  # slots in use

    @property
    def holders(self) -> list[Session]:
        """The sessions that hold leases and can be asked for them."""
        return [*self.asked_to_return.values(), *self.not_asked_to_return.values()]

    def record_wait(self, waited_s: float) -> None:
        """Record how long a request has waited that gets a connection now."""
        self.counters.waits += waited_s > 0
        self.waited.append(waited_s)

    def note_backend(self, backend: Backend) -> None:
        """Record how one more connection reaches the server."""
        self.direct = backend.direct and self.direct is not False
        self.movable = self.movable or not backend.fixed

    @property
    def name(self) -> str:
        """The name that no other pool of this broker has."""
        return self.known_as or self.spec.name

    @property
    def room(self) -> int:
        """Slots that may be granted under the pool's limit and its group's.

        Negative after claims beyond the limit.
        """
        return self.own_room if self.group is None else min(self.own_room, self.group.room)

    @property
    def own_room(self) -> int:
        """Slots that may be granted under the pool's own limit."""
        limit = self.target
        if self.backoff.active:
            # A probe is alone: on a full server another connect would take the place that it needs.
            connecting = any(lease.state is SlotState.GRANTED for lease in self.leases.values())
            limit = self.backoff.allowance(limit, len(self.leases), connecting=connecting)
        return limit - len(self.leases)

    @property
    def priority(self) -> int:
        """Its group's: where slots are short over all pools, the highest is served first."""
        return 0 if self.group is None else self.group.terms.priority

    @property
    def moving(self) -> bool:
        """Return True while connections move past the broker."""
        return self.lane is not None and self.lane.moving

    @property
    def limit(self) -> int:
        """How many slots the pool may have, by its own limit and its group's."""
        most = None if self.group is None else self.group.terms.max_conn
        return self.max_conn if most is None else min(self.max_conn, most)

    @property
    def target(self) -> int:
        """How many slots may be in use on this host: none while the pool is paused."""
        return 0 if self.paused else min(self.max_conn, self.allowed)

    @property
    def has_connections(self) -> bool:
        """Return True if any connection is open, opening or closing, apart from the probe's."""
        return self.connected > 0

    @property
    def connected(self) -> int:
        """How many leases have, open or close a connection; the probe does not count. O(n)."""
        states = (SlotState.OPEN, SlotState.CLOSING, SlotState.GRANTED)
        return sum(
            lease.state in states and token != self.backoff.probe
            for token, lease in self.leases.items()
        )

    @property
    def coming(self) -> int:
        """Slots on their way back: a worker was asked for them, or is closing them."""
        return len(self.incoming) + self.taking
