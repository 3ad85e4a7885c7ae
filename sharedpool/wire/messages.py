"""The protocol between a worker's pool and the broker.

One ZeroMQ DEALER per pool and process (a *session*, named by its random routing id) talks to the broker's ROUTER.
Every message is one frame: msgpack of one tagged array below. Durations cross the wire, in milliseconds; clocks never
do. Everything is idempotent: a request carries the client's own number and is answered the same way when it is
repeated, a lease is named by a token that is never used twice.

    worker                                             broker
      HELLO(version, pool, leases still held)   ─────►
                                                ◄─────  WELCOME(epoch, limit, ttl)   or REJECT(reason)
      ACQUIRE(request, wait)                    ─────►
                                                ◄─────  GRANT(request, token)        or DENY(request, who holds)
      [connects]  CONFIRM(token, backend)       ─────►
                                                ◄─────  RECALL(take, owed)           somebody else waits
      RENEW(leases, answers)  RELEASE(token)    ─────►                               what is idle now, what is given
      RENEW(leases)                             ─────►                               heartbeat, every third of the TTL
                                                ◄─────  ACK(revoked)
      BYE                                       ─────►

`take` asks for idle leases now. `owed` is how many of the next checkins are to be given back instead of cached: an
absolute number, so that a repeated or late RECALL does no harm (`serial` tells which is the newest).
A command-line client sends STATUS without a HELLO and gets a REPORT.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import msgspec

PROTOCOL_VERSION = 1


class Token(NamedTuple):
    """A lease's name: the broker's epoch and a serial that grows forever."""

    epoch: int
    serial: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.serial}"


class Struct(msgspec.Struct, frozen=True, array_like=True):
    """Parent of everything on the wire."""


class Backend(Struct, frozen=True):
    """A PostgreSQL server process: a pid alone may be used again, a pid and its start time may not.

    `boot_us`, when its postmaster started, tells one server from another. 0 where the server would not say.
    """

    pid: int
    start_us: int = 0
    boot_us: int = 0


class PoolSpec(Struct, frozen=True):
    """What a session asks of its pool; the first session that names a pool sets its limit."""

    name: str
    max_conn: int
    expiration_ms: int
    max_checkout_ms: int = 0
    server: str = ""


class Phase(StrEnum):
    """Where a lease is inside its worker."""

    CONNECTING = "connecting"
    IN_USE = "in_use"
    IDLE = "idle"
    CLOSING = "closing"


class LeaseReport(Struct, frozen=True):
    """One lease as its worker sees it; `age_ms` is the time in this phase."""

    token: Token
    phase: Phase
    age_ms: int
    thread: str = ""
    backend: Backend | None = None


class Holder(Struct, frozen=True):
    """Who holds connections, for the text of an error."""

    label: str
    count: int
    longest_ms: int


# --- worker -> broker


class Hello(Struct, frozen=True, tag="hello"):
    """Register this session, or register it again; `leases` are those it still holds."""

    version: int
    pid: int
    host: str
    title: str
    pool: PoolSpec
    leases: list[LeaseReport] = []
    seen: int = 0


class Acquire(Struct, frozen=True, tag="acquire"):
    """Ask for a lease; `wait_ms` 0 means: tell me at once when none can be had."""

    request: int
    wait_ms: int


class Cancel(Struct, frozen=True, tag="cancel"):
    """Withdraw a request; a grant already on its way comes back as a RELEASE."""

    request: int


class Confirm(Struct, frozen=True, tag="confirm"):
    """The lease's connection is open, on this backend."""

    token: Token
    backend: Backend


class Renew(Struct, frozen=True, tag="renew"):
    """All leases and pending requests of this session (heartbeat, or the answer to RECALL number `answers`).

    `seen` is the highest serial of a grant that has arrived: a lease above it is still on its way, one at or below it
    that is not listed is not held any more.
    """

    leases: list[LeaseReport]
    seen: int
    answers: int = 0
    pending: list[int] = []


class ReleaseReason(StrEnum):
    """Why a worker gave a lease back."""

    TAKEN = "taken"  # an idle one, asked for by RECALL's `take`
    OWED = "owed"  # a checkin, asked for by RECALL's `owed`
    EXPIRED = "expired"  # idle longer than `expiration`
    RETIRED = "retired"  # older than `max_lifetime`
    BROKEN = "broken"  # the connection is dead, or a callback rejected it
    FAILED = "failed"  # it could not be opened
    UNUSED = "unused"  # the grant came too late
    CLOSED = "closed"  # the caller, `disable_pooling` or `release_all` closed it


class Release(Struct, frozen=True, tag="release"):
    """Give a lease back. `gone` is False when the worker could not see its backend's end: the broker must look."""

    token: Token
    gone: bool
    reason: ReleaseReason
    backend: Backend | None = None


class Bye(Struct, frozen=True, tag="bye"):
    """The session ends in good order."""


class Status(Struct, frozen=True, tag="status"):
    """Ask for a REPORT; needs no session."""

    version: int


# --- broker -> worker


class Welcome(Struct, frozen=True, tag="welcome"):
    """The session is registered; `max_conn` and `expiration_ms` are what the broker enforces for it."""

    version: int
    epoch: int
    max_conn: int
    expiration_ms: int
    ttl_ms: int
    revoked: list[Token] = []


class Reject(Struct, frozen=True, tag="reject"):
    """The session is not registered: say HELLO (`fatal` False), or give up (`fatal` True, with the reason)."""

    reason: str
    fatal: bool = False


class Grant(Struct, frozen=True, tag="grant"):
    """A lease: the worker may now open one connection."""

    request: int
    token: Token
    serial: int
    owed: int = 0


class DenyReason(StrEnum):
    """Why a request was refused."""

    EXHAUSTED = "exhausted"
    TIMEOUT = "timeout"


class Deny(Struct, frozen=True, tag="deny"):
    """No lease; `holders` hold most of the limit that is reached: the pool's, or (`capped`) that over all pools."""

    request: int
    reason: DenyReason
    max_conn: int
    holders: list[Holder] = []
    capped: bool = False


class Recall(Struct, frozen=True, tag="recall"):
    """Give back `take` idle leases now and the next `owed` checkins; with `expired`, also all that idled too long.

    A serial at or below the last one seen is a double: it is dropped. Unless `answer` is False, RENEW is the answer.
    """

    serial: int
    take: int
    owed: int
    expired: bool = False
    answer: bool = True


class Ack(Struct, frozen=True, tag="ack"):
    """A RENEW arrived; `revoked` leases are not the session's any more: discard them."""

    revoked: list[Token] = []


class SessionReport(Struct, frozen=True):
    """One session, for `sharedpool status`."""

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


class PoolReport(Struct, frozen=True):
    """One pool, for `sharedpool status`; the counters count since the broker started."""

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


class Report(Struct, frozen=True, tag="report"):
    """The broker's state, for `sharedpool status`."""

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


ToBroker = Hello | Acquire | Cancel | Confirm | Renew | Release | Bye | Status
ToWorker = Welcome | Reject | Grant | Deny | Recall | Ack | Report
