"""Commands: what the ledger has decided, for the server to carry out in this order.

They are structs of msgspec: making one takes a sixth of the time of a frozen dataclass, and making
its class a fiftieth, which a broker's start would wait for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from sharedpool.broker.core.share_terms import NO_CHANGE, ShareChange, ShareKey
from sharedpool.broker.core.shares import Claim
from sharedpool.wire.desk import Live, Moved
from sharedpool.wire.messages import ToWorker
from sharedpool.wire.reports import ToOperator
from sharedpool.wire.values import Backend, PoolSpec, Token


class Process(NamedTuple):
    """A process of this host, as the kernel tells."""

    pid: int
    started: int = 0  # in clock ticks: tells a pid that is used again
    pid_namespace: str = ""  # whose pid that is (`discovery/pid_namespace.py`)


class Entry(msgspec.Struct, frozen=True):
    """All that a later broker must know of a lease."""

    token: Token
    session: bytes
    process: Process | None
    pid: int
    host: str
    title: str
    pool: PoolSpec
    max_conn: int
    expiration_s: float
    backend: Backend | None = None
    moves: int = -1  # how often it has moved in a lane; -1: it never could


class Member(msgspec.Struct, frozen=True):
    """A session that was let into a pool's lane.

    There it may be given leases that a later broker cannot know to be its own.
    """

    session: bytes
    process: Process | None
    pool: PoolSpec


class ServerIncarnation(NamedTuple):
    """A server from start to stop, by one of its names: see `seen_servers.py`."""

    name: str  # its address, or whose primary it is
    boot_us: int  # when it was started, in microseconds since 1970
    timeline: int = 0  # a primary's, which each promotion raises; 0 with an address


class SurveyResult(NamedTuple):
    """What the server lists."""

    serial: int  # the number of the order; the survey began after it was given
    starting: frozenset[int]  # pids of backends in start-up
    tagged: dict[Backend, str]  # backends with this broker's tag in their application_name
    databases: Mapping[Backend, str] = {}  # of the tagged ones


class Send(msgspec.Struct, frozen=True):
    """Send a message to a session, or to an operator's command, which has no session."""

    session: bytes
    message: ToWorker | ToOperator


class Record(msgspec.Struct, frozen=True):
    """Write a lease into the journal, before its grant is sent."""

    entry: Entry


class Erase(msgspec.Struct, frozen=True):
    """Remove a lease from the journal: its slot is free."""

    token: Token


class Admit(msgspec.Struct, frozen=True):
    """Write a member of a lane into the journal, before it is let in."""

    member: Member


class Dismiss(msgspec.Struct, frozen=True):
    """Remove a session from the journal's members: it is in no lane any more."""

    session: bytes


class TransferCustody(msgspec.Struct, frozen=True):
    """Keep a lease's socket in custody for another lease from now on."""

    token: Token
    heir: Token


class PassOn(msgspec.Struct, frozen=True):
    """Send a connection to a waiter, with the socket in custody for the message's token.

    It goes to this place in the pool's lane, of the member with this number. If it cannot be sent,
    tell `LaneEvents.not_delivered`.
    """

    pool: str
    member_number: int
    place: int
    message: Moved


class OpenLane(msgspec.Struct, frozen=True):
    """Make a lane for a pool, then tell `LaneEvents.opened`; `serial` numbers the order."""

    pool: str
    serial: int


class InviteToLane(msgspec.Struct, frozen=True):
    """Let a session into its pool's lane."""

    pool: str
    session: bytes
    member_number: int  # the session's own in the lane
    index: int  # where its turns are on the board


class GiveInLane(msgspec.Struct, frozen=True):
    """Give a connection in the lane: the socket in custody for this lease."""

    pool: str
    token: Token
    cell: int  # the lease's, on the board
    live: Live


class JoinQueue(msgspec.Struct, frozen=True):
    """Queue in a lane this many times, then look at its shelf.

    Tell `LaneEvents` of connections that come (`received`, `found_on_shelf`).
    """

    pool: str
    times: int
    most_from_shelf: int


class StartMoves(msgspec.Struct, frozen=True):
    """Leave a lane's queue and shelf to the workers: connections move past the broker now."""

    pool: str


class HaltMoves(msgspec.Struct, frozen=True):
    """Wake the threads that wait in a lane: connections do not move past the broker any more.

    Tell `LaneEvents.found_on_shelf` of connections that come to the lane's shelf.
    """

    pool: str


class CloseLane(msgspec.Struct, frozen=True):
    """Close a pool's lane: nobody uses the pool any more."""

    pool: str


class CancelBackend(msgspec.Struct, frozen=True):
    """Cancel a backend's query, then tell `ControlEvents.query_cancelled`.

    `trial`: to test whether that works in the pool.
    """

    pool: str
    token: Token
    backend: Backend
    trial: bool = False


class MarkJournalComplete(msgspec.Struct, frozen=True):
    """Mark the journal complete: it has every lease, so that a later broker need not wait."""


class RecordServer(msgspec.Struct, frozen=True):
    """Write a server that the control connection has met into the journal.

    A later broker that meets another one in its place knows that its backends are gone.
    """

    server: ServerIncarnation


class Watch(msgspec.Struct, frozen=True):
    """Watch a process, and tell `Ledger.session_died` when it ends."""

    session: bytes
    process: Process | None


class Fence(msgspec.Struct, frozen=True):
    """End a backend, verify that, then tell `Ledger.backend_gone`."""

    token: Token
    pool: str
    backend: Backend | None
    why: str
    left: bool = False  # its client has left


class SurveyServer(msgspec.Struct, frozen=True):
    """List the server's backends, then tell `ControlEvents.surveyed`."""

    serial: int
    barrier: bool  # not before the server has accepted all earlier connects


class VerifyServer(msgspec.Struct, frozen=True):
    """Check that the server is still the same, then tell `ControlEvents.server_verified`."""

    pool: str
    generation: int


class QueryActivity(msgspec.Struct, frozen=True):
    """Tell an operator's command what the server says of backends, if it does by `until`."""

    asker: bytes
    backends: tuple[Backend, ...]
    until: float


class SyncShare(msgspec.Struct, frozen=True):
    """Look at the shares of one limit, change this host's, then tell `Sharing.synced`.

    If that fails, tell `Sharing.failed`.
    """

    key: ShareKey
    max_conn: int  # the limit, if this host is the first
    claim: Claim
    question: int  # the newest that this host has put to the others
    backends: tuple[tuple[int, int], ...] = ()  # of this host's leases: pid, start time
    change: ShareChange = NO_CHANGE
    pool: str = ""  # whose limit it is; empty: that over all pools
    serial: int = 0  # of the order: its outcome counts only while no other one was given since
    # What this host remembers of the table (`table_memory.py`): it held at least `most`, beside the
    # hosts `missed`. `sure`: its row is as it was told last.
    most: int = 0
    missed: tuple[str, ...] = ()
    sure: bool = True
    home: str = ""  # the database in which the limit is to be shared; empty: the key's


class LeaveShare(msgspec.Struct, frozen=True):
    """Give this host's share of a limit back: nobody here uses it."""

    key: ShareKey


class ClaimLeadership(msgspec.Struct, frozen=True):
    """Claim the lock that keeps two brokers apart where limits cannot be shared.

    Tell `Takeover.leads` or `outranked`.
    """


class ResignLeadership(msgspec.Struct, frozen=True):
    """Give that lock back: limits are shared."""


class Forget(msgspec.Struct, frozen=True):
    """Stop watching a session's process: the session is over."""

    session: bytes


class Log(msgspec.Struct, frozen=True):
    """Log one event; `fields` tell programs whom it concerns."""

    level: int  # a `logging` level
    text: str
    fields: Mapping[str, object] = msgspec.field(default_factory=dict)


Command = (
    Send
    | Record
    | Erase
    | Admit
    | Dismiss
    | TransferCustody
    | PassOn
    | OpenLane
    | InviteToLane
    | GiveInLane
    | JoinQueue
    | StartMoves
    | HaltMoves
    | CloseLane
    | CancelBackend
    | MarkJournalComplete
    | RecordServer
    | Watch
    | SyncShare
    | LeaveShare
    | ClaimLeadership
    | ResignLeadership
    | Fence
    | SurveyServer
    | VerifyServer
    | Forget
    | Log
)
