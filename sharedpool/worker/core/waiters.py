"""One process's threads that wait for a lease, and their requests to the broker.

Pure: no I/O, no clock.

The caller holds the pool's lock. Messages go to the cache's outbox.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque

from msgspec import structs

from sharedpool.wire.messages import Acquire, Deny, ToBroker, Withdraw
from sharedpool.worker.core.lease import Waiter
from sharedpool.worker.core.time_slice import TimeSlice

_MAX_WAIT_MS = 2**52
_MAX_ASKED = 10_000


def _acquire(waiter: Waiter, now: float) -> Acquire:
    """Return a waiter's request. A waiter that may wait waits for at least a millisecond."""
    left_s = 0.0 if waiter.until is None else waiter.until - now
    wait_ms = 0 if waiter.until is None else int(min(max(left_s * 1000, 1), _MAX_WAIT_MS))
    return Acquire(waiter.request, wait_ms, waiter.lane_place)


class Waiters:
    """The waiters by the number of their request, in the order in which they came."""

    def __init__(self, out: deque[ToBroker], time_slice: TimeSlice) -> None:
        self.waiting: OrderedDict[int, Waiter] = OrderedDict()
        self.outbox = out
        self._time_slice = time_slice
        self._requests = itertools.count(1)
        # The request that the last HELLO carried, and when it was first carried; (0, 0.0) for none.
        self._asked_in_hello = (0, 0.0)
        # When each request was made, also for waiters that have given up.
        self._asked_at: OrderedDict[int, float] = OrderedDict()

    def new_request(self) -> int:
        """Return a new request number. Needs no lock."""
        return next(self._requests)

    def enqueue(
        self, waiter: Waiter, wait_s: float, *, place: int = -1, waits_for_move: bool = False
    ) -> None:
        """Queue a waiter here and at the broker; `wait_s` of 0 asks for an answer at once.

        `place` is the waiter's place in the pool's lane, -1 for none. With `waits_for_move` the
        broker is not asked.
        """
        waiter.request = self.new_request()
        waiter.until = waiter.since + wait_s if wait_s > 0 else None
        waiter.lane_place, waiter.waits_for_move, waiter.times_asked = place, waits_for_move, 0
        self._time_slice.note_request(waiter.since)
        self.waiting[waiter.request] = waiter
        if not waits_for_move:
            self.ask(waiter, waiter.since)

    def withdraw(self, waiter: Waiter) -> bool:
        """Withdraw a waiter without an answer; return False if it has one."""
        if self.waiting.get(waiter.request) is not waiter:
            return False
        self.remove(waiter)
        if waiter.times_asked:
            self.outbox.append(Withdraw(waiter.request))
        waiter.waits_for_move = False
        return True

    def serve(self, waiter: Waiter) -> None:
        """Remove a waiter that has its answer; withdraw a request that may still be queued."""
        self.remove(waiter)
        if not waiter.broker_is_done:
            self.outbox.append(Withdraw(waiter.request))

    def first_request(self, now: float) -> Acquire | None:
        """Return the first waiter's request, to be sent in a HELLO.

        Its place is left out, since it may be in a former broker's lane: the answer to a HELLO is a
        slot.
        """
        for request, waiter in self.waiting.items():
            if self._asked_in_hello[0] != request:  # else the answer may be to the earlier HELLO
                self._asked_in_hello = request, now
            return structs.replace(_acquire(waiter, now), lane_place=-1)
        return None

    def leave_lane(self) -> None:
        """Record that the process has left its lane. Each thread then asks again where it waits."""
        for waiter in self.waiting.values():
            waiter.lane_place = -1

    def registered(self, served: int, now: float) -> None:
        """Handle a WELCOME that answers request `served`, which the HELLO carried (0 for none).

        The other requests are composed anew: they were made for HELLO, perhaps long ago, and have
        less time left.
        """
        self._asked_in_hello = (0, 0.0)
        unsent = list(self.outbox)
        self.outbox.clear()
        for each in unsent:
            if not isinstance(each, Acquire):
                self.outbox.append(each)
            elif each.request != served and (waiter := self.waiting.get(each.request)) is not None:
                self.outbox.append(_acquire(waiter, now))

    def ask(self, waiter: Waiter, now: float) -> None:
        """Ask the broker, or ask again because the last answer could not be used."""
        waiter.waits_for_move = False
        waiter.times_asked += 1
        self._asked_at[waiter.request] = now
        if len(self._asked_at) > _MAX_ASKED:
            self._asked_at.popitem(last=False)
        self.outbox.append(_acquire(waiter, now))

    def change_place(self, waiter: Waiter, place: int, now: float) -> None:
        """Move a waiter to another place in the lane, or with -1 out of it."""
        waiter.lane_place = place
        if waiter.times_asked and self.waiting.get(waiter.request) is waiter:
            waiter.times_asked += 1
            self.outbox.append(_acquire(waiter, now))

    def remove(self, waiter: Waiter) -> None:
        """Remove a waiter whose wait is over."""
        del self.waiting[waiter.request]

    def ask_for_all(self, now: float) -> None:
        """Ask for every waiter anew, as a broker that knows of none needs it."""
        for request, waiter in self.waiting.items():
            self.ask(waiter, self._asked_at.get(request, now))

    def granted_at(self, request: int, waited_s: float, now: float) -> float:
        """Return when the broker granted a request, given how long it waited: never too late."""
        return min(now, self._asked_at.pop(request, float("-inf")) + waited_s)

    def start_over(self, now: float, served: int) -> None:
        """Start anew with another broker.

        It counts each wait from now on, but `served` from its HELLO.
        """
        self._asked_at = OrderedDict.fromkeys(self.waiting, now)
        if served in self.waiting:
            request, asked_at = self._asked_in_hello
            self._asked_at[served] = asked_at if request == served else float("-inf")

    def pending(self) -> list[int]:
        """Return the requests that the broker should know of."""
        return [request for request, waiter in self.waiting.items() if not waiter.waits_for_move]

    def denied(self, deny: Deny) -> Waiter | None:
        """Handle a DENY; return the waiter to wake."""
        self._asked_at.pop(deny.request, None)
        waiter = self.waiting.get(deny.request)
        if waiter is not None:
            waiter.denial = deny
            self.serve(waiter)
        return waiter

    def fail(self, error: Exception) -> list[Waiter]:
        """End all waits with `error`; return the waiters to wake."""
        waiters = list(self.waiting.values())
        for waiter in waiters:
            self.remove(waiter)
            waiter.error = error
        return waiters
