"""The protocol between a worker's pool and the broker.

A pool in one process is a *session*. The sessions of a process share a ZeroMQ DEALER, which talks
to the broker's ROUTER (`channel.py`). Every message is one frame: msgpack of one tagged array
below.

    worker                                       broker
      HELLO(version, pool, leases held)   ─────►            with the first ACQUIRE, if there is one
                                          ◄─────  WELCOME(epoch, limit, ttl)  or  REJECT(reason)
      ACQUIRE(request, wait)              ─────►
                                          ◄─────  GRANT(request, token)  or  DENY(request, holders)
                                          ◄┄┄┄┄┄  MOVED(request, token)       instead, in the lane
      [connects]  DEPOSIT(token) + socket ═════►                              at the desk
                  CONFIRM(token, backend) ─────►
                                          ◄─────  RECALL(take, returns_due)   others wait
      RENEW(leases, answers)              ─────►                              what is idle now
      RELEASE(token)                      ─────►                              a slot is given back
      RENEW(leases, times)                ─────►                              heartbeat, 3 in a TTL
                                          ◄─────  ACK(revoked)
      FAILOVER_SIGN(code)                 ─────►                              a failover, perhaps
                                          ◄─────  STALE(generation)           drop what is older
                                          ◄─────  GONE(tokens)                connections have ended
                                          ◄─────  REPORT_NOW                  answered by a RENEW
      BYE                                 ─────►

Rules that make repeated, late and lost messages harmless:

- Durations cross the wire, in milliseconds. Clocks never do.
- A request carries the worker's own number. Repeated, it gets the same answer. A lease is named by
  a token that is never used twice.
- RECALL's `returns_due` is an absolute number of checkins to be given back instead of cached. Its
  `serial` tells which RECALL is the newest.
- From a HELLO until its WELCOME a worker ignores everything else. A GRANT of a former broker, or of
  this one before it knew what is held, counts as lost and is sent again.

Messages at the desk (═) are in `desk.py`, those of the command line in `reports.py`.
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import field

from sharedpool.wire.values import (
    NO_TOKEN,
    Backend,
    Holder,
    LeaseReport,
    PoolSpec,
    Struct,
    Timings,
    Token,
)

PROTOCOL_VERSION = 9

# PostgreSQL ends a backend whose client has not logged in by then (authentication_timeout, 60 s by
# default).
START_UP_LIMIT_S = 65.0


# --- worker -> broker


class Acquire(Struct, frozen=True, tag="acquire"):
    """Ask for a lease."""

    request: int
    # With 0 the broker answers at once if none is free.
    wait_ms: int
    # The place in the lane where the thread waits and an open connection can be sent; -1 for none.
    # A repetition with another place means that the thread has moved there.
    lane_place: int = -1


class Hello(Struct, frozen=True, tag="hello"):
    """Register a session, or register it again."""

    version: int
    pid: int
    host: str
    title: str
    pool: PoolSpec
    # The leases that the session still holds.
    leases: list[LeaseReport] = field(default_factory=list)
    newest_grant: Token = NO_TOKEN
    # See `discovery/pid_namespace.py`.
    pid_namespace: str = ""
    # Comes back in the WELCOME that answers this.
    nonce: int = 0
    # The first waiting request: if a slot is free, it is answered without being asked again.
    first: Acquire | None = None


class Withdraw(Struct, frozen=True, tag="withdraw"):
    """Withdraw a request. A grant that is already on its way comes back as a RELEASE."""

    request: int


class Confirm(Struct, frozen=True, tag="confirm"):
    """Report that the lease's connection is open, on this backend."""

    token: Token
    backend: Backend


class Renew(Struct, frozen=True, tag="renew"):
    """Report all leases and requests of a session: a heartbeat, or the answer to a RECALL."""

    leases: list[LeaseReport]
    # The newest grant that has arrived. A lease above it is on its way. A lease at or below it that
    # is not listed is not held any more.
    newest_grant: Token
    # The serial of the RECALL that this answers, or 0.
    answers: int = 0
    pending: list[int] = field(default_factory=list)
    # Leases given back whose backends were seen to end, until an ACK lists them.
    gone: list[Token] = field(default_factory=list)
    # Set when they have changed.
    times: Timings | None = None
    # The other releases, until an ACK lists them. If the connection had been passed on, nothing
    # else would tell the broker that it is held no more.
    unproven: list[Release] = field(default_factory=list)
    # A thread may have just received a connection that is not listed.
    unsure: bool = False


class ReleaseReason(StrEnum):
    """Why a worker gave a lease back."""

    TAKEN = "taken"  # it was idle, and RECALL's `take` asked for it
    RETURN_DUE = "return due"  # checked in, and RECALL's `returns_due` asked for it
    EXPIRED = "expired"  # idle for longer than `expiration`
    RETIRED = "retired"  # older than `max_lifetime`
    BROKEN = "broken"  # the connection is dead, or a callback rejected it
    FAILED = "failed"  # the connection could not be opened
    UNUSED = "unused"  # the grant came too late
    STALE = "stale"  # of an older generation
    SHARED = "shared"  # checked in while connections move past the broker
    CLOSED = "closed"  # by the caller, `disable_pooling` or `release_all`


class Release(Struct, frozen=True, tag="release"):
    """Give a lease back."""

    token: Token
    # The worker has seen the backend's end. If not, the broker must find it out.
    gone: bool
    reason: ReleaseReason
    backend: Backend | None = None
    # Why the connection could not be opened, to be shown.
    error: str = ""
    # The SQLSTATE of the server's refusal, if the worker could learn it.
    code: str = ""
    # No server has answered.
    unreachable: bool = False
    # The other side has closed the connection, but it may have been a proxy.
    peer_closed: bool = False


class FailoverSign(Struct, frozen=True, tag="failover_sign"):
    """Report that a connection of `generation` is dead, or met an SQLSTATE of a failover."""

    generation: int
    # The SQLSTATE, or "" for a dead connection.
    code: str


class CancelQuery(Struct, frozen=True, tag="cancel_query"):
    """Cancel the query on a lease's connection. Its worker has not opened it and lacks the key."""

    token: Token
    # A self-test: the connection has no user before the cancel was seen to work (see `Passed`).
    trial: bool = False


class Bye(Struct, frozen=True, tag="bye"):
    """End the session in good order."""

    # The newest grant that has arrived. One above it will not be used.
    newest_grant: Token = NO_TOKEN
    times: Timings | None = None


# --- broker -> worker


class Welcome(Struct, frozen=True, tag="welcome"):
    """Confirm that the session is registered."""

    version: int
    epoch: int
    # What the broker enforces for the session.
    max_conn: int
    expiration_ms: int
    ttl_ms: int
    revoked: list[Token] = field(default_factory=list)
    # The application_name by which the server shows the pool's connections as this broker's.
    tag: str = ""
    # The path of the desk's socket, empty if there is none.
    desk: str = ""
    generation: int = 0
    # Connections may be handed over at the desk.
    handover: bool = False
    nonce: int = 0
    # The HELLO's `first` request, if it is answered next, as an ACQUIRE would be; else 0.
    served: int = 0


class Reject(Struct, frozen=True, tag="reject"):
    """Refuse a session that is not registered."""

    reason: str
    # The worker must give up. Else it should send HELLO.
    fatal: bool = False


class Grant(Struct, frozen=True, tag="grant"):
    """Grant a lease: the worker may open one connection, within the TTL."""

    request: int
    token: Token
    serial: int
    returns_due: int = 0
    # How long the request was in the queue: with the time of the request it gives the grant's age.
    waited_ms: int = 0
    # As far as the broker knows, no proxy is between the pool's workers and the server: the end of
    # a failed connect's socket is the backend's end.
    direct: bool = False
    # The SQLSTATE with which the server refuses every connect at present. A worker that is refused
    # need not connect once more to learn why.
    code: str = ""


class DenyReason(StrEnum):
    """Why a request was refused."""

    EXHAUSTED = "exhausted"
    TIMEOUT = "timeout"
    CROWDED = "crowded"  # max_waiting others wait already
    FAILING = "failing"  # connections cannot be opened at present
    REFUSED = "refused"  # the server refuses this session's connections
    WAITING = "waiting"  # the broker cannot grant anything yet
    DRAINING = "draining"  # the broker is about to end
    PAUSED = "paused"  # by an operator
    UNSUITABLE = "unsuitable"  # the server does not do what the pool needs


class Deny(Struct, frozen=True, tag="deny"):
    """Refuse a request."""

    request: int
    reason: DenyReason
    # The limit that is reached.
    max_conn: int
    # The processes that hold most of it.
    holders: list[Holder] = field(default_factory=list)
    # It is the limit over all pools.
    capped: bool = False
    # The server's error, why the broker grants nothing yet, or what makes the server unsuitable.
    error: str = ""
    # Time until the next attempt to connect.
    retry_ms: int = 0
    # It is this group's limit.
    group: str = ""
    # So many of the limit over all pools are reserved for other groups.
    reserved: int = 0


class Recall(Struct, frozen=True, tag="recall"):
    """Ask for leases. One at or below the newest serial seen is a repetition and is dropped."""

    serial: int
    # Idle leases to be given back now.
    take: int
    # The next checkins to be given back.
    returns_due: int
    # Also give back what has been idle for too long.
    expired: bool = False
    # Answer with a RENEW.
    answer: bool = True


class Ack(Struct, frozen=True, tag="ack"):
    """Confirm a RENEW."""

    # Leases that are not the session's any more: drop them.
    revoked: list[Token] = field(default_factory=list)
    # The releases in the RENEW that need not be repeated.
    gone: list[Token] = field(default_factory=list)
    # The newest generation, and the present limit.
    generation: int = 0
    max_conn: int = 0


class Gone(Struct, frozen=True, tag="gone"):
    """Report that these leases are over: the broker has seen their connections end."""

    tokens: list[Token]


class ReportNow(Struct, frozen=True, tag="report_now"):
    """Ask for a RENEW now, because an operator wants to see what is held."""


class Stale(Struct, frozen=True, tag="stale"):
    """Have every connection replaced that was opened under an older generation."""

    generation: int


ToBroker = Hello | Acquire | Withdraw | Confirm | Renew | Release | FailoverSign | CancelQuery | Bye
ToWorker = Welcome | Reject | Grant | Deny | Recall | Ack | Gone | ReportNow | Stale
