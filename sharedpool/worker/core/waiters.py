"""The threads of one process that wait for a lease, and whether each was asked for at the broker. Pure.

The caller holds the pool's lock. Messages go into the cache's outbox.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque

from msgspec import structs

from sharedpool.wire.messages import Acquire, Cancel, Deny, ToBroker
from sharedpool.worker.core.lease import Ticket
from sharedpool.worker.core.time_slice import Slices

_LONGEST_WAIT_MS = 2**52
_MOST_ASKED = 10_000


def _acquire(ticket: Ticket, now: float) -> Acquire:
    """Return a ticket's request. Who wants to wait at all waits a millisecond at least."""
    left_s = 0.0 if ticket.until is None else ticket.until - now
    wait_ms = 0 if ticket.until is None else int(min(max(left_s * 1000, 1), _LONGEST_WAIT_MS))
    return Acquire(ticket.request, wait_ms, ticket.place)


class Tickets:
    """Tickets by the number of their request, in the order in which they came. `out` is the cache's outbox."""

    def __init__(self, out: deque[ToBroker], slices: Slices) -> None:
        self.waiting: OrderedDict[int, Ticket] = OrderedDict()
        self.out = out
        self._slices = slices
        self._requests = itertools.count(1)
        self._along = (0, 0.0)  # the request that was said along with a HELLO, and since when
        self._asked_at: OrderedDict[int, float] = OrderedDict()  # by request, also of tickets that were given up

    def new_request(self) -> int:
        """Return the number of another request. Needs no lock."""
        return next(self._requests)

    def want(self, ticket: Ticket, wait_s: float, *, place: int = -1, in_lane: bool = False) -> None:
        """Queue a ticket, here and at the broker; `wait_s` 0 asks for an answer at once.

        `place`: where it waits in the pool's lane, if it does; `in_lane`: the broker need not know.
        """
        ticket.request, ticket.until = self.new_request(), ticket.since + wait_s if wait_s > 0 else None
        ticket.place, ticket.in_lane, ticket.asks = place, in_lane, 0
        self._slices.asked(ticket.since)
        self.waiting[ticket.request] = ticket
        if not in_lane:
            self.ask(ticket, ticket.since)

    def withdraw(self, ticket: Ticket) -> bool:
        """Take a ticket out that waits no more, as far as anybody knows of it; return whether it still did."""
        if self.waiting.get(ticket.request) is not ticket:
            return False
        self.settle(ticket)
        if ticket.asks:
            self.out.append(Cancel(ticket.request))
        ticket.in_lane = False
        return True

    def serve(self, ticket: Ticket) -> None:
        """Take a ticket out that has its answer; whatever the broker may still have of it is to be forgotten there."""
        self.settle(ticket)
        if not ticket.finished:
            self.out.append(Cancel(ticket.request))

    def first(self, now: float) -> Acquire | None:
        """Return what the first who waits asks for, for a HELLO that is said now.

        Its place is not told: it may be in a former broker's lane. What answers a HELLO is a slot.
        """
        for request, ticket in self.waiting.items():
            if self._along[0] != request:  # else an earlier HELLO may be what is answered
                self._along = request, now
            return structs.replace(_acquire(ticket, now), place=-1)
        return None

    def leave_lane(self) -> None:
        """Note that nobody waits in a lane any more: each will say where he waits then."""
        for ticket in self.waiting.values():
            ticket.place = -1

    def registered(self, served: int, now: float) -> None:
        """Note that request number `served`, which was said along with a HELLO, will be answered by that.

        The others are said only now, perhaps long after it: so much less they still wait.
        """
        self._along = (0, 0.0)
        unsent = list(self.out)
        self.out.clear()
        for each in unsent:
            if not isinstance(each, Acquire):
                self.out.append(each)
            elif each.request != served and (ticket := self.waiting.get(each.request)) is not None:
                self.out.append(_acquire(ticket, now))

    def ask(self, ticket: Ticket, now: float) -> None:
        """Ask the broker for a ticket: for the first time, or once more, since what it was given could not be used."""
        ticket.in_lane = False
        ticket.asks += 1
        self._asked_at[ticket.request] = now
        if len(self._asked_at) > _MOST_ASKED:
            self._asked_at.popitem(last=False)
        self.out.append(_acquire(ticket, now))

    def move(self, ticket: Ticket, place: int, now: float) -> None:
        """Have a ticket wait at another place in the lane, or (-1) nowhere there."""
        ticket.place = place
        if ticket.asks and self.waiting.get(ticket.request) is ticket:
            ticket.asks += 1
            self.out.append(_acquire(ticket, now))

    def settle(self, ticket: Ticket) -> None:
        """Take a ticket out: its wait is over."""
        del self.waiting[ticket.request]

    def ask_again(self, now: float) -> None:
        """Ask for every ticket: the broker knows of none."""
        for request, ticket in self.waiting.items():
            self.ask(ticket, self._asked_at.get(request, now))

    def granted_at(self, request: int, waited_s: float, now: float) -> float:
        """Return when a request was granted, or an earlier moment: it had waited for so long then."""
        return min(now, self._asked_at.pop(request, float("-inf")) + waited_s)

    def start_over(self, now: float, served: int) -> None:
        """Note that another broker is asked from now on; for request number `served` it was when HELLO was said."""
        self._asked_at = OrderedDict.fromkeys(self.waiting, now)
        if served in self.waiting:
            self._asked_at[served] = self._along[1] if self._along[0] == served else float("-inf")

    def pending(self) -> list[int]:
        """Return the requests of which the broker should know by now."""
        return [request for request, ticket in self.waiting.items() if not ticket.in_lane]

    def denied(self, deny: Deny) -> Ticket | None:
        """Take in a refusal; return the ticket to wake."""
        self._asked_at.pop(deny.request, None)
        ticket = self.waiting.get(deny.request)
        if ticket is not None:
            ticket.denial = deny
            self.serve(ticket)
        return ticket

    def fail(self, error: Exception) -> list[Ticket]:
        """End every wait with `error`; return the tickets to wake."""
        tickets = list(self.waiting.values())
        for ticket in tickets:
            self.settle(ticket)
            ticket.error = error
        return tickets
