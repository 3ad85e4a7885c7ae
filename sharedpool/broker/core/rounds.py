"""Rounds: refuse impatient requests (`timeout=0`), but only on every holder's word.

The broker does not know exactly what is idle in the workers' caches. So before it refuses such a
request, it asks every holder, and each must have answered *after* the request arrived that it has
nothing idle. One such question to all holders is a *round*:

1. `begin` asks, on behalf of all requests that no round has covered yet.
2. While answers are missing, nothing happens here; idle leases that answers report are recalled
   and granted as usual.
3. With the last answer, `finish` refuses the requests of the round that no slot is coming for.

Requests that arrive during a round are covered by the next one. So a stream of them costs one
question per holder and round, not one per request.
"""

from __future__ import annotations

from itertools import islice, takewhile

from sharedpool.broker.core.context import Context
from sharedpool.broker.core.demand import shortage, shortage_of_cap
from sharedpool.broker.core.denials import Denials
from sharedpool.broker.core.fences import Fences
from sharedpool.broker.core.handover import Handover
from sharedpool.broker.core.recalls import Recalls
from sharedpool.broker.core.records import Pool, Waiter
from sharedpool.wire.messages import DenyReason


class Rounds:
    """The rounds of one broker, one at a time."""

    def __init__(
        self,
        context: Context,
        recalls: Recalls,
        fences: Fences,
        handover: Handover,
        denials: Denials,
    ) -> None:
        self._slots = context.slots
        self._recalls = recalls
        self._fences = fences
        self._handover = handover
        self._denials = denials
        self._round = 0
        self._last_arrival = 0  # the newest recall when the last impatient request arrived

    def note_arrival(self) -> None:
        """Record that an impatient request arrives: it needs answers to later recalls."""
        self._last_arrival = self._recalls.newest

    def run(self, now: float) -> None:
        """Finish the current round if all have answered, then begin the next one.

        The next round may need no answers at all; then it ends at once.
        """
        if any(pool.nowaits for pool in self._slots.contended.values()):
            # First finish, then begin: a stream of requests would put refusals off for ever.
            self._finish(now)
            self._begin(now)
            self._finish(now)

    def _begin(self, now: float) -> None:
        if self._recalls.polled:
            return
        requests = self._not_covered()
        if not requests:
            return
        self._round += 1
        for waiter in requests:
            waiter.round = self._round
        # A session knows its own cache: if no other session asks, it need not be asked.
        askers = {waiter.session.id for waiter in requests}
        for pool in self._pools_to_ask(requests):
            for session in pool.holders:
                if askers == {session.id}:
                    continue
                if session.asked <= self._last_arrival:
                    self._recalls.send(session, now)
                if session.answered < session.asked:
                    self._recalls.polled[session.id] = session.asked

    def _not_covered(self) -> list[Waiter]:
        """Return the impatient requests without a round, except where enough slots are coming."""
        requests: list[Waiter] = []
        any_pool = bool(self._slots.groups) or shortage_of_cap(self._slots) > 0
        for pool in self._slots.contended.values():
            if any_pool or shortage(pool) > 0:
                # The newest are at the end: those before the first one with a round have one too.
                newest_first = reversed(pool.nowaits.values())
                requests += takewhile(lambda waiter: waiter.round is None, newest_first)
        return requests

    def _pools_to_ask(self, requests: list[Waiter]) -> list[Pool]:
        """Return the requests' pools, or all where any pool's slot would serve them."""
        slots = self._slots
        if slots.max_conn is not None and (slots.room <= 0 or slots.groups):
            return list(slots.pools.values())
        return list(dict.fromkeys(waiter.session.pool for waiter in requests))

    def _finish(self, now: float) -> None:
        """Refuse the requests of the round for which no slot is coming, if all have answered."""
        if self._recalls.polled:
            return
        for pool in list(self._slots.contended.values()):
            if not pool.nowaits:
                continue
            unserved = islice(pool.waiters.values(), self._coming(pool, now), None)
            refused = [
                waiter
                for waiter in unserved
                if waiter.nowait and waiter.round is not None and waiter.seq <= pool.refusable
            ]
            # These requests do not wait for a fence to end. It is ordered all the same, for the
            # next caller: with impatient callers only, suspect leases would fill the pool for ever.
            any_pool = pool.own_room > 0
            pools = list(self._slots.pools.values()) if any_pool else [pool]
            self._fences.fence_suspects(pools, len(refused), now)
            for waiter in refused:
                self._denials.deny(waiter, DenyReason.EXHAUSTED, now)

    def _coming(self, pool: Pool, now: float) -> int:
        """Return how many of a pool's waiters will be served by what is free or on its way."""
        slots = self._slots
        promised = self._handover.promised(pool, now) + self._handover.on_shelf(pool)
        kin = [pool] if pool.group is None else pool.group.pools
        by_own_limit = max(pool.room, 0) + sum(each.coming for each in kin) + promised
        coming = sum(each.coming for each in slots.pools.values())
        by_cap = slots.available(pool) + coming + promised
        return max(0, min(by_own_limit, by_cap))
