"""One process's leases of a pool, idle and in use, and its threads that wait for one.

Pure: no I/O, no clock. What the broker's messages do to a cache is in `broker_messages.py`.

The caller holds the pool's lock around every method but `take` and `given`, which change a deque or
dict in one step, and `note_retirement`, `set_terms`, `enter_lane` and `leave_lane`, which set times
and flags: a thread that misses one acts on it at its next checkin or heartbeat. Methods decide and
return what is to be done: leases to close, waiters to wake. The caller does that without the lock.
Messages for the broker are appended to `outbox` under the lock, in the order of the changes.

`idle` alone also changes without the lock: `Pool.get_conn` pops from its right end and
`Pool.put_conn` appends there. Each is one step of the interpreter, so no lease is lost, but:

1. A lease seen in `idle` may be gone a moment later: `remove_idle` returns False if another thread
   got it first.
2. A thread that appends to `idle` then looks again at whatever would have sent the lease elsewhere:
   `returns_due`, `waiting` and `next_scavenge_at`. A thread that changes one of these then looks at
   `idle`. Whichever comes second sees the other's change.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence

from sharedpool.errors import SharedPoolError
from sharedpool.wire.messages import Confirm, FailoverSign, Release, ReleaseReason, ToBroker
from sharedpool.wire.values import Backend, Phase, Token
from sharedpool.worker.core.lease import Closing, Lease, Waiter, collected
from sharedpool.worker.core.reporting import Reporter
from sharedpool.worker.core.time_slice import TimeSlice
from sharedpool.worker.core.timings import Timings
from sharedpool.worker.core.waiters import Waiters

# While connections move between processes, one may go to another thread here for this long.
_TO_THREADS_S = 0.01
_NOTHING_MOVES = (0,)  # stands for the board's byte where there is no lane


class Cache:
    """All leases and waiters of one pool in one process."""

    __slots__ = ("__dict__", "__weakref__", "hits")  # a slot, since every checkout changes it

    def __init__(self, expiration_s: float, *, pooling: bool = True, slice_s: float = 0.0) -> None:
        """`slice_s`: the time slice; 0: no connection is kept that others want."""
        self.expiration_s = expiration_s
        self.keep_idle = pooling  # cache connections at checkin
        self.shares_between_threads = pooling  # give a checked-in connection to a waiting thread
        self.outbox: deque[ToBroker] = deque()
        self.leases: dict[Token, Lease] = {}
        self.idle: deque[Lease] = deque()  # the most recently used at the right
        self.returns_due = 0  # checkins to be given back to the broker
        # Time from a grant to the start of the connect: later the broker may give the slot away.
        self.connects_within_s = float("inf")
        self.time_slice = TimeSlice(slice_s)
        self.waiters = Waiters(self.outbox, self.time_slice)
        self.waiting = self.waiters.waiting
        self.timings = Timings()
        self.reporter = Reporter(self.leases, self.waiters, self.timings)
        self.arriving = self.reporter.arriving  # also here, for the lane's fast path
        self.generation = 0
        self.next_scavenge_at = float("-inf")  # nothing has to be scavenged before
        self._first_retires_at = float("inf")
        self.hits = 0  # checkouts by the fast path
        # View of the board's first byte; not 0 while connections move past the broker.
        self.moving_flag: Sequence[int] | memoryview = _NOTHING_MOVES

    def leave_outbox(self) -> None:
        """Leave the outbox to the present link; messages from now on are for the next one."""
        self.outbox = self.waiters.outbox = deque()

    # --- checkout

    def take(self, now: float) -> Lease | None:
        """Take out the most recently used idle lease, or None. Needs no lock."""
        try:
            lease = self.idle.pop()
        except IndexError:
            return None
        lease.phase = Phase.IN_USE
        lease.idle_s = now - lease.since
        lease.since = now
        lease.waiter = None  # a former waiter's end means nothing for this use
        return lease

    def reconsider_idle(
        self, lease: Lease, now: float, conn: object = None
    ) -> Closing | Waiter | None:
        """Check in again a connection that the fast path laid idle but others want.

        `conn`: the connection, if the caller has taken it back already.
        """
        if conn is None and (conn := self.take_back(lease)) is None:
            return None  # another thread has it
        if self.timings.choose(now):
            lease.fast_checkin = False
        return self.checkin(lease, conn, now, None)

    def take_back(self, lease: Lease) -> object | None:
        """Take out an idle lease; return its connection, or None if another thread has it.

        Needs no lock.
        """
        if not self.remove_idle(lease):
            return None
        # In this order: an idle lease without a connection would be nobody's for ever.
        conn, lease.phase, lease.conn = lease.conn, Phase.IN_USE, None
        return conn

    def note_retirement(self, retire_at: float) -> None:
        """Record that a lease is to be closed at `retire_at`."""
        self._first_retires_at = min(self._first_retires_at, retire_at)
        self.next_scavenge_at = min(self.next_scavenge_at, retire_at)

    def remove_idle(self, lease: Lease) -> bool:
        """Take a lease out of the idle ones; return False if another thread has done so."""
        try:
            self.idle.remove(lease)
        except ValueError:
            return False
        return True

    def pop_oldest_idle(self) -> Lease | None:
        """Take out the lease that has been idle longest."""
        try:
            return self.idle.popleft()
        except IndexError:
            return None

    def give_up(self, waiter: Waiter, now: float) -> Waiter | None:
        """Withdraw a waiter whose thread stops waiting.

        Return the waiter that gets its lease, if it had one.
        """
        if self.waiters.withdraw(waiter):
            return None
        lease, waiter.lease = waiter.lease, None
        if lease is None or not self._holds(lease) or lease.phase is not Phase.CONNECTING:
            return None
        return self.give_to_thread_or_keep(lease, lease.conn, now)

    def give_to_thread_or_keep(self, lease: Lease, conn: object, now: float) -> Waiter | None:
        """Give a lease to the first waiter, which is returned; with none, keep or release it."""
        if not self.waiting:
            if conn is not None:
                self._lay_idle(lease, conn, now)
            else:
                self.closed(lease, ReleaseReason.UNUSED, gone=True)
            return None
        waiter = next(iter(self.waiting.values()))
        self.waiters.withdraw(waiter)
        self.assign(lease, conn, waiter, now)
        return waiter

    def _give_to_thread(self, lease: Lease, conn: object, now: float) -> Waiter | None:
        """Give a lease to the first waiter that does not wait for a move.

        In the lane's queue, other processes' waiters may come first.
        """
        for waiter in self.waiting.values():
            if not waiter.waits_for_move:
                self.waiters.withdraw(waiter)
                self.assign(lease, conn, waiter, now)
                return waiter
        return None

    def assign(self, lease: Lease, conn: object, waiter: Waiter, now: float) -> None:
        """Give a lease to a waiter that is in no queue any more."""
        waiter_ref = weakref.ref(waiter)
        lease.conn, lease.phase, lease.since, lease.waiter = conn, Phase.CONNECTING, now, waiter_ref
        waiter.lease = lease

    def opened(
        self, lease: Lease, backend: Backend, retire_at: float, conn: object, now: float
    ) -> None:
        """Record that a lease's connection is open.

        Raise `SharedPoolError` if the broker has taken the lease away meanwhile: the connection
        must be closed.
        """
        if not self._holds(lease):
            raise SharedPoolError(
                f"the broker has taken lease {lease.token} away while it was being connected"
            )
        lease.backend, lease.retire_at, lease.ref = backend, retire_at, weakref.ref(conn, collected)
        self.note_retirement(retire_at)
        lease.phase, lease.since, lease.arrived_at = Phase.IN_USE, now, now
        self.outbox.append(Confirm(lease.token, backend))

    # --- checkin

    def checkin(
        self, lease: Lease, conn: object, now: float, verdict: ReleaseReason | None
    ) -> Closing | Waiter | None:
        """Take a connection back: close it, hand it on to a waiter, or cache it.

        `verdict` is the reason to close it, if the caller has found one.
        """
        if not self._holds(lease):
            verdict = ReleaseReason.BROKEN  # the broker has taken it away, or it seemed dropped
        elif verdict is None:
            verdict = self._reason_to_close(lease, now)
        if verdict is None:
            if self.moving_flag[0]:
                # Other processes' threads wait for it, so threads here may have it only briefly.
                if now - lease.arrived_at < _TO_THREADS_S and (
                    waiter := self._give_to_thread(lease, conn, now)
                ):
                    return waiter
                verdict = ReleaseReason.SHARED if lease.movable else ReleaseReason.CLOSED
            elif not self.keep_idle and not (self.shares_between_threads and self.waiting):
                verdict = ReleaseReason.CLOSED
        # If an interrupt comes before this line, only the user's thread refers to the connection.
        # Once that is dropped, the next heartbeats find that the lease has no owner.
        if verdict is not None:
            return self.close(lease, conn, verdict, now)
        if self.waiting:
            return self.give_to_thread_or_keep(lease, conn, now)
        self._lay_idle(lease, conn, now)
        return None

    def _reason_to_close(self, lease: Lease, now: float) -> ReleaseReason | None:
        """Return why a connection must not stay here, whoever waits; count a return that is due."""
        if lease.generation < self.generation:
            return ReleaseReason.STALE
        if now >= lease.retire_at:
            return ReleaseReason.RETIRED
        if self.returns_due and not self.time_slice.keeps(lease, now):
            self.returns_due -= 1
            return ReleaseReason.RETURN_DUE
        return None

    def note_use(self, lease: Lease, seconds: float, now: float, *, typical: bool) -> None:
        """Record how long a connection was checked out, before its `checkin`.

        `typical` means that only the timing has kept this checkin from the fast path.
        """
        others = [each for each in self.leases.values() if each is not lease]
        out = sum(each.phase is Phase.IN_USE and each.conn is None for each in others)
        self.timings.checked_in(seconds, self.hits, out, typical=typical)
        lease.fast_checkin = lease.generation == self.generation and not self.timings.choose(now)

    def _holds(self, lease: Lease) -> bool:
        return self.leases.get(lease.token) is lease

    def _lay_idle(self, lease: Lease, conn: object, now: float) -> None:
        lease.conn, lease.phase, lease.since = conn, Phase.IDLE, now
        self.idle.append(lease)
        self.report_idle(now)

    def report_idle(self, now: float) -> None:
        """Report idle leases at once, while the broker expects returns or connections move."""
        if not (self.returns_due or self.moving_flag[0]) or not (idle := list(self.idle)):
            return
        if self.moving_flag[0] or not self.time_slice.keeps(idle[-1], now):
            self.outbox.append(self.reporter.renewal(now, {}))

    def close(self, lease: Lease, conn: object, reason: ReleaseReason, now: float) -> Closing:
        """Take a lease out of use for good, in any phase; the caller closes the connection."""
        lease.conn, lease.phase, lease.since = conn, Phase.CLOSING, now
        return Closing(lease, reason)

    def closed(
        self,
        lease: Lease,
        reason: ReleaseReason,
        *,
        gone: bool,
        peer_closed: bool = False,
        error: str = "",
        code: str = "",
        unreachable: bool = False,
    ) -> None:
        """Give back a lease whose connection is closed. A second call does nothing.

        `gone`: the backend was seen to end. `peer_closed`: the other side has closed the
        connection, but that may have been a proxy. `error`, `code` and `unreachable` say why the
        connection could not be opened: see `Release`.
        """
        if self._holds(lease):
            del self.leases[lease.token]
            lease.conn = None
            release = Release(
                lease.token, gone, reason, lease.backend, error, code, unreachable, peer_closed
            )
            self.outbox.append(release)
            self.reporter.released(release)

    def keep_after_all(self, lease: Lease, conn: object, now: float) -> bool:
        """Lay idle a connection that could not be moved, and report it at once.

        Return False if it must be closed: this pool keeps nothing, or the broker has taken the
        lease away.
        """
        if not (self.keep_idle and self._holds(lease)):
            return False
        self._lay_idle(lease, conn, now)
        if not self.moving_flag[0]:  # else `_lay_idle` has reported it
            self.outbox.append(self.reporter.renewal(now, {}))
        return True

    def giving(self, lease: Lease) -> None:
        """Record that a lease's connection is being given to another process instead of closed.

        The giving thread alone has the connection now. Neither the heartbeat finishes the close,
        nor does a HELLO claim the lease: the connection may already be in use elsewhere.
        """
        lease.conn = None

    def given(self, lease: Lease) -> None:
        """Drop a lease whose connection another process has now. Needs no lock.

        The connection may have come back to another thread meanwhile, as a new lease with the same
        token: that stays.
        """
        if self._holds(lease) and (other := self.leases.pop(lease.token, lease)) is not lease:
            self.leases.setdefault(lease.token, other)
        lease.conn = lease.ref = None

    def ended(self, token: Token) -> Lease | None:
        """Drop and return a lease whose backend has ended.

        Return None if it is being closed anyway.
        """
        lease = self.leases.get(token)
        return None if lease is None or lease.phase is Phase.CLOSING else self.forget(token)

    def forget(self, token: Token) -> Lease | None:
        """Drop a lease that the broker has taken away."""
        lease = self.leases.pop(token, None)
        if lease is not None:
            lease.fast_checkin = False
            self.remove_idle(lease)
        return lease

    def report_failover_sign(self, lease: Lease, code: str) -> None:
        """Report that a connection saw a failover (SQLSTATE `code`), or was found dead ("")."""
        if lease.generation >= self.generation:
            self.outbox.append(FailoverSign(lease.generation, code))

    # --- scavenging

    def expire(self, now: float) -> list[Closing]:
        """Take out leases that were idle longer than `expiration_s` or are past their lifetime."""
        closing = []
        for lease in list(self.idle):
            if now - lease.since < self.expiration_s:
                break
            if self.remove_idle(lease):
                closing.append(self.close(lease, lease.conn, ReleaseReason.EXPIRED, now))
        if now >= self._first_retires_at:
            for lease in list(self.idle):
                if now >= lease.retire_at and self.remove_idle(lease):
                    closing.append(self.close(lease, lease.conn, ReleaseReason.RETIRED, now))
            # Leases in use that are due by now are closed at their checkin.
            ahead = [lease.retire_at for lease in self.leases.values() if lease.retire_at > now]
            self._first_retires_at = min(ahead, default=float("inf"))
        try:
            since = self.idle[0].since
        except IndexError:
            since = now
        scavenge_at = min(since + self.expiration_s, self._first_retires_at, self.timings.due_at)
        self.next_scavenge_at = scavenge_at if self.keep_idle else float("-inf")
        return closing

    # --- what changes with the broker

    def set_terms(self, expiration_s: float, connects_within_s: float, *, hands_over: bool) -> None:
        """Set the broker's terms.

        Time that a connection may lie idle; time from a grant to its connect; whether movable
        connections are given to others instead of closed.
        """
        self.expiration_s, self.next_scavenge_at = expiration_s, float("-inf")
        self.connects_within_s = connects_within_s
        self.time_slice.hands_over = hands_over

    def enter_lane(self, moving_flag: memoryview) -> None:
        """Record that the process is in its pool's lane; `moving_flag` is the board's byte."""
        self.moving_flag = moving_flag

    def leave_lane(self) -> None:
        """Record that the process is in no lane. Needs no lock."""
        self.moving_flag = _NOTHING_MOVES
        self.reporter.unread = []  # else it would be reported for ever

    # --- the end

    def stop_keeping(self) -> None:
        """Cache no more connections."""
        self.keep_idle, self.next_scavenge_at = False, float("-inf")

    def take_all_idle(self, now: float) -> list[Closing]:
        """Take out all idle leases."""
        idle = iter(self.pop_oldest_idle, None)
        return [self.close(lease, lease.conn, ReleaseReason.CLOSED, now) for lease in idle]
