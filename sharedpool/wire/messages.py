"""The protocol between a worker's pool and the broker.

A pool in one process is a *session*; the sessions of a process share a ZeroMQ DEALER, which talks to the broker's
ROUTER (`channel.py`). Every message is one frame: msgpack of one tagged array below. Durations cross the wire, in
milliseconds; clocks never do. Everything is idempotent: a request carries the client's own number and is answered the
same way when it is repeated, a lease is named by a token that is never used twice.

    worker                                             broker
      HELLO(version, pool, leases still held)   ─────►                               with a first ACQUIRE, if there is
                                                ◄─────  WELCOME(epoch, limit, ttl)   or REJECT(reason)
      ACQUIRE(request, wait)                    ─────►
                                                ◄─────  GRANT(request, token)        or DENY(request, who holds)
                                                ◄┄┄┄┄┄  MOVED(request, token)        or this, in the lane
      [connects]  DEPOSIT(token) + socket       ═════►                               at the desk
                  CONFIRM(token, backend)       ─────►
                                                ◄─────  RECALL(take, returns_due)    somebody else waits
      RENEW(leases, answers)  RELEASE(token)    ─────►                               what is idle now, what is given
      RENEW(leases, times)                      ─────►                               heartbeat, every third of the TTL
                                                ◄─────  ACK(revoked)
      FAILOVER_SIGN(code)                       ─────►                               the server fails over, perhaps
                                                ◄─────  STALE(generation)            drop what is older
                                                ◄─────  GONE(tokens)                 these connections have ended
                                                ◄─────  REPORT_NOW                   say now what is held (a RENEW)
      BYE                                       ─────►

`take` asks for idle leases now. `returns_due` is how many of the next checkins are to be given back instead of cached:
an absolute number, so that a repeated or late RECALL does no harm (`serial` tells which is the newest). What the
command line asks a broker, without a HELLO, is in `reports.py`.

What is said at the desk (═) is in `desk.py`.

From a HELLO until its WELCOME a worker takes in nothing else: a grant of a former broker, or of this one before it
knew what is held, counts as lost and is sent again.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, NamedTuple

import msgspec

from sharedpool.wire.buckets import BUCKETS

PROTOCOL_VERSION = 8


class Token(NamedTuple):
    """A lease's name: the broker's epoch and a serial that grows forever."""

    epoch: int
    serial: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.serial}"


NO_TOKEN = Token(0, 0)

# PostgreSQL ends a backend whose client has not logged in by then (authentication_timeout, 60 s by default).
START_UP_LIMIT_S = 65.0

# What PostgreSQL's int and bigint hold: a number beyond would make the broker's own queries fail.
Int4 = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
Int8 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Struct(msgspec.Struct, frozen=True, array_like=True):
    """Parent of everything on the wire."""


class Backend(Struct, frozen=True, eq=False):
    """A PostgreSQL server process: a pid alone may be used again, a pid and its start time may not.

    `boot_us`, when its postmaster started, tells one server from another. 0 where the server would not say.

    What follows is how the connection reaches it, and no part of its identity. `direct`: nobody is in between, so the
    end of the connection's socket is the backend's end. `pooled`: a pooler is, which may lend the backend to others
    when this session is over; then this was the session's application_name. `fixed`: nobody can take it over, since it
    is encrypted, goes through a pooler, or its worker hands nothing over.
    """

    pid: Int4
    start_us: Int8 = 0
    boot_us: Int8 = 0
    direct: bool = False
    pooled: str | None = None
    fixed: bool = False

    @property
    def identity(self) -> tuple[int, int, int]:
        """What tells it from every other backend."""
        return (self.pid, self.start_us, self.boot_us)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Backend) and self.identity == other.identity

    def __ne__(self, other: object) -> bool:  # else it is msgspec's, which compares objects
        return not self == other

    def __hash__(self) -> int:
        return hash(self.identity)


class PoolSpec(Struct, frozen=True):
    """What a session asks of its pool; the first session that names a pool sets its limit.

    `database` is given to an automatic broker, which serves all of a server: by one name there is a pool for each.
    A pool's processes of another `group` are another pool, by another name: they share a server, and the broker's cap.
    `end_overdue`: what is checked out for longer than `max_checkout_ms` is to be ended, not only reported.
    """

    name: str
    max_conn: int
    expiration_ms: int
    max_checkout_ms: int = 0
    server: str = ""
    max_waiting: int = 0
    group: str = ""
    end_overdue: bool = False
    database: str = ""

    def is_pool_of(self, other: PoolSpec) -> bool:
        """Say whether both are of one pool."""
        return (self.name, self.database) == (other.name, other.database)


class Phase(StrEnum):
    """Where a lease is inside its worker."""

    CONNECTING = "connecting"
    IN_USE = "in_use"
    IDLE = "idle"
    CLOSING = "closing"


class LeaseReport(Struct, frozen=True):
    """One lease as its worker sees it; `age_ms` is the time in this phase.

    `stack` is where it was checked out, innermost first, if the pool has `debug_checkouts`. `moves`: how often it had
    moved in a lane when it came (`board.py`).
    """

    token: Token
    phase: Phase
    age_ms: int
    thread: str = ""
    backend: Backend | None = None
    stack: list[str] = []
    moves: int = 0


class Holder(Struct, frozen=True):
    """Who holds connections, for the text of an error; `site` is where the longest was checked out, if known."""

    label: str
    count: int
    longest_ms: int
    site: str = ""


class Histogram(Struct, frozen=True):
    """Counts by bucket (`buckets.py`), and the sum of what was counted."""

    counts: Annotated[list[Count], msgspec.Meta(min_length=BUCKETS, max_length=BUCKETS)]
    total_us: Count


class Timings(Struct, frozen=True):
    """How long things took in one session since its registration number `serial`: absolute, so that none is lost."""

    serial: int
    created: Histogram
    waited: Histogram
    used: Histogram


# --- worker -> broker


class Acquire(Struct, frozen=True, tag="acquire"):
    """Ask for a lease; `wait_ms` 0 means: tell me at once when none can be had.

    `lane_place`: in the lane, where its thread waits and a connection that is open can be sent to it; -1: nowhere.
    Repeated with another place it has moved there.
    """

    request: int
    wait_ms: int
    lane_place: int = -1


class Hello(Struct, frozen=True, tag="hello"):
    """Register this session, or register it again; `leases` are those it still holds. `pid_namespace`: see
    `discovery/pid_namespace.py`.

    `nonce` comes back in the WELCOME that answers this. `first` is the first of those requests that wait: where a slot
    is free it need not be asked for once more.
    """

    version: int
    pid: int
    host: str
    title: str
    pool: PoolSpec
    leases: list[LeaseReport] = []
    newest_grant: Token = NO_TOKEN
    pid_namespace: str = ""
    nonce: int = 0
    first: Acquire | None = None


class Withdraw(Struct, frozen=True, tag="withdraw"):
    """Withdraw a request; a grant already on its way comes back as a RELEASE."""

    request: int


class Confirm(Struct, frozen=True, tag="confirm"):
    """The lease's connection is open, on this backend."""

    token: Token
    backend: Backend


class Renew(Struct, frozen=True, tag="renew"):
    """All leases and pending requests of this session (heartbeat, or the answer to RECALL number `answers`).

    `newest_grant` is the newest grant that has arrived: a lease above it is still on its way, one at or below it that
    is not listed is not held any more. `gone` are leases given back whose backends were seen to end, until an ACK has
    come; `unproven` is what was said of the others: of one whose connection had been passed nothing else would tell.
    `times` comes when it has changed. `unsure`: a thread may have just received a connection that is not listed yet.
    """

    leases: list[LeaseReport]
    newest_grant: Token
    answers: int = 0
    pending: list[int] = []
    gone: list[Token] = []
    times: Timings | None = None
    unproven: list[Release] = []
    unsure: bool = False


class ReleaseReason(StrEnum):
    """Why a worker gave a lease back."""

    TAKEN = "taken"  # an idle one, asked for by RECALL's `take`
    RETURN_DUE = "return due"  # a checkin, asked for by RECALL's `returns_due`
    EXPIRED = "expired"  # idle longer than `expiration`
    RETIRED = "retired"  # older than `max_lifetime`
    BROKEN = "broken"  # the connection is dead, or a callback rejected it
    FAILED = "failed"  # it could not be opened
    UNUSED = "unused"  # the grant came too late
    STALE = "stale"  # of an older generation
    SHARED = "shared"  # a checkin, while connections move past the broker
    CLOSED = "closed"  # the caller, `disable_pooling` or `release_all` closed it


class Release(Struct, frozen=True, tag="release"):
    """Give a lease back. `gone` is False when the worker could not see its backend's end: the broker must look.

    `closed`: the other side has closed the connection, but whether that is the server itself was never found out.
    `error` is what kept the connection from being opened, to be shown; `code` the server's SQLSTATE, where it has
    refused and the worker could learn that; `unreachable`: no server has answered.
    """

    token: Token
    gone: bool
    reason: ReleaseReason
    backend: Backend | None = None
    error: str = ""
    code: str = ""
    unreachable: bool = False
    closed: bool = False


class FailoverSign(Struct, frozen=True, tag="failover_sign"):
    """A connection of `generation` tells that the server fails over: by SQLSTATE, or (`code` "") since it is dead."""

    generation: int
    code: str


class CancelQuery(Struct, frozen=True, tag="cancel_query"):
    """Cancel what the lease's connection is executing: its worker, which did not open it, has no key for that.

    `trial`: nobody uses it yet, and its worker gives it only once the cancel has hit (see PASS).
    """

    token: Token
    trial: bool = False


class Bye(Struct, frozen=True, tag="bye"):
    """The session ends in good order; a grant above `newest_grant`, the newest that has arrived, is not used any
    more.
    """

    newest_grant: Token = NO_TOKEN
    times: Timings | None = None


# --- broker -> worker


class Welcome(Struct, frozen=True, tag="welcome"):
    """The session is registered; `max_conn` and `expiration_ms` are what the broker enforces for it.

    `tag` is the application_name by which the server shows the pool's connections as this broker's. `desk` is the
    path of the desk's socket, empty where there is none. `handover`: connections may be handed over there. `served`:
    this request, which came with a HELLO, is answered next, as an ACQUIRE is; 0: none is.
    """

    version: int
    epoch: int
    max_conn: int
    expiration_ms: int
    ttl_ms: int
    revoked: list[Token] = []
    tag: str = ""
    desk: str = ""
    generation: int = 0
    handover: bool = False
    nonce: int = 0
    served: int = 0


class Reject(Struct, frozen=True, tag="reject"):
    """The session is not registered: say HELLO (`fatal` False), or give up (`fatal` True, with the reason)."""

    reason: str
    fatal: bool = False


class Grant(Struct, frozen=True, tag="grant"):
    """A lease: the worker may now open one connection, within the TTL.

    `waited_ms`: for so long the request had been in the queue. So one who knows when he asked knows how old this is.
    `direct`: nobody is between the pool's workers and the server, as far as the broker knows: of a connect that fails,
    the socket's end is the backend's. `code`: with this SQLSTATE the server refuses everybody just now; one that is
    refused need not connect once more to learn why.
    """

    request: int
    token: Token
    serial: int
    returns_due: int = 0
    waited_ms: int = 0
    direct: bool = False
    code: str = ""


class DenyReason(StrEnum):
    """Why a request was refused."""

    EXHAUSTED = "exhausted"
    TIMEOUT = "timeout"
    CROWDED = "crowded"  # max_waiting others wait already
    FAILING = "failing"  # connections cannot be opened just now
    REFUSED = "refused"  # this session's cannot
    WAITING = "waiting"  # the broker cannot grant anything yet
    DRAINING = "draining"  # the broker is about to end
    PAUSED = "paused"  # by an operator
    UNSUITABLE = "unsuitable"  # what is connected to does not do what the pool needs


class Deny(Struct, frozen=True, tag="deny"):
    """No lease; `holders` hold most of the limit that is reached: the pool's, or (`capped`) that over all pools.

    `error` is the server's, when connections cannot be opened; the next try is in `retry_ms`. Or it is why the broker
    grants nothing yet, or what makes the server unsuitable. `group`: the limit is its own. `reserved`: so many of the
    limit over all pools are for other groups.
    """

    request: int
    reason: DenyReason
    max_conn: int
    holders: list[Holder] = []
    capped: bool = False
    error: str = ""
    retry_ms: int = 0
    group: str = ""
    reserved: int = 0


class Recall(Struct, frozen=True, tag="recall"):
    """Give back `take` idle leases now and the next `returns_due` checkins; with `expired`, also all that idled too
    long.

    A serial at or below the last one seen is a double: it is dropped. Unless `answer` is False, RENEW is the answer.
    """

    serial: int
    take: int
    returns_due: int
    expired: bool = False
    answer: bool = True


class Ack(Struct, frozen=True, tag="ack"):
    """A RENEW arrived; `revoked` leases are not the session's any more: discard them.

    `gone` are those of RENEW's that need not be told again, `generation` is the newest, `max_conn` the limit by now.
    """

    revoked: list[Token] = []
    gone: list[Token] = []
    generation: int = 0
    max_conn: int = 0


class Gone(Struct, frozen=True, tag="gone"):
    """The broker has seen these connections end: their leases are over."""

    tokens: list[Token]


class ReportNow(Struct, frozen=True, tag="report_now"):
    """Send a heartbeat now: somebody asks who holds what."""


class Stale(Struct, frozen=True, tag="stale"):
    """Replace every connection that was opened under an older generation."""

    generation: int


ToBroker = Hello | Acquire | Withdraw | Confirm | Renew | Release | FailoverSign | CancelQuery | Bye
ToWorker = Welcome | Reject | Grant | Deny | Recall | Ack | Gone | ReportNow | Stale
