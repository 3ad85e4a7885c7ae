"""One worker's leases: idle, in use, owed to others; and its threads that wait for one. Pure: no I/O, no clock.

The caller holds the pool's lock around every method but `take`, and afterwards, without the lock, carries out what they
return: leases to close, tickets to wake. Messages for the broker are appended to `out` under that same lock, so that
they leave in the order in which the state changed.

`idle` alone changes without the lock as well: a checkout pops from its right end and a checkin appends there, each in
one step of the interpreter (`worker/pool.py`). So what was there a moment ago may be gone, and who appends must look
afterwards at what would have kept him from it (`owed`, `waiting`, `calm_until`); who changes that looks at `idle`.
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
    Grant,
    LeaseReport,
    Phase,
    Recall,
    Release,
    ReleaseReason,
    Renew,
    ToBroker,
    Token,
    Trouble,
)
from sharedpool.worker.core.lease import Closing, Lease, Ticket, collected
from sharedpool.worker.core.lease_reports import reports
from sharedpool.worker.core.time_slice import Slices
from sharedpool.worker.core.timings import Times
from sharedpool.worker.core.waiters import Tickets

_MOST_GONE = 100  # in one packet
_HAND_ON_S = 0.01
NOTHING_MOVES = (0,)  # in place of the board's byte, where there is no lane


class Cache:
    """All leases and tickets of one pool in one process."""

    __slots__ = ("__dict__", "__weakref__", "hits")  # that one every checkout changes

    def __init__(self, expiration_s: float) -> None:
        self.expiration_s = expiration_s
        self.keep_idle = True
        self.hand_on = True  # give a checked-in connection to a waiting thread
        self.out: deque[ToBroker] = deque()
        self.leases: dict[Token, Lease] = {}
        self.idle: deque[Lease] = deque()  # the most recently used at the right
        self.owed = 0
        self.connects_within_s = float("inf")  # of the grant: later its slot may be another's
        self.slices = Slices()
        self.tickets = Tickets(self.out, self.slices)
        self.waiting = self.tickets.waiting
        self.times = Times()
        self.generation = 0
        self._epoch: int | None = None  # of the broker that was last registered with
        self.given_back: dict[Token, None] = {}  # leases, their backends seen to end; the broker may not know yet
        self._unproven: dict[Token, Release] = {}  # given back otherwise; the same
        # Until then nothing has to be scavenged.
        self.calm_until = float("-inf")
        self._first_retires_at = float("inf")
        self.hits = 0  # that needed no more than the deque
        # Not 0 while connections move past the broker: a byte of the board.
        self.moving: Sequence[int] | memoryview = NOTHING_MOVES
        # From the lane, in a thread's hands; and what refers to that, None once an interrupt has made it drop it.
        self.arriving: dict[Token, tuple[Moved, Callable[[], object | None]]] = {}
        self.unread: list[Moved] = []  # and what no thread had read yet, when the link looked
        self.unsure = False  # then a thread may have had something that is in neither
        self._newest = 0  # serial of the newest word on `owed`
        self._recalled = 0  # and of the newest recall
        self._seen = NO_TOKEN  # the newest grant
        self._is_new = True  # no HELLO was said: there is nothing that a broker could know of it

    def leave_outbox(self) -> None:
        """Leave what is in the outbox to the link that has it; what follows is the next one's to send."""
        self.out = self.tickets.out = deque()

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
        lease.ticket = None  # an earlier one, whose end means nothing any more
        return lease

    def checked_in(self, lease: Lease, now: float) -> Closing | Ticket | None:
        """Take a connection back that was laid idle without the lock, when it should not just lie there."""
        if not self._pull(lease):
            return None  # another thread has it
        if self.times.choose(now):
            lease.plain = False
        conn, lease.conn, lease.phase = lease.conn, None, Phase.IN_USE
        return self.checkin(lease, conn, now, None)

    def retires(self, retire_at: float) -> None:
        """Note that there is a lease to be closed by then."""
        self._first_retires_at = min(self._first_retires_at, retire_at)
        self.calm_until = min(self.calm_until, retire_at)

    def _pull(self, lease: Lease) -> bool:
        """Take one lease out of the idle ones, if it is still there."""
        try:
            self.idle.remove(lease)
        except ValueError:
            return False
        return True

    def _shift(self) -> Lease | None:
        """Take out the lease that has been idle longest."""
        try:
            return self.idle.popleft()
        except IndexError:
            return None

    def give_up(self, ticket: Ticket, now: float) -> Ticket | None:
        """Withdraw a ticket whose thread will not use it. A lease it was given goes to the next ticket (returned)."""
        if self.tickets.withdraw(ticket):
            return None
        lease, ticket.lease = ticket.lease, None
        if lease is None or not self._holds(lease) or lease.phase is not Phase.CONNECTING:
            return None
        return self._pass_on(lease, lease.conn, now)

    def _pass_on(self, lease: Lease, conn: object, now: float) -> Ticket | None:
        """Give a lease to the first waiting ticket, which need not ask the broker any more; else keep or release it."""
        if not self.waiting:
            if conn is not None:
                self._lay_idle(lease, conn, now)
            else:
                self.closed(lease, ReleaseReason.UNUSED, gone=True)
            return None
        ticket = next(iter(self.waiting.values()))
        self.tickets.withdraw(ticket)
        self._assign(lease, conn, ticket, now)
        return ticket

    def _hand_on(self, lease: Lease, conn: object, now: float) -> Ticket | None:
        """Give a lease to the first ticket that does not wait in the lane, where others may be before it."""
        for ticket in self.waiting.values():
            if not ticket.in_lane:
                self.tickets.withdraw(ticket)
                self._assign(lease, conn, ticket, now)
                return ticket
        return None

    def _assign(self, lease: Lease, conn: object, ticket: Ticket, now: float) -> None:
        whose = weakref.ref(ticket)
        lease.conn, lease.phase, lease.since, lease.ticket = conn, Phase.CONNECTING, now, whose
        ticket.lease = lease

    def opened(self, lease: Lease, backend: Backend, retire_at: float, conn: object, now: float) -> None:
        """Note that a lease's connection is open.

        Raise `SharedPoolError` when the broker has taken the lease away meanwhile: the connection must be closed.
        """
        if not self._holds(lease):
            raise SharedPoolError(f"the broker has taken lease {lease.token} away while it was being connected")
        lease.backend, lease.retire_at, lease.ref = backend, retire_at, weakref.ref(conn, collected)
        self.retires(retire_at)
        lease.phase, lease.since, lease.arrived = Phase.IN_USE, now, now
        self.out.append(Confirm(lease.token, backend))

    # --- checkin

    def checkin(self, lease: Lease, conn: object, now: float, verdict: ReleaseReason | None) -> Closing | Ticket | None:
        """Take a connection back: close it (`verdict` says why, or it is owed or too old), hand it on, or cache it."""
        if not self._holds(lease):
            verdict = ReleaseReason.BROKEN  # taken away by the broker, or given up for lost
        if verdict is None:
            if lease.generation < self.generation:
                verdict = ReleaseReason.STALE
            elif now >= lease.retire_at:
                verdict = ReleaseReason.RETIRED
            elif self.owed and not self.slices.keeps(lease, now):
                self.owed -= 1
                verdict = ReleaseReason.OWED
            elif self.moving[0]:
                # Others wait in other processes: here it stays for a while at most.
                if now - lease.arrived < _HAND_ON_S and (ticket := self._hand_on(lease, conn, now)) is not None:
                    return ticket
                verdict = ReleaseReason.SHARED if lease.movable else ReleaseReason.CLOSED
            elif not self.keep_idle and not (self.hand_on and self.waiting):
                verdict = ReleaseReason.CLOSED
        # Until it has found its place it stays its user's, who drops it when an interrupt falls in between.
        if verdict is not None:
            return self._closing(lease, conn, verdict, now)
        if self.waiting:
            return self._pass_on(lease, conn, now)
        self._lay_idle(lease, conn, now)
        return None

    def used(self, lease: Lease, seconds: float, now: float, *, typical: bool) -> None:
        """Note for how long a connection was checked out, before its `checkin`.

        `typical`: but for its being timed it would have been laid idle without the lock.
        """
        others = [each for each in self.leases.values() if each is not lease]
        out = sum(each.phase is Phase.IN_USE and each.conn is None for each in others)
        self.times.checked_in(seconds, self.hits, out, typical=typical)
        lease.plain = lease.generation == self.generation and not self.times.choose(now)

    def _holds(self, lease: Lease) -> bool:
        return self.leases.get(lease.token) is lease

    def _lay_idle(self, lease: Lease, conn: object, now: float) -> None:
        lease.conn, lease.phase, lease.since = conn, Phase.IDLE, now
        self.idle.append(lease)
        self._own_up(now)

    def _own_up(self, now: float) -> None:
        """Tell the broker at once of what lies idle while it counts on our next checkin, or while connections move."""
        if not (self.owed or self.moving[0]) or not (idle := list(self.idle)):
            return
        if self.moving[0] or not self.slices.keeps(idle[-1], now):
            self.out.append(self.renewal(now, {}))

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
            release = Release(lease.token, gone, reason, lease.backend, error, code, unreachable, closed)
            self.out.append(release)
            if gone:
                self.given_back[lease.token] = None
            else:
                self._unproven[lease.token] = release

    def lay_back(self, lease: Lease, conn: object, now: float) -> bool:
        """Lay a connection idle that was to move and cannot, and tell the broker of it at once.

        Return False if it is to be closed instead: nothing is kept here, or the broker has taken it away.
        """
        if not (self.keep_idle and self._holds(lease)):
            return False
        self._lay_idle(lease, conn, now)
        if not self.moving[0]:  # else it is told already
            self.out.append(self.renewal(now, {}))
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
            lease.plain = False
            self._pull(lease)
        return lease

    # --- generations

    def trouble(self, lease: Lease, code: str) -> None:
        """Tell the broker that a connection saw the server fail over (SQLSTATE `code`), or was found dead ("")."""
        if lease.generation >= self.generation:
            self.out.append(Trouble(lease.generation, code))

    def renew_generation(self, generation: int, now: float) -> list[Closing]:
        """Take out everything idle that is older; what is in use follows at its checkin."""
        if generation <= self.generation:
            return []
        self.generation = generation
        for lease in self.leases.values():
            lease.plain = False
        stale = [lease for lease in list(self.idle) if lease.generation < generation and self._pull(lease)]
        return [self._closing(lease, lease.conn, ReleaseReason.STALE, now) for lease in stale]

    # --- scavenging

    def expire(self, now: float) -> list[Closing]:
        """Take out what has been idle longer than `expiration_s` or lived longer than its lifetime."""
        closing = []
        for lease in list(self.idle):
            if now - lease.since < self.expiration_s:
                break
            if self._pull(lease):
                closing.append(self._closing(lease, lease.conn, ReleaseReason.EXPIRED, now))
        if now >= self._first_retires_at:
            for lease in list(self.idle):
                if now >= lease.retire_at and self._pull(lease):
                    closing.append(self._closing(lease, lease.conn, ReleaseReason.RETIRED, now))
            ahead = [lease.retire_at for lease in self.leases.values() if lease.retire_at > now]
            self._first_retires_at = min(ahead, default=float("inf"))  # what is due by now is closed at its checkin
        try:
            since = self.idle[0].since
        except IndexError:
            since = now
        calm_until = min(since + self.expiration_s, self._first_retires_at, self.times.due_at)
        self.calm_until = calm_until if self.keep_idle else float("-inf")
        return closing

    def expires_after(self, expiration_s: float) -> None:
        """Set how long a connection may lie idle."""
        self.expiration_s, self.calm_until = expiration_s, float("-inf")

    def stop_keeping(self) -> None:
        """Let nothing lie idle from now on."""
        self.keep_idle, self.calm_until = False, float("-inf")

    def drain(self, now: float) -> list[Closing]:
        """Take out everything idle."""
        closing = []
        while (lease := self._shift()) is not None:
            closing.append(self._closing(lease, lease.conn, ReleaseReason.CLOSED, now))
        return closing

    # --- the broker's words

    def granted(self, grant: Grant, now: float) -> Ticket | None:
        """Take in a lease: for the ticket that asked, else the next one (returned, to be woken), else release it."""
        if grant.token.epoch != self._epoch:
            return None  # a former broker's
        if grant.serial > self._newest:
            self._newest, self.owed, self.slices.pressed = grant.serial, grant.owed, grant.owed > 0
            self._own_up(now)
        if grant.token in self.leases or grant.token <= self._seen:
            return None  # a double
        self._seen = grant.token
        lease = self.leases[grant.token] = Lease(grant.token, None, now)
        lease.generation, lease.cache, lease.idle_s = self.generation, self, self.slices.gap_s
        lease.reached_directly, lease.refused_with = grant.direct, grant.code
        granted_at = self.tickets.granted_at(grant.request, grant.waited_ms / 1000, now)
        lease.connect_by = granted_at + self.connects_within_s
        ticket = self.waiting.get(grant.request)
        if now > lease.connect_by:  # nobody is to connect on it
            self.closed(lease, ReleaseReason.UNUSED, gone=True)
            if ticket is not None:
                self.tickets.ask(ticket, now)
            return None
        if ticket is None:
            return self._pass_on(lease, None, now)
        ticket.answered = True
        self.tickets.serve(ticket)
        self._assign(lease, None, ticket, now)
        return ticket

    def moved(self, message: Moved, conn: object, retire_at: float, now: float) -> Ticket | None:
        """Take in a lease with its open connection, whoever has sent it; return the ticket to wake, if any.

        Raise `SharedPoolError` when it is not to be used: a former broker has passed it on.
        """
        passed = message.passed
        if passed is not None and message.token.epoch != self._epoch:
            raise SharedPoolError(f"lease {message.token} was passed on by a former broker")
        if passed is not None and passed.serial > self._newest:
            self._newest, self.owed, self.slices.pressed = passed.serial, passed.owed, passed.pressed
        lease = Lease(message.token, None, now)
        lease.cell, lease.moves = message.cell, message.moves
        lease.cache, lease.idle_s = self, self.slices.gap_s
        if retire_at != math.inf:
            self.retires(retire_at)
        lease.backend, lease.generation, lease.retire_at = message.live.backend, message.live.generation, retire_at
        lease.conn, lease.ref, lease.deposited, lease.fresh = conn, weakref.ref(conn, collected), True, True
        lease.movable = True
        self.leases[message.token] = lease  # an interrupt finds it with all that is needed to see the connection gone
        ticket = self.waiting.get(message.request)
        if ticket is None:
            return self._pass_on(lease, conn, now)
        ticket.answered = passed is not None
        self.tickets.serve(ticket)
        self._assign(lease, conn, ticket, now)
        return ticket

    def refuse(self, message: Moved, now: float) -> None:
        """Have the broker end a connection that was passed and cannot be used here; ask for another, to be opened."""
        release = Release(message.token, False, ReleaseReason.FAILED, message.live.backend)
        self.out.append(release)
        self._unproven[message.token] = release
        if (ticket := self.waiting.get(message.request)) is not None:
            ticket.place = -1
            self.tickets.ask(ticket, now)

    def recalled(self, recall: Recall, now: float, threads: Mapping[int, str]) -> list[Closing]:
        """Take in a recall: reserve idle leases to be closed, longest idle first, and answer with what is held."""
        if recall.serial <= self._recalled:
            return []  # a double
        self._recalled = recall.serial
        if recall.serial > self._newest:  # else a connection that was passed has overtaken it: all but that counts
            self._newest, self.owed, self.slices.pressed = recall.serial, recall.owed, recall.owed > 0
        closing = self.expire(now) if recall.expired else []
        for _ in range(recall.take):
            if (lease := self._shift()) is not None:
                closing.append(self._closing(lease, lease.conn, ReleaseReason.TAKEN, now))
        for lease in list(self.idle):
            if self.owed and self.slices.wastes(lease, now) and self._pull(lease):
                self.owed -= 1
                closing.append(self._closing(lease, lease.conn, ReleaseReason.OWED, now))
        if recall.answer:
            self.out.append(self.renewal(now, threads, answers=recall.serial))
        return closing

    def renewal(self, now: float, threads: Mapping[int, str], *, answers: int = 0) -> Renew:
        """Return the heartbeat: all that is held and asked for."""
        reported = reports(self.leases.values(), now, threads) + self._arriving()
        unproven = list(self._unproven.values())[:_MOST_GONE]
        pending, gone = self.tickets.pending(), list(self.given_back)
        return Renew(reported, self._seen, answers, pending, gone, unproven=unproven, unsure=self.unsure)

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
        return structs.replace(self.renewal(now, threads), times=self.times.news(self.hits))

    def register(self, now: float, threads: Mapping[int, str]) -> tuple[list[LeaseReport], Token, Acquire | None]:
        """Start over with a broker: return what a HELLO says is held, the newest grant seen and the first request.

        That replaces whatever was not sent, but for leases given back: those are said to be closing, and their RELEASE
        follows, since only that tells whether the backend is gone. Every waiting ticket is asked for again (one that is
        in the broker's queue keeps its place), and a heartbeat rids the queue of those that were withdrawn, after the
        first HELLO of all.
        """
        unsent = [message for message in self.out if isinstance(message, Release)]
        self.out.clear()
        self.owed = self._newest = self._recalled = 0
        self.out.extend(unsent)
        self.tickets.ask_again(now)
        if not self._is_new or self._epoch is not None:
            self.out.append(self.renewal(now, threads))
        self._is_new = False
        closing = [
            LeaseReport(release.token, Phase.CLOSING, 0, "", release.backend)
            for release in unsent
            if release.backend is not None or not release.gone  # else there was never a connection
        ]
        given = {token for token, x in self.leases.items() if x.phase is Phase.CLOSING and x.conn is None}
        held = [x for x in reports(self.leases.values(), now, threads) if x.token not in given]
        held += self._arriving()
        return held + closing, self._seen, self.tickets.first(now)

    def welcomed(self, epoch: int, generation: int, now: float, served: int = 0) -> list[Closing]:
        """Note which broker this is: what an earlier one had granted and not got here is lost.

        `served`: the request that came to it along with the HELLO, and that it answers; 0 for none.
        """
        if epoch == self._epoch:
            return self.renew_generation(generation, now)
        self._epoch, self._seen = epoch, NO_TOKEN
        self.tickets.start_over(now, served)
        self.owed = self._newest = self._recalled = 0  # an earlier broker's may have come in since our HELLO
        self.generation = generation  # it counts anew: what is held stays
        for lease in self.leases.values():
            lease.generation = generation
        return []

    def farewell(self) -> Bye:
        """Return the last message."""
        return Bye(self._seen, self.times.news(self.hits))
