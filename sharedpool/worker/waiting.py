"""One thread's wait for a lease: where it waits, for what, and until when.

Where: at a *wait socket* in the pool's lane, if this process is a member and has one left. Another
process or the broker can send a connection there. Else at a lock, for a grant. The place may change
during the wait, when this process enters or leaves the lane, or when a wait socket comes back.

For what: while connections move past the broker, the thread queues in the lane, and the broker need
not know. Otherwise, and at the deadline, it asks the broker.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from sharedpool.descriptors.owned import Owned
from sharedpool.descriptors.wakeup import WaitLock
from sharedpool.errors import PoolClosed, PoolError
from sharedpool.lane.wait_sockets import AGAIN_S, WaitSocket, WaitSockets
from sharedpool.wire.desk import Moved
from sharedpool.wire.values import Phase
from sharedpool.worker import error_messages
from sharedpool.worker.core.lease import Lease, Waiter
from sharedpool.worker.threads import thread_names

if TYPE_CHECKING:
    from sharedpool.worker.link.link import Link
    from sharedpool.worker.link.registration import Registration
    from sharedpool.worker.local_pool import LocalPool

# How long a caller with `timeout=0` waits for the broker's answer: of a running one, of one that
# has to be started, and one at a given address that has not answered yet.
ANSWER_LIMIT_S = 3.0
START_LIMIT_S = 25.0
CONNECT_LIMIT_S = 5.0
# The broker's refusal, which names the holders, may come this much after the deadline.
_GRACE_S = 0.06


class Wait:
    """One thread's wait until `deadline`. With `wait_s` 0 it wants an answer at once."""

    _link: Link
    _registration: Registration

    def __init__(self, local: LocalPool, waiter: Waiter, wait_s: float, deadline: float) -> None:
        self._local = local
        self._waiter = waiter
        self._wait_s = wait_s
        self._deadline = deadline
        self._waiting_at: WaitSocket | WaitLock = WaitLock()
        # The lane's wait sockets: of which this thread has one, or queues for one.
        self._wait_sockets: WaitSockets | None = None
        self._again_at = -math.inf  # when to join the lane's queue, or to join it again
        self._limit = math.inf  # until when the broker must have answered
        self._asked_at = math.inf  # when the broker was asked

    def wait(self) -> Lease | None:
        """Block until the waiter is done, and return None; or return an idle lease that was found.

        Raise `PoolClosed`, or `PoolError` if the broker does not answer.
        """
        try:
            self._take_wait_socket()
            if (lease := self._begin()) is not None:
                return lease
            while not self._waiter.is_done:
                self._step(time.monotonic())
        finally:
            self._leave()
        return None

    # --- where

    def _take_wait_socket(self) -> bool:
        """Wait at a wait socket from now on; return False if none is free."""
        wait_sockets, wait_lock = self._local.membership.wait_sockets, self._waiting_at
        assert isinstance(wait_lock, WaitLock)
        wait_socket = (
            None if wait_sockets is None else wait_sockets.take(self._waiter.owner, wait_lock)
        )
        if wait_socket is None:
            return False
        self._waiting_at, self._wait_sockets = wait_socket, wait_sockets
        return True

    def _line_up(self) -> None:
        """Queue for a wait socket, because all are taken."""
        wait_sockets, wait_lock = self._local.membership.wait_sockets, self._waiting_at
        assert isinstance(wait_lock, WaitLock)
        if wait_sockets is not None and wait_sockets is not self._wait_sockets:
            self._wait_sockets = wait_sockets
            wait_sockets.line_up(wait_lock)

    def _change_place(self) -> bool:
        """Change to the best place to wait; return True if it is another.

        1. At a wait socket of a lane that was left: go to a lock.
        2. At a lock: go to a wait socket, if one is free.
        Afterwards the state is looked at again, because the wake-up may have come at the old place.
        """
        waiting_at, wait_sockets = self._waiting_at, self._wait_sockets
        if isinstance(waiting_at, WaitSocket) and not waiting_at.is_open:
            self._waiting_at, self._wait_sockets = WaitLock(), None
        elif isinstance(waiting_at, WaitSocket) or not self._take_wait_socket():
            return False
        self._again_at = -math.inf
        with self._local.lock:
            self._waiter.wake = self._waiting_at.wake
            self._local.cache.waiters.change_place(self._waiter, self._place, time.monotonic())
        if isinstance(waiting_at, WaitSocket) and wait_sockets is not None:
            wait_sockets.give_back(waiting_at)  # only now: until then a grant wakes it there
        self._local.wake_link()
        return True

    @property
    def _place(self) -> int:
        """The place in the lane, or -1. The lock must be held.

        The link's thread may have left the lane a moment ago, so the lane is compared.
        """
        return (
            self._waiting_at.place
            if self._wait_sockets is self._local.membership.wait_sockets
            else -1
        )

    def _moves(self) -> bool:
        """Return True if connections move past the broker and can reach this thread.

        They can if it has a wait socket, or will get one.
        """
        waiting_at = self._waiting_at
        if not self._wait_s:
            return False
        if isinstance(waiting_at, WaitSocket):
            return waiting_at.is_open and waiting_at.board.moving
        wait_sockets = self._local.membership.wait_sockets
        return (
            wait_sockets is not None
            and wait_sockets.lane.open
            and wait_sockets.lane.board.moving
            and wait_sockets.can_be_had
        )

    def _leave(self) -> None:
        waiting_at, wait_sockets = self._waiting_at, self._wait_sockets
        if wait_sockets is None:
            return
        if isinstance(waiting_at, WaitLock):
            wait_sockets.step_out(waiting_at)
        else:
            waiting_at.is_quiet = waiting_at.is_quiet and self._waiter.broker_is_done
            wait_sockets.give_back(waiting_at)
            if not waiting_at.is_quiet:
                self._local.wake_link()  # to watch it for late arrivals

    # --- for what

    def _begin(self) -> Lease | None:
        """Queue the waiter, in the lane or at the broker; return an idle lease if one is found."""
        local, waiter, cache = self._local, self._waiter, self._local.cache
        waiter.wake = self._waiting_at.wake
        waiter.reset(time.monotonic())
        with local.lock:
            if local.disposed:
                raise PoolClosed(f"pool {local.config.name!r} is disposed")
            if (lease := cache.take(waiter.since)) is not None:
                return lease
            self._link, self._registration = local.ensure_link()
            self._limit = (
                self._deadline + _GRACE_S if self._wait_s else waiter.since + self._patience_s()
            )
            moving = self._moves()
            if not moving:
                self._asked_at = waiter.since
            if not moving and self._broker_must_know():
                cache.outbox.append(cache.reporter.renewal(waiter.since, thread_names()))
            left_s = self._wait_s and max(0.001, self._deadline - waiter.since)
            cache.waiters.enqueue(waiter, left_s, place=self._place, waits_for_move=moving)
            # A checkin without the lock may have laid a connection idle before it saw this waiter.
            if cache.idle and (lease := cache.take(waiter.since)) is not None:
                cache.give_up(waiter, waiter.since)
                return lease
        if not moving:
            self._link.wake()
        return None

    def _broker_must_know(self) -> bool:
        """Return True if the broker must first hear what is held here.

        1. With `timeout=0`, while a slot is on its way back: else the broker refuses at once.
        2. With `debug_checkouts`: a refusal names the lines of code of the checkouts.
        """
        local = self._local
        if not self._wait_s and any(
            held.phase is Phase.CLOSING for held in local.cache.leases.values()
        ):
            return True
        return local.config.debug_checkouts

    def _step(self, now: float) -> None:
        """Do what comes next: change the place, ask, join the queue, or wait."""
        waiter = self._waiter
        if self._change_place():
            return
        if not waiter.waits_for_move:
            left_s = self._limit - now
            if left_s <= 0:
                raise self._unanswered()
            self._wait_once(left_s)
        elif now >= self._deadline or not self._moves():
            self._ask_broker(now)
        elif now >= self._again_at:
            self._join_queue(now)
        else:
            self._wait_once(min(self._deadline - now, self._again_at - now, AGAIN_S))

    def _join_queue(self, now: float) -> None:
        """Join the queue in the lane; without a wait socket, the queue for one.

        Look at the shelf before, because with a connection there nobody has to wait. Look again
        after the ticket is written: a giver that saw no ticket has shelved its connection.
        """
        wait_socket = self._waiting_at
        if isinstance(wait_socket, WaitLock):
            self._again_at = now + AGAIN_S
            self._line_up()
            return
        first = self._again_at == -math.inf
        if first and (got := wait_socket.take_from_shelf()) is not None:
            self._receive(got)
            return
        self._again_at = now + wait_socket.join_queue(self._waiter.request)
        if (got := wait_socket.take_from_shelf()) is not None:
            self._receive(got)

    def _ask_broker(self, now: float) -> None:
        """Ask the broker.

        1. Connections no longer move past it.
        2. The deadline has come: the broker's refusal names the holders.
        """
        with self._local.lock:
            if self._waiter.is_done:
                return
            self._asked_at = now
            self._local.cache.waiters.ask(self._waiter, now)
        self._local.wake_link()

    def _wait_once(self, left_s: float) -> None:
        if (got := self._waiting_at.wait(left_s)) is not None:
            self._receive(got)

    def _receive(self, got: tuple[Moved, Owned]) -> None:
        """Receive a connection from the lane, for this thread or for another that waits."""
        other = self._local.receiver.receive(*got, self._limit - time.monotonic())
        if other is not None and other is not self._waiter:
            other.wake()
        if isinstance(self._waiting_at, WaitSocket):
            self._waiting_at.busy = False

    # --- a broker that does not answer

    def _patience_s(self) -> float:
        """Return how long a caller with `timeout=0` waits for the broker's answer."""
        if self._registration.established:
            return ANSWER_LIMIT_S
        return CONNECT_LIMIT_S if self._local.config.broker else START_LIMIT_S

    def _unanswered(self) -> PoolError:
        registration, name, now = self._registration, self._local.config.name, time.monotonic()
        # A thread that waited in the lane asked only at its deadline. A live broker may be late.
        heard = self._asked_at >= self._deadline or self._link.heard_at >= self._asked_at
        if self._wait_s and registration.established and heard:
            return error_messages.timed_out(name, self._local.limit, self._wait_s)
        waited_s = now - (self._deadline - self._wait_s)  # since the caller's get_conn
        return error_messages.unanswered(
            name, self._link.address, now - self._asked_at, waited_s, registration.trouble
        )
