"""What the ledger decides; the server carries it out, in this order.

What every request leads to is a struct of msgspec's, which is made in a sixth of a frozen dataclass's time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from sharedpool.wire.desk import Live, Moved
from sharedpool.wire.messages import Backend, PoolSpec, Token, ToWorker
from sharedpool.wire.reports import ToOperator


class Process(NamedTuple):
    """A process of this host, as the kernel vouches for it. `started`, in clock ticks, tells a pid used again.

    `pid_namespace` is whose pid that is (`discovery/pid_namespace.py`): a later broker's may be another's.
    """

    pid: int
    started: int = 0
    pid_namespace: str = ""


class Entry(msgspec.Struct, frozen=True):
    """All that a later broker must know of a lease. `moves`: how often it has moved in a lane; -1: it does not."""

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
    moves: int = -1


class Member(msgspec.Struct, frozen=True):
    """Who was let into a pool's lane: in it he may be given what a later broker cannot know to be his."""

    session: bytes
    process: Process | None
    pool: PoolSpec


class ServerIncarnation(NamedTuple):
    """One incarnation of a server: the address by which the control connection came to it, and when it started."""

    route: str
    boot_us: int


class SurveyResult(NamedTuple):
    """What the server lists: backends in start-up, and those whose application_name is this broker's, by that name.

    `serial` is the number of the order; the look began after it was given. `databases` are those of the tagged ones.
    """

    serial: int
    starting: frozenset[int]
    tagged: dict[Backend, str]
    databases: Mapping[Backend, str] = {}


class Send(msgspec.Struct, frozen=True):
    """Send `message` to `session`, or to a command that has none."""

    session: bytes
    message: ToWorker | ToOperator


class Record(msgspec.Struct, frozen=True):
    """Have a lease outlive this broker: written before the grant is sent."""

    entry: Entry


class Erase(msgspec.Struct, frozen=True):
    """The slot is free."""

    token: Token


class Admit(msgspec.Struct, frozen=True):
    """Have it outlive this broker that a session is let into a lane: written before it is."""

    member: Member


class Dismiss(msgspec.Struct, frozen=True):
    """The session is in no lane any more."""

    session: bytes


@dataclass(frozen=True, slots=True)
class TransferCustody:
    """The socket in custody for one lease is another's from now on."""

    token: Token
    heir: Token


@dataclass(frozen=True, slots=True)
class PassOn:
    """Send this, with the socket in custody for its token, to this place in a pool's lane, of the session that has this
    number there; if that cannot be, tell the ledger (`not_delivered`).
    """

    pool: str
    number: int
    place: int
    message: Moved


@dataclass(frozen=True, slots=True)
class OpenLane:
    """Make a lane for a pool, then tell the ledger (`lane_opened`). `serial` is the number of the order."""

    pool: str
    serial: int


@dataclass(frozen=True, slots=True)
class InviteToLane:
    """Open a pool's lane to a session, by this number; its turns are at `index` on the board."""

    pool: str
    session: bytes
    number: int
    index: int


@dataclass(frozen=True, slots=True)
class GiveInLane:
    """Give a connection in the lane: the socket in custody for this lease, which has this cell on the board."""

    pool: str
    token: Token
    cell: int
    live: Live


@dataclass(frozen=True, slots=True)
class JoinQueue:
    """Join the queue of a lane so often, then look at its shelf; tell the ledger of what comes (`came`,
    `found_on_shelf`).

    At most `most_from_shelf` are taken from there.
    """

    pool: str
    times: int
    most_from_shelf: int


@dataclass(frozen=True, slots=True)
class StartMoves:
    """Connections move past the broker now: leave the lane's queue and shelf to the workers."""

    pool: str


@dataclass(frozen=True, slots=True)
class HaltMoves:
    """They do no more: wake who waits in the lane; tell the ledger of what comes to its shelf (`found_on_shelf`)."""

    pool: str


@dataclass(frozen=True, slots=True)
class CloseLane:
    """Nobody uses the pool any more."""

    pool: str


@dataclass(frozen=True, slots=True)
class CancelBackend:
    """Cancel what a backend is executing, then tell the ledger (`interrupted`). `trial`: to see whether that works."""

    token: Token
    backend: Backend
    trial: bool = False


@dataclass(frozen=True, slots=True)
class MarkJournalComplete:
    """From now on the journal tells of every lease there may be: a later broker need not wait."""


@dataclass(frozen=True, slots=True)
class RecordServer:
    """Have a later broker know that the control connection was here: what was there is gone when another answers."""

    server: ServerIncarnation


@dataclass(frozen=True, slots=True)
class Watch:
    """Tell the ledger (`session_died`) when `process` ends."""

    session: bytes
    process: Process | None


@dataclass(frozen=True, slots=True)
class Fence:
    """Make this backend impossible, verify it, then tell the ledger (`backend_gone`). `left`: its client has left."""

    token: Token
    pool: str
    backend: Backend | None
    why: str
    left: bool = False


@dataclass(frozen=True, slots=True)
class SurveyServer:
    """Survey the server, then tell the ledger (`surveyed`). `barrier`: when it has accepted all earlier connects."""

    serial: int
    barrier: bool


@dataclass(frozen=True, slots=True)
class VerifyServer:
    """See whether the server is still the one it was, then tell the ledger (`server_verified`)."""

    pool: str
    generation: int


@dataclass(frozen=True, slots=True)
class QueryActivity:
    """Tell a command what the server says of these backends, unless that is possible only after `until`."""

    asker: bytes
    backends: tuple[Backend, ...]
    until: float


@dataclass(frozen=True, slots=True)
class Forget:
    """The session is over: stop watching its process."""

    session: bytes


@dataclass(frozen=True, slots=True)
class Log:
    """One event for the log; `level` is a `logging` level, `fields` say for programs whom it concerns."""

    level: int
    text: str
    fields: Mapping[str, object] = field(default_factory=dict)


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
    | Fence
    | SurveyServer
    | VerifyServer
    | Forget
    | Log
)
