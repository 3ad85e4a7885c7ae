"""The threads of one process that wait for a lease, and whether each was asked for at the broker. Pure.

The caller holds the pool's lock. Messages go into the cache's outbox.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque

from msgspec import structs

from sharedpool.wire.messages import Acquire, Deny, ToBroker, Withdraw
from sharedpool.worker.core.lease import Waiter
from sharedpool.worker.core.time_slice import TimeSlice

_LONGEST_WAIT_MS = 2**52
_MOST_ASKED = 10_000


def _acquire(waiter: Waiter, now: float) -> Acquire:
    """Return a waiter's request. Who wants to wait at all waits a millisecond at least."""
    left_s = 0.0 if waiter.until is None else waiter.until - now
    wait_ms = 0 if waiter.until is None else int(min(max(left_s * 1000, 1), _LONGEST_WAIT_MS))
    return Acquire(waiter.request, wait_ms, waiter.lane_place)


class Waiters:
    """Waiters by the number of their request, in the order in which they came. `outbox` is the cache's outbox."""

    def __init__(self, out: deque[ToBroker], time_slice: TimeSlice) -> None:
        self.waiting: OrderedDict[int, Waiter] = OrderedDict()
        self.outbox = out
        self._time_slice = time_slice
        self._requests = itertools.count(1)
        self._along = (0, 0.0)  # the request that was said along with a HELLO, and since when
        self._asked_at: OrderedDict[int, float] = (
            OrderedDict()
        )  # by request, also of waiters that were given up

    def new_request(self) -> int:
        """Return the number of another request. Needs no lock."""
        return next(self._requests)

    def enqueue(
        self, waiter: Waiter, wait_s: float, *, place: int = -1, in_lane: bool = False
    ) -> None:
        """Queue a waiter, here and at the broker; `wait_s` 0 asks for an answer at once.

        `place`: where it waits in the pool's lane, if it does; `in_lane`: the broker need not know.
        """
        waiter.request, waiter.until = (
            self.new_request(),
            waiter.since + wait_s if wait_s > 0 else None,
        )
        waiter.lane_place, waiter.only_in_lane, waiter.times_asked = place, in_lane, 0
        self._time_slice.note_request(waiter.since)
        self.waiting[waiter.request] = waiter
        if not in_lane:
            self.ask(waiter, waiter.since)

    def withdraw(self, waiter: Waiter) -> bool:
        """Take a waiter out that waits no more, as far as anybody knows of it; return whether it still did."""
        if self.waiting.get(waiter.request) is not waiter:
            return False
        self.remove(waiter)
        if waiter.times_asked:
            self.outbox.append(Withdraw(waiter.request))
        waiter.only_in_lane = False
        return True

    def serve(self, waiter: Waiter) -> None:
        """Take a waiter out that has its answer; whatever the broker may still have of it is to be forgotten there."""
        self.remove(waiter)
        if not waiter.broker_is_done:
            self.outbox.append(Withdraw(waiter.request))

    def first_request(self, now: float) -> Acquire | None:
        """Return what the first who waits asks for, for a HELLO that is said now.

        Its place is not told: it may be in a former broker's lane. What answers a HELLO is a slot.
        """
        for request, waiter in self.waiting.items():
            if self._along[0] != request:  # else an earlier HELLO may be what is answered
                self._along = request, now
            return structs.replace(_acquire(waiter, now), lane_place=-1)
        return None

    def leave_lane(self) -> None:
        """Note that nobody waits in a lane any more: each will say where he waits then."""
        for waiter in self.waiting.values():
            waiter.lane_place = -1

    def registered(self, served: int, now: float) -> None:
        """Note that request number `served`, which was said along with a HELLO, will be answered by that.

        The others are said only now, perhaps long after it: so much less they still wait.
        """
        self._along = (0, 0.0)
        unsent = list(self.outbox)
        self.outbox.clear()
        for each in unsent:
            if not isinstance(each, Acquire):
                self.outbox.append(each)
            elif each.request != served and (waiter := self.waiting.get(each.request)) is not None:
                self.outbox.append(_acquire(waiter, now))

    def ask(self, waiter: Waiter, now: float) -> None:
        """Ask the broker for a waiter: for the first time, or once more, since what it was given could not be used."""
        waiter.only_in_lane = False
        waiter.times_asked += 1
        self._asked_at[waiter.request] = now
        if len(self._asked_at) > _MOST_ASKED:
            self._asked_at.popitem(last=False)
        self.outbox.append(_acquire(waiter, now))

    def change_place(self, waiter: Waiter, place: int, now: float) -> None:
        """Have a waiter wait at another place in the lane, or (-1) nowhere there."""
        waiter.lane_place = place
        if waiter.times_asked and self.waiting.get(waiter.request) is waiter:
            waiter.times_asked += 1
            self.outbox.append(_acquire(waiter, now))

    def remove(self, waiter: Waiter) -> None:
        """Take a waiter out: its wait is over."""
        del self.waiting[waiter.request]

    def ask_for_all(self, now: float) -> None:
        """Ask for every waiter: the broker knows of none."""
        for request, waiter in self.waiting.items():
            self.ask(waiter, self._asked_at.get(request, now))

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
        return [request for request, waiter in self.waiting.items() if not waiter.only_in_lane]

    def denied(self, deny: Deny) -> Waiter | None:
        """Take in a refusal; return the waiter to wake."""
        self._asked_at.pop(deny.request, None)
        waiter = self.waiting.get(deny.request)
        if waiter is not None:
            waiter.denial = deny
            self.serve(waiter)
        return waiter

    def fail(self, error: Exception) -> list[Waiter]:
        """End every wait with `error`; return the waiters to wake."""
        waiters = list(self.waiting.values())
        for waiter in waiters:
            self.remove(waiter)
            waiter.error = error
        return waiters
