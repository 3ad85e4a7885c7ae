"""The threads of one process that wait for a lease, and where each was asked for: by the link or at the desk. Pure.

The caller holds the pool's lock. Messages go into the cache's outbox.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque

from msgspec import structs

from sharedpool.wire.messages import Acquire, Cancel, Deny, Renew, ToBroker
from sharedpool.worker.lease import Ticket
from sharedpool.worker.slices import Slices

_LONGEST_WAIT_MS = 2**52
# What was asked at the desk so long ago is listed in the heartbeat: the broker knows of it by now, or not any more.
ASKED_S = 1.0
_MOST_ASKED = 10_000


def wait_ms(wait_s: float) -> int:
    """Return a wait as a request carries it: milliseconds, at least 1 for who wants to wait at all."""
    return 0 if wait_s <= 0 else int(min(max(wait_s * 1000, 1), _LONGEST_WAIT_MS))


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

    def want(self, ticket: Ticket, wait_s: float, *, at_desk: bool = False, in_lane: bool = False) -> None:
        """Queue a ticket, here and at the broker; `wait_s` 0 asks for an answer at once.

        `at_desk`: the caller asks there itself; `in_lane`: the broker need not know.
        """
        ticket.request = self.new_request()
        ticket.wait_ms = wait_ms(wait_s)
        ticket.at_desk = ticket.to_ask = at_desk
        ticket.in_lane = in_lane
        ticket.asks = int(not in_lane)
        self._slices.asked(ticket.since)
        self.waiting[ticket.request] = ticket
        self._asked_at[ticket.request] = ticket.since
        if len(self._asked_at) > _MOST_ASKED:
            self._asked_at.popitem(last=False)
        if not (at_desk or in_lane):
            self.out.append(Acquire(ticket.request, ticket.wait_ms))

    def withdraw(self, ticket: Ticket) -> bool:
        """Take a ticket out that waits no more, as far as anybody knows of it; return whether it still did."""
        if self.waiting.get(ticket.request) is not ticket:
            return False
        self.settle(ticket)
        if ticket.asks:
            self.out.append(Cancel(ticket.request))
        ticket.in_lane = ticket.to_ask = False
        return True

    def first(self, now: float) -> Acquire | None:
        """Return what the first who waits asks for, for a HELLO that is said now."""
        for request, ticket in self.waiting.items():
            if self._along[0] != request:  # else an earlier HELLO may be what is answered
                self._along = request, now
            return Acquire(request, ticket.wait_ms)
        return None

    def registered(self, served: int, *, hands_over: bool) -> list[Ticket]:
        """Note what a WELCOME says of those who wait: request number `served` will be answered as it was said along.

        Where connections can be handed over the others ask at the desk instead: only there one can be passed to them.
        Return their tickets, to be woken for that. Who does not want to wait is answered by link all the same.
        """
        moved = [
            ticket
            for ticket in self.waiting.values()
            if hands_over and ticket.wait_ms and not ticket.at_desk and ticket.request != served
        ]
        self._along = (0, 0.0)
        requests = {ticket.request for ticket in moved}
        unsent = [
            x for x in self.out if not (isinstance(x, Acquire) and (x.request in requests or x.request == served))
        ]
        self.out.clear()
        for each in unsent:
            if isinstance(each, Renew):  # there the broker is not to miss what it has not been asked for yet
                pending = [request for request in each.pending if request not in requests]
                self.out.append(structs.replace(each, pending=pending))
            else:
                self.out.append(each)
        for ticket in moved:
            ticket.at_desk = ticket.to_ask = True
            ticket.asks += 1
        return moved

    def ask_by_link(self, ticket: Ticket, *, again: bool = False) -> None:
        """Ask for a ticket in the ordinary way: its line to the desk is gone.

        `again`: even if that was done before, since what was passed on the line may have been the answer to it.
        """
        if (ticket.at_desk or again) and self.waiting.get(ticket.request) is ticket:
            ticket.at_desk = ticket.to_ask = ticket.in_lane = False
            ticket.asks += 1
            self.out.append(Acquire(ticket.request, ticket.wait_ms))

    def ask_anew(self, ticket: Ticket, now: float) -> None:
        """Ask once more for a ticket: what it was granted could not be used."""
        self._asked_at[ticket.request] = now
        self.ask_by_link(ticket, again=True)

    def settle(self, ticket: Ticket) -> None:
        """Take a ticket out: its wait is over."""
        del self.waiting[ticket.request]

    def ask_again(self) -> None:
        """Ask for every ticket by the link: the broker knows of none."""
        self.out.extend(Acquire(request, ticket.wait_ms) for request, ticket in self.waiting.items())
        for ticket in self.waiting.values():
            ticket.at_desk = ticket.to_ask = ticket.in_lane = False
            ticket.asks += 1

    def granted_at(self, request: int, waited_s: float, now: float) -> float:
        """Return when a request was granted, or an earlier moment: it had waited for so long then."""
        return min(now, self._asked_at.pop(request, float("-inf")) + waited_s)

    def start_over(self, now: float, served: int) -> None:
        """Note that another broker is asked from now on; for request number `served` it was when HELLO was said."""
        self._asked_at = OrderedDict.fromkeys(self.waiting, now)
        if served in self.waiting:
            self._asked_at[served] = self._along[1] if self._along[0] == served else float("-inf")

    def pending(self, now: float) -> list[int]:
        """Return the requests of which the broker should know by now."""
        return [
            request
            for request, ticket in self.waiting.items()
            if not (ticket.at_desk or ticket.in_lane) or (ticket.at_desk and now - ticket.since >= ASKED_S)
        ]

    def denied(self, deny: Deny) -> Ticket | None:
        """Take in a refusal; return the ticket to wake."""
        self._asked_at.pop(deny.request, None)
        ticket = self.waiting.get(deny.request)
        if ticket is not None:
            self.settle(ticket)
            ticket.denial = deny
        return ticket

    def fail(self, error: Exception) -> list[Ticket]:
        """End every wait with `error`; return the tickets to wake."""
        tickets = list(self.waiting.values())
        for ticket in tickets:
            self.settle(ticket)
            ticket.error = error
        return tickets
