"""A worker in the lane: what `waiting.py`, `mover.py`, `wait_sockets.py`, and of the lane
`local_pool.py` and `session.py`, do.

A thread that waits there is a `Thread`, one that gives a `LaneGiving`: generators that go on by a
step whenever they are asked to. Half of the checkouts and checkins go the fast path (`mover.py`),
where that is open.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, cast

from msgspec import structs

from sharedpool.errors import SharedPoolError
from sharedpool.lane.lane import Ticket
from sharedpool.lane.wait_sockets import _AGAIN_LIMIT_S, AGAIN_S
from sharedpool.wire.board import PLACES
from sharedpool.wire.desk import Joined, LaneInvitation, Live, Moved
from sharedpool.wire.messages import CancelQuery, ReleaseReason
from sharedpool.wire.values import Phase
from sharedpool.worker.core.broker_messages import BrokerMessages
from sharedpool.worker.core.cache import Cache
from sharedpool.worker.core.lease import Closing, Lease, Waiter
from sharedpool.worker.core.time_slice import STEADY_GAP_S
from tests.model.desk import AtTheDesk, Conn, Giving, Lack
from tests.model.lane import End, Got, Grip, Lane, MovingConnection
from tests.model.network import Packet
from tests.model.server import Proc

if TYPE_CHECKING:
    from tests.model.world import World

T = TypeVar("T")
Steps = Generator[None, None, None]
_LOOKS = 4  # `wait_sockets._CHECKS`


@dataclass(eq=False, slots=True)
class WaitSocket:
    """Where a thread waits: `wait_sockets.WaitSocket`."""

    end: End
    place: int
    box: deque[Packet | None]
    request: int = 0
    once: bool = True
    again_s: float = AGAIN_S
    settled: bool = True
    looks: int = -1  # in vain, while it is free and unsettled

    @property
    def bound(self) -> bool:
        return self.end.open

    def enter(self, request: int) -> Generator[None, None, float]:
        again = self.request == request
        self.again_s = min(2 * self.again_s, _AGAIN_LIMIT_S) if again else AGAIN_S
        self.request, self.settled = request, False
        self.end.board.take_place(self.place, request)
        yield
        self.once = not again
        self.end.queue(Ticket(self.end.member_number, self.place, request))
        yield
        return self.again_s

    def read(self, grip: Grip) -> Got | None:
        if not self.bound:
            return None
        got = self.end.receive(self.box, grip)
        if got is not None and got[0].request == self.request:
            self.settled = self.once
        return got

    def peek(self) -> Moved | None:
        packet = self.box[0] if self.bound and self.box else None
        return packet.message if packet is not None and isinstance(packet.message, Moved) else None

    def wake(self) -> None:
        self.end.wake(Ticket(self.end.member_number, self.place, 0))


@dataclass(eq=False, slots=True)
class Thread:
    """A thread that waits at a wait socket.

    `until` is what it is blocked for; `hand` what it has taken and not adopted.
    """

    wait_socket: WaitSocket
    deadline: float
    waiter: Waiter | None  # none on the fast path
    steps: Steps = field(default_factory=lambda: _nothing())
    grip: Grip = field(default_factory=lambda: Grip(b""))
    until: Callable[[], bool] | None = None
    hand: Got | None = None

    @property
    def ready(self) -> bool:
        return self.until is None or self.until()


@dataclass(eq=False, slots=True)
class LaneGiving:
    """A thread that gives in the lane."""

    closing: Closing
    conn: Conn
    live: Live
    grip: Grip
    steps: Steps = field(default_factory=lambda: _nothing())


def _nothing() -> Steps:
    yield


class InTheLane(AtTheDesk):
    """The part of a worker that is in its pool's lane."""

    world: World
    id: bytes
    cache: Cache
    messages: BrokerMessages
    waiters: list[Waiter]
    patience: dict[int, bool]
    users: list[Conn]
    connecting: list[Lease]
    quitting: list[Waiter]
    closing: list[tuple[Closing, Conn]]
    epoch: int

    def __init__(self, *, handover: bool, slice_s: float) -> None:
        super().__init__(handover=handover, slice_s=slice_s)
        self.end: End | None = None
        self.index = -1
        self.unused: list[int] = []  # places
        self.wait_sockets: list[WaitSocket] = []
        self.free_wait_sockets: list[WaitSocket] = []
        self.threads: list[Thread] = []
        self.lane_giving: list[LaneGiving] = []
        self.lain = False
        self.parted_at = float("-inf")
        self.timer_at = float("inf")
        self.stray = Grip(b"")
        self.unfit = 0  # so many that come next fail their reset
        self._turn = 0
        self.most_wait_sockets = PLACES
        self.invitation: tuple[LaneInvitation, Lane, int] | None = None  # of which broker
        self.woken: list[Waiter] = []  # at their locks, to take a wait socket
        self.abandoned: list[Waiter] = []  # an interrupt has ended the clean-up too
        self.left_wait_sockets: list[
            tuple[WaitSocket, int]
        ] = []  # in the same way, and for how many beats more

    # --- the lane

    def read_home(self) -> None:
        """The link reads what came on the session's line: `Session.invited`."""
        assert self.desk is not None
        packet = self.desk.down.popleft()
        message, lane = packet.message, packet.lane
        assert isinstance(message, LaneInvitation)
        assert isinstance(lane, Lane)
        self.invitation = message, lane, self.epoch
        if self.established:
            self.accept()

    def accept(self) -> None:
        """`Session._accept`, `LaneMembership.enter`."""
        invitation, self.invitation = self.invitation, None
        if invitation is None or not self.hands_over or invitation[2] != self.epoch:
            return
        message, lane, _ = invitation
        assert self.desk is not None
        self.leave_lane()
        # A former end here may still have wait sockets at its addresses: its number is another.
        self.end = End(lane, message.member_number, self.id, self._refuse, self._is_short)
        self.index = message.index
        self.unused = [
            message.index * PLACES + wait_socket
            for wait_socket in range(self.most_wait_sockets - 1, -1, -1)
        ]
        self.cache.enter_lane(lane.board.moving_flag)
        self.woken = [waiter for waiter in self.waiters if self._waits_at_lock(waiter)]
        self.desk.say(Joined(self.id))
        self.flush()

    def _waits_at_lock(self, waiter: Waiter) -> bool:
        waits = waiter.request in self.cache.waiting and not self.waits_in_lane(waiter)
        return waits and waiter not in self.quitting and waiter not in self.abandoned

    def take_freed_wait_socket(self) -> None:
        """`Wait._change_place`: a thread that waits at a lock was woken, and takes a wait socket,
        if there is one."""
        waiter = self.woken.pop(0)
        if self._waits_at_lock(waiter) and (wait_socket := self._take_wait_socket()) is not None:
            self._start(waiter, wait_socket, float("inf"))
            self.cache.waiters.change_place(waiter, wait_socket.place, self.world.now)
            self.flush()

    def _start(self, waiter: Waiter, wait_socket: WaitSocket, deadline: float) -> None:
        thread = Thread(wait_socket, deadline, waiter, grip=Grip(self.id))
        thread.steps = self._wait_at(thread, waiter)
        self.threads.append(thread)

    def _refuse(self, moved: Moved) -> None:
        self.messages.refuse(moved, self.world.now)
        self.flush()

    def _is_short(self) -> bool:
        if self.lacks is not Lack.SOCKET:
            return False
        self.lacks = Lack.NOTHING
        return True

    def leave_lane(self, *, former_brokers: bool = False) -> None:
        end, self.end = self.end, None
        self.cache.leave_lane()
        if end is None:
            return
        wait_sockets, self.wait_sockets, self.free_wait_sockets, self.unused = (
            self.wait_sockets,
            [],
            [],
            [],
        )
        while (
            former_brokers
            and (got := run(end.take(self.stray)) or self._read(wait_sockets)) is not None
        ):
            live = structs.replace(got[0].live, generation=self.cache.generation)
            self._take_stray((structs.replace(got[0], live=live), got[1]))
        for wait_socket in wait_sockets:
            wait_socket.wake()
        end.close()

    def _read(self, wait_sockets: list[WaitSocket]) -> Got | None:
        return next(
            (
                got
                for wait_socket in wait_sockets
                if (got := wait_socket.read(self.stray)) is not None
            ),
            None,
        )

    def wake_at_wait_socket(self, waiter: Waiter) -> None:
        for thread in self.threads:
            if thread.waiter is waiter:
                thread.wait_socket.wake()

    def waits_in_lane(self, waiter: Waiter) -> bool:
        return any(thread.waiter is waiter for thread in self.threads)

    # --- wait sockets

    def _take_wait_socket(self) -> WaitSocket | None:
        if self.free_wait_sockets:
            wait_socket = self.free_wait_sockets.pop()
            wait_socket.looks = -1
            return wait_socket
        if self.end is None or not self.unused:
            return None
        if self.lacks is Lack.WAIT_SOCKET:
            self.lacks = Lack.NOTHING
            return None
        place = self.unused.pop()
        wait_socket = WaitSocket(self.end, place, self.end.lane.bind(self.end.member_number, place))
        self.wait_sockets.append(wait_socket)
        return wait_socket

    def _put_wait_socket(self, wait_socket: WaitSocket) -> None:
        wait_socket.end.board.leave_place(wait_socket.place)
        if wait_socket in self.wait_sockets:  # else of a lane that was left
            if not wait_socket.settled:
                wait_socket.looks = 0
            self.free_wait_sockets.append(wait_socket)

    @property
    def wait_socket_news(self) -> bool:
        """Whether the link sees that something came to a wait socket where nobody waits."""
        return any(
            wait_socket.looks >= 0 and wait_socket.box for wait_socket in self.free_wait_sockets
        )

    def look_in_lane(self) -> None:
        """`Session.receive_strays`."""
        if self.end is None:
            self.note_arrivals()
            return
        for wait_socket in list(self.free_wait_sockets):
            if wait_socket.looks < 0:
                continue
            if (got := wait_socket.read(self.stray)) is not None:
                self._take_stray(got)
            elif wait_socket.looks < _LOOKS:
                wait_socket.looks += 1
            else:
                wait_socket.looks, wait_socket.settled = -1, True
        self.note_arrivals()
        self.give_kept()

    def note_arrivals(self) -> None:
        if self.end is not None:
            self.cache.reporter.unread = [
                moved
                for wait_socket in self.wait_sockets
                if (moved := wait_socket.peek()) is not None
            ]
        # Also from a lane that was left since.
        in_hand = {holder for proc in self.world.server.procs for holder in proc.holders}
        self.cache.reporter.unsure = any(thread.grip in in_hand for thread in self.threads)

    def beat_in_lane(self) -> None:
        """`WaitSockets.check_all`, and a look."""
        for wait_socket in list(self.free_wait_sockets):
            if (got := wait_socket.read(self.stray)) is not None:
                self._take_stray(got)
        left, self.left_wait_sockets = self.left_wait_sockets, []
        for wait_socket, beats in left:
            if beats:
                self.left_wait_sockets.append((wait_socket, beats - 1))
            else:
                wait_socket.settled = False
                self._put_wait_socket(wait_socket)
        self.look_in_lane()
        self.find_abandoned()

    def find_abandoned(self) -> None:
        """`Session._find_abandoned`, and what `Session.beat` does with a lease that came later.

        No thread goes on with that lease: it is closed. A real process waits for another beat.
        """
        abandoned, self.abandoned = self.abandoned, []
        for waiter in [waiter for waiter in abandoned if waiter in self.waiters]:
            self.waiters.remove(waiter)
            lease, waiter.lease = waiter.lease, None
            if self.cache.waiters.withdraw(waiter) or lease is None:
                continue
            if lease.conn is None:
                self.cache.closed(lease, ReleaseReason.CLOSED, gone=lease.ref is None)
            elif self.cache.leases.get(lease.token) is lease:
                reason = ReleaseReason.CLOSED
                self._to_close([self.cache.close(lease, lease.conn, reason, self.world.now)])
        self.flush()

    def give_kept(self) -> None:
        now = self.world.now
        for lease in list(self.cache.idle) if self.cache.moving_flag[0] else ():
            if now - lease.since >= STEADY_GAP_S:
                self._settle(lease)
            else:
                self.timer_at = min(self.timer_at, now + STEADY_GAP_S)

    def _settle(self, lease: Lease) -> None:
        outcome = self.cache.reconsider_idle(lease, self.world.now)
        if isinstance(outcome, Closing):
            self._to_close([outcome])
        else:
            self.wake(outcome)
        self.flush()

    def _take_stray(self, got: Got) -> None:
        waiter = self._receive(got, self.stray)
        if waiter is not None:
            self.wake(waiter)
        elif (lease := self.cache.leases.get(got[0].token)) is not None and self.cache.moving_flag[
            0
        ]:
            self._settle(lease)
        self.flush()

    # --- taking

    def take_fast_path(self, waiter: Waiter, wait_s: float) -> bool:
        """Wait in the lane, if connections move in it, the fast path; return whether this thread
        does."""
        if not wait_s or not self.cache.moving_flag[0] or self.end is None:
            return False
        self._turn += 1
        if self._turn % 2:
            wait_socket = self._take_wait_socket()
            if wait_socket is not None:
                thread = Thread(wait_socket, self.world.now + wait_s, None, grip=Grip(self.id))
                thread.steps = self._step_fast_path(thread, waiter)
                self.threads.append(thread)
                return True
        return False

    def wait(self, waiter: Waiter, wait_s: float) -> None:
        """`Wait.wait`: at a wait socket, if there is one; else at a lock, where a waiter has no
        thread here."""
        now, cache = self.world.now, self.cache
        waiter.reset(now)
        self.waiters.append(waiter)
        wait_socket = self._take_wait_socket()
        moving = (
            bool(wait_s)
            and wait_socket is not None
            and wait_socket.bound
            and wait_socket.end.board.moving
        )
        if (
            not moving
            and not wait_s
            and any(held.phase is Phase.CLOSING for held in cache.leases.values())
        ):
            cache.outbox.append(cache.reporter.renewal(now, {}))
        cache.waiters.enqueue(
            waiter,
            wait_s,
            place=-1 if wait_socket is None else wait_socket.place,
            waits_for_move=moving,
        )
        self.patience[waiter.request] = wait_s > 0
        if wait_socket is not None:
            self._start(waiter, wait_socket, now + wait_s)
        self.flush()

    def step(self, thread: Thread) -> None:
        """A thread in the lane goes on."""
        next(thread.steps, None)
        self.flush()

    def _block(self, thread: Thread, again_at: float) -> Steps:
        wait_socket, until = (
            thread.wait_socket,
            min(thread.deadline, again_at, self.world.now + AGAIN_S),
        )
        thread.until = lambda: (
            bool(wait_socket.box) or self.world.now >= until or not wait_socket.bound
        )
        yield
        thread.until = None

    def _step_fast_path(self, thread: Thread, waiter: Waiter) -> Steps:
        """`Mover._wait`."""
        wait_socket, end = thread.wait_socket, thread.wait_socket.end
        again_at, now, request = float("-inf"), self.world.now, 0
        began = now
        if self.lain:
            thread.hand = yield from end.take(thread.grip)
        while True:
            if thread.hand is None:
                self.lain = False
                if now >= thread.deadline or not end.board.moving or not self._is_in(end):
                    break
                if now >= again_at:
                    request = request or self.cache.waiters.new_request()
                    again_at = now + (yield from wait_socket.enter(request))
                    thread.hand = yield from end.take(thread.grip)
                    if thread.hand is not None:
                        self.lain = True
                        continue
                yield from self._block(thread, again_at)
                thread.hand = wait_socket.read(thread.grip)
            now = self.world.now
            if thread.hand is not None and thread.hand[0].passed is not None:
                token = thread.hand[0].token
                yield from self._take_in(thread)
                if (lease := self.cache.leases.get(token)) is not None:
                    self._settle(lease)
            if thread.hand is not None and (yield from self._adopt_short(thread, began)):
                self.threads.remove(thread)
                self._put_wait_socket(wait_socket)
                return
        self.threads.remove(thread)
        self._put_wait_socket(wait_socket)
        self.take_slow_path(waiter, thread.deadline)

    def _is_in(self, end: End) -> bool:
        return end.open

    def take_slow_path(self, waiter: Waiter, deadline: float) -> None:
        """`Checkout._wait`, from its beginning."""
        raise NotImplementedError

    def _adopt_short(self, thread: Thread, began: float) -> Generator[None, None, bool]:
        """`Mover._adopt`."""
        assert thread.hand is not None
        (moved, proc), cache = thread.hand, self.cache
        cache.arriving[moved.token] = moved, lambda: proc
        yield
        fits = self._is_fit(proc)
        thread.hand = None
        if not fits:
            proc.holders.discard(thread.grip)
            if cache.leases.get(moved.token) is None:
                self._refuse(moved)
            cache.arriving.pop(moved.token, None)
            return False
        now = self.world.now
        conn = self._own(proc, thread.grip)
        lease = Lease(moved.token, None, now)
        lease.idle_s = began - self.parted_at
        lease.cache, lease.backend, lease.generation, lease.live = (
            cache,
            moved.live.backend,
            moved.live.generation,
            moved.live,
        )
        lease.cell, lease.moves, lease.deposited, lease.movable = (
            moved.cell,
            moved.moves,
            True,
            True,
        )
        lease.phase, lease.ref = Phase.IN_USE, weakref.ref(conn)
        conn.lease = lease
        cache.leases[moved.token] = lease
        self.users.append(conn)
        cache.arriving.pop(moved.token, None)
        return True

    def _own(self, proc: Proc, grip: Grip) -> Conn:
        """Put a socket into a connection of this process's: from now on it can be
        written to here."""
        proc.holders.discard(grip)
        proc.holders.add(self.id)
        self.adopted += 1
        return Conn(proc, movable=True)

    def _is_fit(self, proc: Proc) -> bool:
        """Whether the reset's answer is as it should be."""
        if self.unfit:
            self.unfit -= 1
            return False
        return not (proc.dead or proc.cut)

    def _wait_at(self, thread: Thread, waiter: Waiter) -> Steps:
        """`Wait._step`, until the waiter is settled."""
        wait_socket, end = thread.wait_socket, thread.wait_socket.end
        again_at = float("-inf")
        yield
        while not waiter.is_done:
            now = self.world.now
            if not wait_socket.bound:
                self._leave_wait_socket(thread, waiter, now)
                return
            if not waiter.waits_for_move:
                thread.deadline = float("inf")  # the broker's answer comes by then
                yield from self._block(thread, thread.deadline)
                thread.hand = wait_socket.read(thread.grip)
            elif now >= thread.deadline or not end.board.moving:
                self.cache.waiters.ask(waiter, now)
            elif now >= again_at:
                if again_at == float("-inf"):
                    thread.hand = yield from end.take(thread.grip)
                if thread.hand is None:
                    again_at = now + (yield from wait_socket.enter(waiter.request))
                    thread.hand = yield from end.take(thread.grip)
            else:
                yield from self._block(thread, again_at)
                thread.hand = wait_socket.read(thread.grip)
            if thread.hand is not None:
                yield from self._take_in(thread)
        self.threads.remove(thread)
        wait_socket.settled = wait_socket.settled and waiter.broker_is_done
        self._put_wait_socket(wait_socket)
        lease = waiter.lease
        if (
            waiter in self.waiters
            and lease is not None
            and lease.conn is None
            and lease not in self.connecting
        ):
            self.connecting.append(lease)

    def _leave_wait_socket(self, thread: Thread, waiter: Waiter, now: float) -> None:
        """`Wait._change_place`: the lane was left; this thread waits at a lock, or takes a wait
        socket in another lane.
        """
        self.threads.remove(thread)
        self._put_wait_socket(thread.wait_socket)
        self.cache.waiters.change_place(waiter, -1, now)
        if (wait_socket := self._take_wait_socket()) is not None:
            self._start(waiter, wait_socket, thread.deadline)
            self.cache.waiters.change_place(waiter, wait_socket.place, now)
        elif waiter.waits_for_move:
            self.cache.waiters.ask(waiter, now)
        self.flush()

    def _take_in(self, thread: Thread) -> Steps:
        """`moving.take_in`."""
        assert thread.hand is not None
        moved = thread.hand[0]
        self.cache.arriving[moved.token] = moved, lambda: moved
        yield
        got, thread.hand = thread.hand, None
        other = self._receive(got, thread.grip)
        if other is not None and other is not thread.waiter:
            self.wake(other)

    def _receive(self, got: Got, grip: Grip) -> Waiter | None:
        """`Receiver.receive`."""
        moved, proc = got
        lacks, self.lacks = self.lacks, Lack.NOTHING
        self.cache.arriving.pop(moved.token, None)
        if self.broken_shells or lacks is Lack.SHELL or not self._is_fit(proc):
            proc.holders.discard(grip)
            self._refuse(moved)
            if self.broken_shells:
                self.handover = self.hands_over = False
            return None
        if moved.passed is not None and moved.passed.trial:
            self.cache.outbox.append(CancelQuery(moved.token, trial=True))
        conn = self._own(proc, grip)
        left = moved.live.left_ms
        retire_at = float("inf") if left is None else self.world.now + left / 1000
        try:
            return self.messages.received(moved, conn, retire_at, self.world.now)
        except SharedPoolError:
            proc.holders.discard(self.id)
            proc.cut = True
            self._refuse(moved)
            return None

    def interrupt(self, thread: Thread, *, twice: bool = False) -> None:
        """An exception is raised in a waiting thread; `twice`: another one while it cleans up."""
        self.threads.remove(thread)
        if thread.hand is not None:
            moved, proc = thread.hand
            proc.holders.discard(thread.grip)
            if moved.token in self.cache.arriving:
                del self.cache.arriving[moved.token]
                self._refuse(moved)
        waiter = thread.waiter
        if waiter is not None:
            thread.wait_socket.settled = thread.wait_socket.settled and waiter.broker_is_done
        if twice and (waiter is None or not waiter.is_done):
            if thread.wait_socket in self.wait_sockets:
                self.left_wait_sockets.append((thread.wait_socket, 1))
            if waiter is not None:
                self.abandoned.append(waiter)
            return
        self._put_wait_socket(thread.wait_socket)
        if waiter is not None:
            self._give_up(waiter)

    def _give_up(self, waiter: Waiter) -> None:
        if waiter in self.waiters:
            self.waiters.remove(waiter)
            self.wake(self.cache.give_up(waiter, self.world.now))
        self.flush()

    # --- giving

    def may_move(self, closing: Closing, conn: Conn) -> bool:
        """`Giver.may_give`, of what is given while connections move."""
        lease, end = closing.lease, self.end
        if (
            not self.hands_over
            or not conn.movable
            or not lease.deposited
            or lease.backend is None
            or not conn.works
        ):
            return False
        if end is None or not end.open or lease.cancelled:
            return False
        lease.cell = end.board.find(lease.token, lease.cell)
        return lease.cell >= 0 and lease.generation == end.board.generation

    def lay_back(self, closing: Closing, conn: Conn) -> bool:
        laid = self.cache.keep_after_all(closing.lease, conn, self.world.now)
        self.flush()
        return laid

    def checkin_short(self, lease: Lease, conn: Conn) -> bool:
        """`Mover.give`: return whether it was done."""
        cache, end, now = self.cache, self.end, self.world.now
        self._turn += 1
        if self._turn % 2 == 0 or not cache.moving_flag[0] or cache.returns_due or end is None:
            return False
        if now - lease.arrived_at < self.slice_s and lease.idle_s < STEADY_GAP_S:
            self.timer_at = min(self.timer_at, now + self.slice_s + STEADY_GAP_S)
            lease.conn, lease.phase, lease.since = conn, Phase.IDLE, now
            cache.idle.append(lease)
            return True
        if (
            lease.cancelled
            or not (lease.deposited and lease.movable)
            or cache.waiting
            or now >= lease.retire_at
        ):
            return False
        if cache.leases.get(lease.token) is not lease or lease.generation != end.board.generation:
            return False
        lease.cell = end.board.find(lease.token, lease.cell)
        if lease.cell < 0 or lease.backend is None:
            return False
        self.timer_at = float("inf")
        lease.phase, lease.since = Phase.CLOSING, now
        self.give_in_lane(Closing(lease, ReleaseReason.SHARED), conn)
        return True

    def give_in_lane(self, closing: Closing, conn: Conn) -> LaneGiving:
        """A reset was sent; the session is taken from under its connection."""
        lease, proc = closing.lease, conn.proc
        self.cache.giving(lease)
        assert not proc.busy, "a reset in the middle of a query"
        assert lease.backend is not None
        assert self.end is not None
        left = (
            None
            if lease.retire_at == float("inf")
            else max(0, int((lease.retire_at - self.world.now) * 1000))
        )
        live = Live(lease.backend, lease.generation, b"parameters", left)
        giving = LaneGiving(closing, conn, live, Grip(self.id))  # its witness
        conn.vacated = True
        assert self.id in proc.holders
        proc.holders.discard(self.id)
        proc.holders.add(giving.grip)
        giving.steps = self._give_in_lane(giving, self.end)
        self.lane_giving.append(giving)
        return giving

    def _give_in_lane(self, giving: LaneGiving, end: End) -> Steps:
        closing, proc = giving.closing, giving.conn.proc
        lease = closing.lease
        yield
        done = yield from end.give(MovingConnection(lease.token, lease.cell, giving.live, proc))
        yield
        if not done:  # `give_to_broker`
            done = self._say_given(closing, giving.live)
        self.lane_giving.remove(giving)
        proc.holders.discard(giving.grip)
        if done:
            self.cache.given(lease)
            self.parted_at = self.world.now
            self.cache.time_slice.note_given(self.world.now)
        else:
            proc.cut = True
            self.cache.closed(lease, closing.reason, gone=proc.seen_dead)
        self.flush()

    def _say_given(self, closing: Closing, live: Live) -> bool:
        raise NotImplementedError

    def step_giving(self, giving: LaneGiving | Giving) -> None:
        if isinstance(giving, Giving):
            self.go_on_giving(giving)
        else:
            next(giving.steps, None)

    # --- the end

    def die_in_lane(self) -> None:
        for proc in self.world.server.procs:
            proc.holders -= {
                x for x in proc.holders if isinstance(x, Grip) and x.process == self.id
            }
        self.threads.clear()
        self.lane_giving.clear()
        if self.end is not None:
            self.end.close()

    def _to_close(self, closing: list[Closing]) -> None:
        raise NotImplementedError

    def wake(self, waiter: Waiter | None) -> None:
        raise NotImplementedError


def run(steps: Generator[None, None, T]) -> T:
    """Do it in one go."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return cast("T", end.value)
