"""A worker in the lane: what `waiting.py`, `mover.py`, and of the lane `local_pool.py` do (how it
comes into the lane: `lane_membership.py`).

A thread that waits there is a `Thread`, one that gives a `LaneGiving`: generators that go on by a
step whenever they are asked to. Half of the checkouts and checkins go the fast path (`mover.py`),
where that is open.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator

from sharedpool.lane.wait_sockets import AGAIN_S
from sharedpool.wire.desk import Live
from sharedpool.wire.messages import ReleaseReason
from sharedpool.wire.values import Phase
from sharedpool.worker.core.lease import Closing, Lease, Waiter
from sharedpool.worker.core.time_slice import STEADY_GAP_S
from tests.model.desk import Conn, Giving
from tests.model.lane import End, Grip, MovingConnection
from tests.model.lane_membership import LaneMembership
from tests.model.lane_threads import LaneGiving, Steps, Thread, WaitSocket


class InTheLane(LaneMembership):
    """The part of a worker that is in its pool's lane."""

    def __init__(self, *, handover: bool, slice_s: float) -> None:
        super().__init__(handover=handover, slice_s=slice_s)
        self.lane_giving: list[LaneGiving] = []
        self.lain = False
        self.parted_at = float("-inf")
        self._turn = 0

    # --- taking

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
