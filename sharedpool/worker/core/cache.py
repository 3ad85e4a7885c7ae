"""One worker's leases: idle, in use, owed to others; and its threads that wait for one. Pure: no I/O, no clock.

The caller holds the pool's lock around every method but `take`, and afterwards, without the lock, carries out what they
return: leases to close, waiters to wake. Messages for the broker are appended to `outbox` under that same lock, so that
they leave in the order in which the state changed.

`idle` alone changes without the lock as well: a checkout pops from its right end and a checkin appends there, each in
one step of the interpreter (`worker/pool.py`). So what was there a moment ago may be gone, and who appends must look
afterwards at what would have kept him from it (`returns_due`, `waiting`, `next_scavenge_at`); who changes that looks at
`idle`.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from msgspec import structs

from sharedpool.errors import SharedPoolError
from sharedpool.wire.desk import Moved
from sharedpool.wire.messages import (
    NO_TOKEN,
    Acquire,
    Backend,
    Bye,
    Confirm,
    FailoverSign,
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
from sharedpool.worker.core.lease import Closing, Lease, Waiter, collected
from sharedpool.worker.core.lease_reports import reports
from sharedpool.worker.core.time_slice import TimeSlice
from sharedpool.worker.core.timings import Timings
from sharedpool.worker.core.waiters import Waiters

_MOST_GONE = 100  # in one packet
_HAND_ON_S = 0.01
NOTHING_MOVES = (0,)  # in place of the board's byte, where there is no lane


class Cache:
    """All leases and waiters of one pool in one process."""

    __slots__ = ("__dict__", "__weakref__", "hits")  # that one every checkout changes

    def __init__(self, expiration_s: float) -> None:
        self.expiration_s = expiration_s
        self.keep_idle = True
        self.hand_on = True  # give a checked-in connection to a waiting thread
        self.outbox: deque[ToBroker] = deque()
        self.leases: dict[Token, Lease] = {}
        self.idle: deque[Lease] = deque()  # the most recently used at the right
        self.returns_due = 0
        self.connects_within_s = float("inf")  # of the grant: later its slot may be another's
        self.time_slice = TimeSlice()
        self.waiters = Waiters(self.outbox, self.time_slice)
        self.waiting = self.waiters.waiting
        self.timings = Timings()
        self.generation = 0
        self._epoch: int | None = None  # of the broker that was last registered with
        self.given_back: dict[
            Token, None
        ] = {}  # leases, their backends seen to end; the broker may not know yet
        self._unproven: dict[Token, Release] = {}  # given back otherwise; the same
        # Until then nothing has to be scavenged.
        self.next_scavenge_at = float("-inf")
        self._first_retires_at = float("inf")
        self.hits = 0  # that needed no more than the deque
        # Not 0 while connections move past the broker: a byte of the board.
        self.moving: Sequence[int] | memoryview = NOTHING_MOVES
        # From the lane, in a thread's hands; and what refers to that, None once an interrupt has made it drop it.
        self.arriving: dict[Token, tuple[Moved, Callable[[], object | None]]] = {}
        self.unread: list[Moved] = []  # and what no thread had read yet, when the link looked
        self.unsure = False  # then a thread may have had something that is in neither
        self._returns_serial = 0  # serial of the newest word on `returns_due`
        self._recall_serial = 0  # and of the newest recall
        self._newest_grant = NO_TOKEN  # the newest grant
        self._is_new = True  # no HELLO was said: there is nothing that a broker could know of it

    def leave_outbox(self) -> None:
        """Leave what is in the outbox to the link that has it; what follows is the next one's to send."""
        self.outbox = self.waiters.outbox = deque()

    # --- checkout

    def take(self, now: float) -> Lease | None:
        """Hand out the most recently used idle lease, or None."""
        try:
            lease = self.idle.pop()
        except IndexError:
            return None
        lease.phase = Phase.IN_USE
        lease.idle_s = now - lease.since
        lease.since = now
        lease.waiter = None  # an earlier one, whose end means nothing any more
        return lease

    def reconsider_idle(self, lease: Lease, now: float) -> Closing | Waiter | None:
        """Take a connection back that was laid idle without the lock, when it should not just lie there."""
        if not self._remove_idle(lease):
            return None  # another thread has it
        if self.timings.choose(now):
            lease.fast_checkin = False
        conn, lease.conn, lease.phase = lease.conn, None, Phase.IN_USE
        return self.checkin(lease, conn, now, None)

    def note_retirement(self, retire_at: float) -> None:
        """Note that there is a lease to be closed by then."""
        self._first_retires_at = min(self._first_retires_at, retire_at)
        self.next_scavenge_at = min(self.next_scavenge_at, retire_at)

    def _remove_idle(self, lease: Lease) -> bool:
        """Take one lease out of the idle ones, if it is still there."""
        try:
            self.idle.remove(lease)
        except ValueError:
            return False
        return True

    def _pop_oldest_idle(self) -> Lease | None:
        """Take out the lease that has been idle longest."""
        try:
            return self.idle.popleft()
        except IndexError:
            return None

    def give_up(self, waiter: Waiter, now: float) -> Waiter | None:
        """Withdraw a waiter whose thread will not use it. A lease it was given goes to the next waiter (returned)."""
        if self.waiters.withdraw(waiter):
            return None
        lease, waiter.lease = waiter.lease, None
        if lease is None or not self._holds(lease) or lease.phase is not Phase.CONNECTING:
            return None
        return self._hand_on_or_keep(lease, lease.conn, now)

    def _hand_on_or_keep(self, lease: Lease, conn: object, now: float) -> Waiter | None:
        """Give a lease to the first waiting waiter, which need not ask the broker any more; else keep or release it."""
        if not self.waiting:
            if conn is not None:
                self._lay_idle(lease, conn, now)
            else:
                self.closed(lease, ReleaseReason.UNUSED, gone=True)
            return None
        waiter = next(iter(self.waiting.values()))
        self.waiters.withdraw(waiter)
        self._assign(lease, conn, waiter, now)
        return waiter

    def _hand_on(self, lease: Lease, conn: object, now: float) -> Waiter | None:
        """Give a lease to the first waiter that does not wait in the lane, where others may be before it."""
        for waiter in self.waiting.values():
            if not waiter.only_in_lane:
                self.waiters.withdraw(waiter)
                self._assign(lease, conn, waiter, now)
                return waiter
        return None

    def _assign(self, lease: Lease, conn: object, waiter: Waiter, now: float) -> None:
        whose = weakref.ref(waiter)
        lease.conn, lease.phase, lease.since, lease.waiter = conn, Phase.CONNECTING, now, whose
        waiter.lease = lease

    def opened(
        self, lease: Lease, backend: Backend, retire_at: float, conn: object, now: float
    ) -> None:
        """Note that a lease's connection is open.

        Raise `SharedPoolError` when the broker has taken the lease away meanwhile: the connection must be closed.
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
        """Take a connection back: close it (`verdict` says why, or it is owed or too old), hand it on, or cache it."""
        if not self._holds(lease):
            verdict = ReleaseReason.BROKEN  # taken away by the broker, or given up for lost
        if verdict is None:
            if lease.generation < self.generation:
                verdict = ReleaseReason.STALE
            elif now >= lease.retire_at:
                verdict = ReleaseReason.RETIRED
            elif self.returns_due and not self.time_slice.keeps(lease, now):
                self.returns_due -= 1
                verdict = ReleaseReason.RETURN_DUE
            elif self.moving[0]:
                # Others wait in other processes: here it stays for a while at most.
                if (
                    now - lease.arrived_at < _HAND_ON_S
                    and (waiter := self._hand_on(lease, conn, now)) is not None
                ):
                    return waiter
                verdict = ReleaseReason.SHARED if lease.movable else ReleaseReason.CLOSED
            elif not self.keep_idle and not (self.hand_on and self.waiting):
                verdict = ReleaseReason.CLOSED
        # Until it has found its place it stays its user's, who drops it when an interrupt falls in between.
        if verdict is not None:
            return self._closing(lease, conn, verdict, now)
        if self.waiting:
            return self._hand_on_or_keep(lease, conn, now)
        self._lay_idle(lease, conn, now)
        return None

    def note_use(self, lease: Lease, seconds: float, now: float, *, typical: bool) -> None:
        """Note for how long a connection was checked out, before its `checkin`.

        `typical`: but for its being timed it would have been laid idle without the lock.
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
        self._report_idle(now)

    def _report_idle(self, now: float) -> None:
        """Tell the broker at once of what lies idle while it counts on our next checkin, or while connections move."""
        if not (self.returns_due or self.moving[0]) or not (idle := list(self.idle)):
            return
        if self.moving[0] or not self.time_slice.keeps(idle[-1], now):
            self.outbox.append(self.renewal(now, {}))

    def _closing(self, lease: Lease, conn: object, reason: ReleaseReason, now: float) -> Closing:
        lease.conn, lease.phase, lease.since = conn, Phase.CLOSING, now
        return Closing(lease, reason)

    def close(self, lease: Lease, conn: object, reason: ReleaseReason, now: float) -> Closing:
        """Take a lease out of use for good, whatever it was doing."""
        return self._closing(lease, conn, reason, now)

    def closed(
        self,
        lease: Lease,
        reason: ReleaseReason,
        *,
        gone: bool,
        closed: bool = False,
        error: str = "",
        code: str = "",
        unreachable: bool = False,
    ) -> None:
        """Give a lease back: its connection is closed. Does nothing the second time.

        `gone`: its backend was seen to end; `closed`: somebody's end of the connection was, perhaps not the backend's.
        The rest is why it could not be opened: see `Release`.
        """
        if self._holds(lease):
            del self.leases[lease.token]
            lease.conn = None
            release = Release(
                lease.token, gone, reason, lease.backend, error, code, unreachable, closed
            )
            self.outbox.append(release)
            if gone:
                self.given_back[lease.token] = None
            else:
                self._unproven[lease.token] = release

    def keep_after_all(self, lease: Lease, conn: object, now: float) -> bool:
        """Lay a connection idle that was to move and cannot, and tell the broker of it at once.

        Return False if it is to be closed instead: nothing is kept here, or the broker has taken it away.
        """
        if not (self.keep_idle and self._holds(lease)):
            return False
        self._lay_idle(lease, conn, now)
        if not self.moving[0]:  # else it is told already
            self.outbox.append(self.renewal(now, {}))
        return True

    def giving(self, lease: Lease) -> None:
        """Note that the connection of a lease that is being closed is given instead: it is its thread's alone now.

        Nobody finishes its close meanwhile, and no HELLO claims it: by then it may be in use elsewhere.
        """
        lease.conn = None

    def given(self, lease: Lease) -> None:
        """Note that a lease's connection was given away: both are over here. Needs no lock.

        It may have come back by now, to another thread, as a lease of the same name: that one stays.
        """
        if self._holds(lease) and (other := self.leases.pop(lease.token, lease)) is not lease:
            self.leases.setdefault(lease.token, other)
        lease.conn = lease.ref = None

    def acknowledged(self, gone: Iterable[Token]) -> None:
        """Note that the broker knows of these."""
        for token in gone:
            self.given_back.pop(token, None)
            self._unproven.pop(token, None)

    def ended(self, token: Token) -> Lease | None:
        """Drop a lease whose backend has ended; None if it is being closed here anyway."""
        lease = self.leases.get(token)
        return None if lease is None or lease.phase is Phase.CLOSING else self.forget(token)

    def forget(self, token: Token) -> Lease | None:
        """Drop a lease that the broker has taken away."""
        lease = self.leases.pop(token, None)
        if lease is not None:
            lease.fast_checkin = False
            self._remove_idle(lease)
        return lease

    # --- generations

    def report_failover_sign(self, lease: Lease, code: str) -> None:
        """Tell the broker that a connection saw the server fail over (SQLSTATE `code`), or was found dead ("")."""
        if lease.generation >= self.generation:
            self.outbox.append(FailoverSign(lease.generation, code))

    def renew_generation(self, generation: int, now: float) -> list[Closing]:
        """Take out everything idle that is older; what is in use follows at its checkin."""
        if generation <= self.generation:
            return []
        self.generation = generation
        for lease in self.leases.values():
            lease.fast_checkin = False
        stale = [
            lease
            for lease in list(self.idle)
            if lease.generation < generation and self._remove_idle(lease)
        ]
        return [self._closing(lease, lease.conn, ReleaseReason.STALE, now) for lease in stale]

    # --- scavenging

    def expire(self, now: float) -> list[Closing]:
        """Take out what has been idle longer than `expiration_s` or lived longer than its lifetime."""
        closing = []
        for lease in list(self.idle):
            if now - lease.since < self.expiration_s:
                break
            if self._remove_idle(lease):
                closing.append(self._closing(lease, lease.conn, ReleaseReason.EXPIRED, now))
        if now >= self._first_retires_at:
            for lease in list(self.idle):
                if now >= lease.retire_at and self._remove_idle(lease):
                    closing.append(self._closing(lease, lease.conn, ReleaseReason.RETIRED, now))
            ahead = [lease.retire_at for lease in self.leases.values() if lease.retire_at > now]
            self._first_retires_at = min(
                ahead, default=float("inf")
            )  # what is due by now is closed at its checkin
        try:
            since = self.idle[0].since
        except IndexError:
            since = now
        calm_until = min(since + self.expiration_s, self._first_retires_at, self.timings.due_at)
        self.next_scavenge_at = calm_until if self.keep_idle else float("-inf")
        return closing

    def expires_after(self, expiration_s: float) -> None:
        """Set how long a connection may lie idle."""
        self.expiration_s, self.next_scavenge_at = expiration_s, float("-inf")

    def stop_keeping(self) -> None:
        """Let nothing lie idle from now on."""
        self.keep_idle, self.next_scavenge_at = False, float("-inf")

    def take_all_idle(self, now: float) -> list[Closing]:
        """Take out everything idle."""
        closing = []
        while (lease := self._pop_oldest_idle()) is not None:
            closing.append(self._closing(lease, lease.conn, ReleaseReason.CLOSED, now))
        return closing

    # --- the broker's words

    def granted(self, grant: Grant, now: float) -> Waiter | None:
        """Take in a lease: for the waiter that asked, else the next one (returned, to be woken), else release it."""
        if grant.token.epoch != self._epoch:
            return None  # a former broker's
        if grant.serial > self._returns_serial:
            self._returns_serial, self.returns_due, self.time_slice.others_wait = (
                grant.serial,
                grant.returns_due,
                grant.returns_due > 0,
            )
            self._report_idle(now)
        if grant.token in self.leases or grant.token <= self._newest_grant:
            return None  # a double
        self._newest_grant = grant.token
        lease = self.leases[grant.token] = Lease(grant.token, None, now)
        lease.generation, lease.cache, lease.idle_s = self.generation, self, self.time_slice.gap_s
        lease.reached_directly, lease.refused_with = grant.direct, grant.code
        granted_at = self.waiters.granted_at(grant.request, grant.waited_ms / 1000, now)
        lease.connect_by = granted_at + self.connects_within_s
        waiter = self.waiting.get(grant.request)
        if now > lease.connect_by:  # nobody is to connect on it
            self.closed(lease, ReleaseReason.UNUSED, gone=True)
            if waiter is not None:
                self.waiters.ask(waiter, now)
            return None
        if waiter is None:
            return self._hand_on_or_keep(lease, None, now)
        waiter.answered = True
        self.waiters.serve(waiter)
        self._assign(lease, None, waiter, now)
        return waiter

    def received(self, message: Moved, conn: object, retire_at: float, now: float) -> Waiter | None:
        """Take in a lease with its open connection, whoever has sent it; return the waiter to wake, if any.

        Raise `SharedPoolError` when it is not to be used: a former broker has passed it on.
        """
        passed = message.passed
        if passed is not None and message.token.epoch != self._epoch:
            raise SharedPoolError(f"lease {message.token} was passed on by a former broker")
        if passed is not None and passed.serial > self._returns_serial:
            self._returns_serial, self.returns_due, self.time_slice.others_wait = (
                passed.serial,
                passed.returns_due,
                passed.others_wait,
            )
        lease = Lease(message.token, None, now)
        lease.cell, lease.moves = message.cell, message.moves
        lease.cache, lease.idle_s = self, self.time_slice.gap_s
        if retire_at != math.inf:
            self.note_retirement(retire_at)
        lease.backend, lease.generation, lease.retire_at = (
            message.live.backend,
            message.live.generation,
            retire_at,
        )
        lease.conn, lease.ref, lease.deposited, lease.needs_configure = (
            conn,
            weakref.ref(conn, collected),
            True,
            True,
        )
        lease.movable = True
        self.leases[message.token] = (
            lease  # an interrupt finds it with all that is needed to see the connection gone
        )
        waiter = self.waiting.get(message.request)
        if waiter is None:
            return self._hand_on_or_keep(lease, conn, now)
        waiter.answered = passed is not None
        self.waiters.serve(waiter)
        self._assign(lease, conn, waiter, now)
        return waiter

    def refuse(self, message: Moved, now: float) -> None:
        """Have the broker end a connection that was passed and cannot be used here; ask for another, to be opened."""
        release = Release(message.token, False, ReleaseReason.FAILED, message.live.backend)
        self.outbox.append(release)
        self._unproven[message.token] = release
        if (waiter := self.waiting.get(message.request)) is not None:
            waiter.lane_place = -1
            self.waiters.ask(waiter, now)

    def recalled(self, recall: Recall, now: float, threads: Mapping[int, str]) -> list[Closing]:
        """Take in a recall: reserve idle leases to be closed, longest idle first, and answer with what is held."""
        if recall.serial <= self._recall_serial:
            return []  # a double
        self._recall_serial = recall.serial
        if (
            recall.serial > self._returns_serial
        ):  # else a connection that was passed has overtaken it: all but that counts
            self._returns_serial, self.returns_due, self.time_slice.others_wait = (
                recall.serial,
                recall.returns_due,
                recall.returns_due > 0,
            )
        closing = self.expire(now) if recall.expired else []
        for _ in range(recall.take):
            if (lease := self._pop_oldest_idle()) is not None:
                closing.append(self._closing(lease, lease.conn, ReleaseReason.TAKEN, now))
        for lease in list(self.idle):
            if self.returns_due and self.time_slice.wastes(lease, now) and self._remove_idle(lease):
                self.returns_due -= 1
                closing.append(self._closing(lease, lease.conn, ReleaseReason.RETURN_DUE, now))
        if recall.answer:
            self.outbox.append(self.renewal(now, threads, answers=recall.serial))
        return closing

    def renewal(self, now: float, threads: Mapping[int, str], *, answers: int = 0) -> Renew:
        """Return the heartbeat: all that is held and asked for."""
        reported = reports(self.leases.values(), now, threads) + self._arriving()
        unproven = list(self._unproven.values())[:_MOST_GONE]
        pending, gone = self.waiters.pending(), list(self.given_back)
        return Renew(
            reported,
            self._newest_grant,
            answers,
            pending,
            gone,
            unproven=unproven,
            unsure=self.unsure,
        )

    def _arriving(self) -> list[LeaseReport]:
        """Return what is on its way to a thread: it has come, and was not taken in yet."""
        for token, (_, held) in list(self.arriving.items()):
            if held() is None:
                self.arriving.pop(token, None)
        in_hand = [moved for moved, _ in list(self.arriving.values())]
        coming = {moved.token: moved for moved in [*self.unread, *in_hand]}
        return [
            LeaseReport(token, Phase.CONNECTING, 0, "", moved.live.backend, [], moved.moves)
            for token, moved in coming.items()
            if token not in self.leases
        ]

    def heartbeat(self, now: float, threads: Mapping[int, str]) -> Renew:
        """Return what is held and asked for, and what took how long."""
        return structs.replace(self.renewal(now, threads), times=self.timings.news(self.hits))

    def register(
        self, now: float, threads: Mapping[int, str]
    ) -> tuple[list[LeaseReport], Token, Acquire | None]:
        """Start over with a broker: return what a HELLO says is held, the newest grant seen and the first request.

        That replaces whatever was not sent, but for leases given back: those are said to be closing, and their RELEASE
        follows, since only that tells whether the backend is gone. Every waiting waiter is asked for again (one that is
        in the broker's queue keeps its place), and a heartbeat rids the queue of those that were withdrawn, after the
        first HELLO of all.
        """
        unsent = [message for message in self.outbox if isinstance(message, Release)]
        self.outbox.clear()
        self.returns_due = self._returns_serial = self._recall_serial = 0
        self.outbox.extend(unsent)
        self.waiters.ask_for_all(now)
        if not self._is_new or self._epoch is not None:
            self.outbox.append(self.renewal(now, threads))
        self._is_new = False
        closing = [
            LeaseReport(release.token, Phase.CLOSING, 0, "", release.backend)
            for release in unsent
            if release.backend is not None or not release.gone  # else there was never a connection
        ]
        given = {
            token for token, x in self.leases.items() if x.phase is Phase.CLOSING and x.conn is None
        }
        held = [x for x in reports(self.leases.values(), now, threads) if x.token not in given]
        held += self._arriving()
        return held + closing, self._newest_grant, self.waiters.first_request(now)

    def welcomed(self, epoch: int, generation: int, now: float, served: int = 0) -> list[Closing]:
        """Note which broker this is: what an earlier one had granted and not got here is lost.

        `served`: the request that came to it along with the HELLO, and that it answers; 0 for none.
        """
        if epoch == self._epoch:
            return self.renew_generation(generation, now)
        self._epoch, self._newest_grant = epoch, NO_TOKEN
        self.waiters.start_over(now, served)
        self.returns_due = self._returns_serial = self._recall_serial = (
            0  # an earlier broker's may have come in since our HELLO
        )
        self.generation = generation  # it counts anew: what is held stays
        for lease in self.leases.values():
            lease.generation = generation
        return []

    def farewell(self) -> Bye:
        """Return the last message."""
        return Bye(self._newest_grant, self.timings.news(self.hits))
