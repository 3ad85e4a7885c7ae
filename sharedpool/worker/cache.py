"""One worker's leases: idle, in use, owed to others; and its threads that wait for one. Pure: no I/O, no clock.

The caller holds the pool's lock around every method, and afterwards, without the lock, carries out what they return:
leases to close, tickets to wake. Messages for the broker are appended to `out` under that same lock, so that they
leave in the order in which the state changed.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sharedpool.errors import SharedPoolError
from sharedpool.wire.messages import (
    Acquire,
    Backend,
    Cancel,
    Confirm,
    Deny,
    Grant,
    LeaseReport,
    Phase,
    Recall,
    Release,
    ReleaseReason,
    Renew,
    ToBroker,
    Token,
)

_LONGEST_WAIT_MS = 2**52
HANDING_OUT_LIMIT_S = 30.0
CLOSING_LIMIT_S = 3.0


class Lease:
    """A slot this process holds, and its connection (opaque here).

    `conn` is set while it lies idle, is handed on or is being closed; once out, only `ref` knows it, so that a
    connection that its user has dropped can be seen. `since` is when its phase began, `idle_s` how long it had lain
    idle before. `ticket` is the one it was given to, while that thread alone knows of it.
    """

    __slots__ = (
        "backend", "conn", "idle_s", "key", "missed", "phase", "ref", "retire_at", "since", "thread", "ticket", "token",
    )  # fmt: skip

    def __init__(self, token: Token, ticket: Ticket | None, now: float) -> None:
        self.token = token
        self.phase = Phase.CONNECTING
        self.since = now
        self.conn: object | None = None
        self.ref: weakref.ref[object] | None = None
        self.idle_s = 0.0
        self.backend: Backend | None = None
        self.retire_at = float("inf")
        self.missed: float | None = None  # `since`, when it looked lost at the last heartbeat
        self.thread = 0  # identifier of the thread that has it
        self.key: object = None
        self.ticket = None if ticket is None else weakref.ref(ticket)


class Ticket:
    """One thread's wait for a lease. Its end is a `lease`, a `denial` or an `error`; then `wake` is called, once."""

    __slots__ = ("__weakref__", "denial", "error", "lease", "request", "since", "wake")

    def __init__(self, wake: Callable[[], None], now: float) -> None:
        self.wake = wake
        self.since = now
        self.request = 0
        self.lease: Lease | None = None
        self.denial: Deny | None = None
        self.error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Closing:
    """A lease whose connection is to be closed, and why."""

    lease: Lease
    reason: ReleaseReason


class Cache:
    """All leases and tickets of one pool in one process."""

    def __init__(self, expiration_s: float) -> None:
        self.expiration_s = expiration_s
        self.keep_idle = True
        self.hand_on = True  # give a checked-in connection to a waiting thread
        self.out: deque[ToBroker] = deque()
        self.leases: dict[Token, Lease] = {}
        self.idle: deque[Lease] = deque()  # the most recently used at the right
        self.waiting: OrderedDict[int, Ticket] = OrderedDict()
        self.owed = 0
        self._waits_ms: dict[int, int] = {}
        self._first_retires_at = float("inf")  # of the idle ones, at the earliest
        self._requests = 0
        self._newest = 0  # serial of the newest word on `owed`
        self._seen = 0  # serial of the newest grant

    # --- checkout

    def take(self, now: float) -> Lease | None:
        """Hand out the most recently used idle lease, or None."""
        if not self.idle:
            return None
        lease = self.idle.pop()
        lease.phase = Phase.IN_USE
        lease.idle_s = now - lease.since
        lease.since = now
        lease.ticket = None  # an earlier one, whose end means nothing any more
        return lease

    def want(self, ticket: Ticket, wait_s: float) -> None:
        """Queue a ticket, here and at the broker; `wait_s` 0 asks for an answer at once."""
        self._requests += 1
        ticket.request = self._requests
        wait_ms = 0 if wait_s <= 0 else int(min(max(wait_s * 1000, 1), _LONGEST_WAIT_MS))
        self.waiting[ticket.request] = ticket
        self._waits_ms[ticket.request] = wait_ms
        self.out.append(Acquire(ticket.request, wait_ms))

    def _settle(self, ticket: Ticket) -> None:
        del self.waiting[ticket.request]
        del self._waits_ms[ticket.request]

    def give_up(self, ticket: Ticket, now: float) -> Ticket | None:
        """Withdraw a ticket whose thread will not use it. A lease it was given goes to the next ticket (returned)."""
        if self.waiting.get(ticket.request) is ticket:
            self._settle(ticket)
            self.out.append(Cancel(ticket.request))
            return None
        lease, ticket.lease = ticket.lease, None
        if lease is None or not self._holds(lease) or lease.phase is not Phase.CONNECTING:
            return None
        return self._pass_on(lease, now)

    def _pass_on(self, lease: Lease, now: float) -> Ticket | None:
        """Give a lease to the first waiting ticket, which need not ask the broker any more; else keep or release it."""
        if not self.waiting:
            if lease.conn is not None:
                self._lay_idle(lease, now)
            else:
                self.closed(lease, ReleaseReason.UNUSED, gone=True)
            return None
        _, ticket = next(iter(self.waiting.items()))
        self._settle(ticket)
        self.out.append(Cancel(ticket.request))
        self._assign(lease, ticket, now)
        return ticket

    def _assign(self, lease: Lease, ticket: Ticket, now: float) -> None:
        lease.phase, lease.since, lease.ticket = Phase.CONNECTING, now, weakref.ref(ticket)
        ticket.lease = lease

    def opened(self, lease: Lease, backend: Backend, retire_at: float, conn: object, now: float) -> None:
        """Note that a lease's connection is open.

        Raise `SharedPoolError` when the broker has taken the lease away meanwhile: the connection must be closed.
        """
        if not self._holds(lease):
            raise SharedPoolError(f"the broker has taken lease {lease.token} away while it was being connected")
        lease.backend, lease.retire_at, lease.ref = backend, retire_at, weakref.ref(conn, _collected)
        lease.phase, lease.since = Phase.IN_USE, now
        self.out.append(Confirm(lease.token, backend))

    # --- checkin

    def checkin(self, lease: Lease, conn: object, now: float, verdict: ReleaseReason | None) -> Closing | Ticket | None:
        """Take a connection back: close it (`verdict` says why, or it is owed or too old), hand it on, or cache it."""
        if not self._holds(lease):
            verdict = ReleaseReason.BROKEN  # taken away by the broker, or given up for lost
        if verdict is None:
            if now >= lease.retire_at:
                verdict = ReleaseReason.RETIRED
            elif self.owed:
                self.owed -= 1
                verdict = ReleaseReason.OWED
            elif not self.keep_idle and not (self.hand_on and self.waiting):
                verdict = ReleaseReason.CLOSED
        lease.conn = conn
        if verdict is not None:
            return self._closing(lease, verdict, now)
        if self.waiting:
            return self._pass_on(lease, now)
        self._lay_idle(lease, now)
        return None

    def _holds(self, lease: Lease) -> bool:
        return self.leases.get(lease.token) is lease

    def _lay_idle(self, lease: Lease, now: float) -> None:
        lease.phase, lease.since = Phase.IDLE, now
        self.idle.append(lease)
        self._own_up(now)
        if lease.retire_at < self._first_retires_at:
            self._first_retires_at = lease.retire_at

    def _own_up(self, now: float) -> None:
        """Tell the broker at once of what lies idle while it counts on our next checkin."""
        if self.owed and self.idle:
            self.out.append(self.renewal(now, {}))

    def _closing(self, lease: Lease, reason: ReleaseReason, now: float) -> Closing:
        lease.phase, lease.since = Phase.CLOSING, now
        return Closing(lease, reason)

    def close(self, lease: Lease, conn: object, reason: ReleaseReason, now: float) -> Closing:
        """Take a lease out of use for good, whatever it was doing."""
        lease.conn = conn
        return self._closing(lease, reason, now)

    def closed(self, lease: Lease, reason: ReleaseReason, *, gone: bool) -> None:
        """Give a lease back: its connection is closed. Does nothing the second time."""
        if self._holds(lease):
            del self.leases[lease.token]
            lease.conn = None
            self.out.append(Release(lease.token, gone, reason, lease.backend))

    def forget(self, token: Token) -> Lease | None:
        """Drop a lease that the broker has taken away."""
        lease = self.leases.pop(token, None)
        if lease is not None and lease in self.idle:
            self.idle.remove(lease)
        return lease

    # --- scavenging

    def expire(self, now: float) -> list[Closing]:
        """Take out what has been idle longer than `expiration_s` or lived longer than its lifetime."""
        closing = []
        while self.idle and now - self.idle[0].since >= self.expiration_s:
            closing.append(self._closing(self.idle.popleft(), ReleaseReason.EXPIRED, now))
        if now >= self._first_retires_at:
            for lease in [lease for lease in self.idle if now >= lease.retire_at]:
                self.idle.remove(lease)
                closing.append(self._closing(lease, ReleaseReason.RETIRED, now))
            self._first_retires_at = min((lease.retire_at for lease in self.idle), default=float("inf"))
        return closing

    def drain(self, now: float) -> list[Closing]:
        """Take out everything idle."""
        closing = [self._closing(lease, ReleaseReason.CLOSED, now) for lease in self.idle]
        self.idle.clear()
        return closing

    def lost(self, now: float) -> list[Lease]:
        """Return leases nobody can bring back: their thread was interrupted, or their connection was collected.

        Each must look so at two heartbeats: a finalizer, or the thread that reclaims it, may be bringing it back.
        """
        idle = set(self.idle)
        found = []
        for lease in self.leases.values():
            missing = self._ownerless(lease, idle, now)
            if missing and lease.missed == lease.since:
                found.append(lease)
            lease.missed = lease.since if missing else None
        return found

    def unfinished(self, now: float) -> list[Closing]:
        """Return closes that were begun long ago: whoever was at them was interrupted."""
        return [
            Closing(lease, ReleaseReason.CLOSED)
            for lease in self.leases.values()
            if lease.phase is Phase.CLOSING and lease.conn is not None and now - lease.since >= CLOSING_LIMIT_S
        ]

    def _ownerless(self, lease: Lease, idle: set[Lease], now: float) -> bool:
        nobody_waits = lease.ticket is None or lease.ticket() is None
        if lease.phase is Phase.CONNECTING:
            return lease.ticket is not None and nobody_waits
        if lease.phase is Phase.IN_USE and lease.conn is None:
            return lease.ref is not None and lease.ref() is None
        # Between the deque and its user an interrupt has a few microseconds; no thread is that slow.
        stuck = now - lease.since > HANDING_OUT_LIMIT_S
        if lease.phase is Phase.IN_USE:
            return nobody_waits and stuck
        return lease.phase is Phase.IDLE and lease not in idle and stuck

    # --- the broker's words

    def granted(self, grant: Grant, now: float) -> Ticket | None:
        """Take in a lease: for the ticket that asked, else the next one (returned, to be woken), else release it."""
        if grant.serial > self._newest:
            self._newest, self.owed = grant.serial, grant.owed
            self._own_up(now)
        if grant.token in self.leases or grant.token.serial <= self._seen:
            return None  # a double
        self._seen = grant.token.serial
        lease = self.leases[grant.token] = Lease(grant.token, None, now)
        ticket = self.waiting.get(grant.request)
        if ticket is None:
            return self._pass_on(lease, now)
        self._settle(ticket)
        self._assign(lease, ticket, now)
        return ticket

    def denied(self, deny: Deny) -> Ticket | None:
        """Take in a refusal; return the ticket to wake."""
        ticket = self.waiting.get(deny.request)
        if ticket is not None:
            self._settle(ticket)
            ticket.denial = deny
        return ticket

    def recalled(self, recall: Recall, now: float, threads: Mapping[int, str]) -> list[Closing]:
        """Take in a recall: reserve idle leases to be closed, longest idle first, and answer with what is held."""
        if recall.serial <= self._newest:
            return []
        self._newest, self.owed = recall.serial, recall.owed
        closing = self.expire(now) if recall.expired else []
        for _ in range(min(recall.take, len(self.idle))):
            closing.append(self._closing(self.idle.popleft(), ReleaseReason.TAKEN, now))
        if recall.answer:
            self.out.append(self.renewal(now, threads, answers=recall.serial))
        return closing

    def renewal(self, now: float, threads: Mapping[int, str], *, answers: int = 0) -> Renew:
        """Return the heartbeat: all that is held and asked for."""
        return Renew(self.reports(now, threads), self._seen, answers, list(self.waiting))

    def reports(self, now: float, threads: Mapping[int, str]) -> list[LeaseReport]:
        """Return every lease as the broker should see it; `threads` names threads by identifier."""
        return [
            LeaseReport(
                lease.token,
                lease.phase,
                max(0, int((now - lease.since) * 1000)),
                threads.get(lease.thread, "") if lease.phase is Phase.IN_USE else "",
                lease.backend,
            )
            for lease in self.leases.values()
        ]

    def register(self, now: float, threads: Mapping[int, str]) -> tuple[list[LeaseReport], int]:
        """Start over with a broker: return what a HELLO says is held, and the newest serial seen.

        That replaces whatever was not sent, but for leases given back: those are said to be closing, and their RELEASE
        follows, since only that tells whether the backend is gone. Every waiting ticket is asked for again (one that is
        in the broker's queue keeps its place), and a heartbeat rids the queue of those that were withdrawn.
        """
        unsent = [message for message in self.out if isinstance(message, Release)]
        self.out.clear()
        self.owed = self._newest = 0
        self.out.extend(unsent)
        self.out.extend(Acquire(request, wait_ms) for request, wait_ms in self._waits_ms.items())
        self.out.append(self.renewal(now, threads))
        closing = [
            LeaseReport(release.token, Phase.CLOSING, 0, "", release.backend)
            for release in unsent
            if release.backend is not None or not release.gone  # else there was never a connection
        ]
        return self.reports(now, threads) + closing, self._seen

    def new_epoch(self) -> None:
        """Forget serials of a broker that is gone."""
        self._seen = 0

    def fail(self, error: Exception) -> list[Ticket]:
        """End every wait with `error`; return the tickets to wake."""
        tickets = list(self.waiting.values())
        for ticket in tickets:
            self._settle(ticket)
            ticket.error = error
        return tickets


def _collected(ref: object) -> None:
    """Do nothing.

    The garbage collector clears a reference that has a callback before it runs finalizers (from Python 3.14 on others
    only afterwards): in a finalizer a dead `Lease.ref` tells that the connection is being collected too.
    """
