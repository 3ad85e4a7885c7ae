"""One thread's wait for a lease: where it waits, and for what, until its ticket is settled.

It waits at a *wait socket* in its pool's lane, if this process takes part in that and has one left: there a connection
can be sent to it, by another process or by the broker. Else it waits for a grant, at a lock. It may have to change its
place meanwhile: as this process is let into the lane, or leaves it. While connections move past the broker it queues in
the lane; else it asks the broker.
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

# How long a caller who does not want to wait waits for the broker's answer: a running one's, and one that starts.
ANSWER_LIMIT_S = 3.0
START_LIMIT_S = 25.0
CONNECT_LIMIT_S = 5.0
# A refusal by the broker says who holds what; it may come this much after the deadline.
_GRACE_S = 0.06


class Wait:
    """One thread's wait, until `deadline`; `wait_s` 0 wants an answer at once."""

    def __init__(self, local: LocalPool, waiter: Waiter, wait_s: float, deadline: float) -> None:
        self._local = local
        self._waiter = waiter
        self._wait_s = wait_s
        self._deadline = deadline
        self._waiting_at: WaitSocket | WaitLock = WaitLock()
        self._wait_sockets: WaitSockets | None = (
            None  # whose the place is, or in whose queue it is for one
        )
        self._again_at = -math.inf  # then it joins the queue in the lane, or joins it once more
        self._limit = math.inf  # until when the broker has to answer
        self._asked_at = math.inf  # then it was asked

    def wait(self) -> Lease | None:
        """Block until the ticket is settled; return a lease that lay idle here after all, else None.

        Raise `PoolClosed`, or `PoolError` when the broker does not answer.
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
        """Wait at a wait socket from now on, if there is one."""
        wait_sockets, wait_lock = self._local.wait_sockets, self._waiting_at
        assert isinstance(wait_lock, WaitLock)
        wait_socket = (
            None if wait_sockets is None else wait_sockets.take(self._waiter.owner, wait_lock)
        )
        if wait_socket is None:
            return False
        self._waiting_at, self._wait_sockets = wait_socket, wait_sockets
        return True

    def _line_up(self) -> None:
        """Queue for a wait socket: all are taken."""
        wait_sockets, wait_lock = self._local.wait_sockets, self._waiting_at
        assert isinstance(wait_lock, WaitLock)
        if wait_sockets is not None and wait_sockets is not self._wait_sockets:
            self._wait_sockets = wait_sockets
            wait_sockets.line_up(wait_lock)

    def _change_place(self) -> bool:
        """Wait where one waits best by now; return whether that is elsewhere: it may have been woken where it was."""
        waiting_at, wait_sockets = self._waiting_at, self._wait_sockets
        if isinstance(waiting_at, WaitSocket) and not waiting_at.is_open:
            self._waiting_at, self._wait_sockets = WaitLock(), None
        elif isinstance(waiting_at, WaitSocket) or not self._take_wait_socket():
            return False
        self._again_at = -math.inf
        with self._local.lock:
            self._waiter.wake = self._waiting_at.wake
            self._local.cache.waiters.change_place(self._waiter, self._number, time.monotonic())
        if isinstance(waiting_at, WaitSocket) and wait_sockets is not None:
            wait_sockets.give_back(waiting_at)  # only now: until then a grant rings there
        self._local.wake_link()
        return True

    @property
    def _number(self) -> int:
        """Where it is in the lane; -1 for nowhere: it may have been left this moment. The lock is held."""
        return self._waiting_at.number if self._wait_sockets is self._local.wait_sockets else -1

    def _moves(self) -> bool:
        """Say whether connections move past the broker, and can be sent to this thread, or will once it has a wait
        socket.
        """
        waiting_at = self._waiting_at
        if not self._wait_s:
            return False
        if isinstance(waiting_at, WaitSocket):
            return waiting_at.is_open and waiting_at.board.moving
        wait_sockets = self._local.wait_sockets
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
                self._local.wake_link()  # the link looks whether something still comes there

    # --- for what

    def _begin(self) -> Lease | None:
        """Take the ticket's place among those that wait; return a lease that lies idle after all."""
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
            in_lane = self._moves()
            if not in_lane:
                self._asked_at = waiter.since
            if not in_lane and self._broker_must_know():
                cache.outbox.append(cache.reporter.renewal(waiter.since, thread_names()))
            left_s = self._wait_s and max(0.001, self._deadline - waiter.since)
            cache.waiters.enqueue(waiter, left_s, place=self._number, in_lane=in_lane)
            # Laid there without the lock meanwhile.
            if cache.idle and (lease := cache.take(waiter.since)) is not None:
                cache.give_up(waiter, waiter.since)
                return lease
        if not in_lane:
            self._link.wake()
        return None

    def _broker_must_know(self) -> bool:
        """Say whether the broker is to be told first what is held here.

        A slot may be on its way back, and it would refuse at once; or a refusal is to name the lines of checkouts.
        """
        local = self._local
        if not self._wait_s and any(
            held.phase is Phase.CLOSING for held in local.cache.leases.values()
        ):
            return True
        return local.config.debug_checkouts

    def _step(self, now: float) -> None:
        """Wait for news, and take it in."""
        waiter = self._waiter
        if self._change_place():
            return
        if not waiter.only_in_lane:
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
        """Join the queue in the lane; without a wait socket, the queue for one."""
        wait_socket = self._waiting_at
        if isinstance(wait_socket, WaitLock):
            self._again_at = now + AGAIN_S
            self._line_up()
            return
        # As long as something lies on the shelf nobody need wait. And what was put there between the last look and the
        # ticket's coming nobody will bring.
        first = self._again_at == -math.inf
        if first and (got := wait_socket.take_from_shelf()) is not None:
            self._receive(got)
            return
        self._again_at = now + wait_socket.join_queue(self._waiter.request)
        if (got := wait_socket.take_from_shelf()) is not None:
            self._receive(got)

    def _ask_broker(self, now: float) -> None:
        """Ask the broker: connections move past it no more, or the time is over, and a refusal tells who has them."""
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
        receive_for_any(self._local, got, self._limit - time.monotonic(), self._waiter)
        if isinstance(self._waiting_at, WaitSocket):
            self._waiting_at.busy = False

    # --- the broker's silence

    def _patience_s(self) -> float:
        """How long to wait for the broker's answer on behalf of a caller who does not want to wait for a slot."""
        if self._registration.established:
            return ANSWER_LIMIT_S
        return CONNECT_LIMIT_S if self._local.config.broker else START_LIMIT_S

    def _unanswered(self) -> PoolError:
        registration, name, now = self._registration, self._local.config.name, time.monotonic()
        # Who waited in the lane until his time was over has asked only then; a broker that is there may be late.
        heard = self._asked_at >= self._deadline or self._link.heard_at >= self._asked_at
        if self._wait_s and registration.established and heard:
            return error_messages.timed_out(name, self._local.limit, self._wait_s)
        waited_s = now - (
            self._deadline - self._wait_s
        )  # since its caller has asked for a connection
        return error_messages.unanswered(
            name, self._link.address, now - self._asked_at, waited_s, registration.trouble
        )

    _link: Link
    _registration: Registration


def receive_for_any(
    local: LocalPool, got: tuple[Moved, Owned], limit_s: float, mine: Waiter | None
) -> None:
    """Take in a connection that has come in the lane, for this thread or for whoever waits."""
    other = local.receive(*got, limit_s)
    if other is not None and other is not mine:
        other.wake()
