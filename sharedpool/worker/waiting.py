"""One thread's wait for a lease: where it waits, and for what, until its ticket is settled.

It waits at a *seat* in its pool's lane, if this process takes part in that and has one left: there a connection can be
sent to it, by another process or by the broker. Else it waits for a grant, at a lock. It may have to change its place
meanwhile: as this process is let into the lane, or leaves it. While connections move past the broker it queues in the
lane; else it asks the broker.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from sharedpool.descriptors.owned import Owned
from sharedpool.descriptors.wakeup import Gate
from sharedpool.errors import PoolClosed, PoolError
from sharedpool.lane.wait_sockets import AGAIN_S, Seat, Seats
from sharedpool.wire.desk import Moved
from sharedpool.wire.messages import Phase
from sharedpool.worker import error_messages
from sharedpool.worker.core.lease import Lease, Ticket
from sharedpool.worker.threads import thread_names

if TYPE_CHECKING:
    from sharedpool.worker.link.link import Link
    from sharedpool.worker.link.registration import Registration
    from sharedpool.worker.local_pool import Holdings

# How long a caller who does not want to wait waits for the broker's answer: a running one's, and one that starts.
ANSWER_LIMIT_S = 3.0
START_LIMIT_S = 25.0
CONNECT_LIMIT_S = 5.0
# A refusal by the broker says who holds what; it may come this much after the deadline.
_GRACE_S = 0.06


class Wait:
    """One thread's wait, until `deadline`; `wait_s` 0 wants an answer at once."""

    def __init__(self, holdings: Holdings, ticket: Ticket, wait_s: float, deadline: float) -> None:
        self._holdings = holdings
        self._ticket = ticket
        self._wait_s = wait_s
        self._deadline = deadline
        self._place: Seat | Gate = Gate()
        self._seats: Seats | None = None  # whose the place is, or in whose queue it is for one
        self._again_at = -math.inf  # then it joins the queue in the lane, or joins it once more
        self._limit = math.inf  # until when the broker has to answer
        self._asked_at = math.inf  # then it was asked

    def wait(self) -> Lease | None:
        """Block until the ticket is settled; return a lease that lay idle here after all, else None.

        Raise `PoolClosed`, or `PoolError` when the broker does not answer.
        """
        try:
            self._take_seat()
            if (lease := self._begin()) is not None:
                return lease
            while not self._ticket.settled:
                self._go_on(time.monotonic())
        finally:
            self._leave()
        return None

    # --- where

    def _take_seat(self) -> bool:
        """Wait at a seat from now on, if there is one."""
        seats, gate = self._holdings.seats, self._place
        assert isinstance(gate, Gate)
        seat = None if seats is None else seats.take(self._ticket.owner, gate)
        if seat is None:
            return False
        self._place, self._seats = seat, seats
        return True

    def _line_up(self) -> None:
        """Queue for a seat: all are taken."""
        seats, gate = self._holdings.seats, self._place
        assert isinstance(gate, Gate)
        if seats is not None and seats is not self._seats:
            self._seats = seats
            seats.line_up(gate)

    def _change_place(self) -> bool:
        """Wait where one waits best by now; return whether that is elsewhere: it may have been woken where it was."""
        place, seats = self._place, self._seats
        if isinstance(place, Seat) and not place.is_open:
            self._place, self._seats = Gate(), None
        elif isinstance(place, Seat) or not self._take_seat():
            return False
        self._again_at = -math.inf
        with self._holdings.lock:
            self._ticket.wake = self._place.ring
            self._holdings.cache.tickets.move(self._ticket, self._number, time.monotonic())
        if isinstance(place, Seat) and seats is not None:
            seats.put(place)  # only now: until then a grant rings there
        self._holdings.signal()
        return True

    @property
    def _number(self) -> int:
        """Where it is in the lane; -1 for nowhere: it may have been left this moment. The lock is held."""
        return self._place.number if self._seats is self._holdings.seats else -1

    def _moves(self) -> bool:
        """Say whether connections move past the broker, and can be sent to this thread, or will once it has a seat."""
        place = self._place
        if not self._wait_s:
            return False
        if isinstance(place, Seat):
            return place.is_open and place.board.moving
        seats = self._holdings.seats
        return seats is not None and seats.lane.open and seats.lane.board.moving and seats.can_be_had

    def _leave(self) -> None:
        place, seats = self._place, self._seats
        if seats is None:
            return
        if isinstance(place, Gate):
            seats.step_out(place)
        else:
            place.settled = place.settled and self._ticket.finished
            seats.put(place)
            if not place.settled:
                self._holdings.signal()  # the link looks whether something still comes there

    # --- for what

    def _begin(self) -> Lease | None:
        """Take the ticket's place among those that wait; return a lease that lies idle after all."""
        holdings, ticket, cache = self._holdings, self._ticket, self._holdings.cache
        ticket.wake = self._place.ring
        ticket.begin_anew(time.monotonic())
        with holdings.lock:
            if holdings.disposed:
                raise PoolClosed(f"pool {holdings.config.name!r} is disposed")
            if (lease := cache.take(ticket.since)) is not None:
                return lease
            self._link, self._registration = holdings.ensure_link()
            self._limit = self._deadline + _GRACE_S if self._wait_s else ticket.since + self._patience_s()
            in_lane = self._moves()
            if not in_lane:
                self._asked_at = ticket.since
            if not in_lane and self._broker_must_know():
                cache.out.append(cache.renewal(ticket.since, thread_names()))
            left_s = self._wait_s and max(0.001, self._deadline - ticket.since)
            cache.tickets.want(ticket, left_s, place=self._number, in_lane=in_lane)
            # Laid there without the lock meanwhile.
            if cache.idle and (lease := cache.take(ticket.since)) is not None:
                cache.give_up(ticket, ticket.since)
                return lease
        if not in_lane:
            self._link.wake()
        return None

    def _broker_must_know(self) -> bool:
        """Say whether the broker is to be told first what is held here.

        A slot may be on its way back, and it would refuse at once; or a refusal is to name the lines of checkouts.
        """
        holdings = self._holdings
        if not self._wait_s and any(held.phase is Phase.CLOSING for held in holdings.cache.leases.values()):
            return True
        return holdings.config.debug_checkouts

    def _go_on(self, now: float) -> None:
        """Wait for news, and take it in."""
        ticket = self._ticket
        if self._change_place():
            return
        if not ticket.in_lane:
            left_s = self._limit - now
            if left_s <= 0:
                raise self._unanswered()
            self._look(left_s)
        elif now >= self._deadline or not self._moves():
            self._ask_broker(now)
        elif now >= self._again_at:
            self._queue(now)
        else:
            self._look(min(self._deadline - now, self._again_at - now, AGAIN_S))

    def _queue(self, now: float) -> None:
        """Join the queue in the lane; without a seat, the queue for one."""
        seat = self._place
        if isinstance(seat, Gate):
            self._again_at = now + AGAIN_S
            self._line_up()
            return
        # As long as something lies on the shelf nobody need wait. And what was put there between the last look and the
        # ticket's coming nobody will bring.
        first = self._again_at == -math.inf
        if first and (got := seat.look_at_shelf()) is not None:
            self._take_in(got)
            return
        self._again_at = now + seat.enter(self._ticket.request)
        if (got := seat.look_at_shelf()) is not None:
            self._take_in(got)

    def _ask_broker(self, now: float) -> None:
        """Ask the broker: connections move past it no more, or the time is over, and a refusal tells who has them."""
        with self._holdings.lock:
            if self._ticket.settled:
                return
            self._asked_at = now
            self._holdings.cache.tickets.ask(self._ticket, now)
        self._holdings.signal()

    def _look(self, left_s: float) -> None:
        if (got := self._place.wait(left_s)) is not None:
            self._take_in(got)

    def _take_in(self, got: tuple[Moved, Owned]) -> None:
        take_in(self._holdings, got, self._limit - time.monotonic(), self._ticket)
        if isinstance(self._place, Seat):
            self._place.busy = False

    # --- the broker's silence

    def _patience_s(self) -> float:
        """How long to wait for the broker's answer on behalf of a caller who does not want to wait for a slot."""
        if self._registration.established:
            return ANSWER_LIMIT_S
        return CONNECT_LIMIT_S if self._holdings.config.broker else START_LIMIT_S

    def _unanswered(self) -> PoolError:
        registration, name, now = self._registration, self._holdings.config.name, time.monotonic()
        # Who waited in the lane until his time was over has asked only then; a broker that is there may be late.
        heard = self._asked_at >= self._deadline or self._link.heard_at >= self._asked_at
        if self._wait_s and registration.established and heard:
            return error_messages.timed_out(name, self._holdings.limit, self._wait_s)
        waited_s = now - (self._deadline - self._wait_s)  # since its caller has asked for a connection
        return error_messages.unanswered(name, self._link.address, now - self._asked_at, waited_s, registration.trouble)

    _link: Link
    _registration: Registration


def take_in(holdings: Holdings, got: tuple[Moved, Owned], limit_s: float, mine: Ticket | None) -> None:
    """Take in a connection that has come in the lane, for this thread or for whoever waits."""
    other = holdings.receive(*got, limit_s)
    if other is not None and other is not mine:
        other.wake()
