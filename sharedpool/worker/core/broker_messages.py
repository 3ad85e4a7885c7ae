"""What the broker's messages do to a pool's cache, and the registration with a broker.

Pure: no I/O, no clock.

Messages may be lost, repeated, or overtaken by others, and a broker may be replaced by another.
These rules make each message safe to handle at any time:

1. A GRANT of a former broker (another epoch) is dropped. A connection that such a broker has
   passed on is refused.
2. A GRANT at or below the newest one is a repetition and is dropped.
3. A RECALL at or below the newest one is a repetition and is dropped.
4. `returns_due` is absolute, not a difference. GRANT, RECALL and a connection that another
   process has passed on carry it with a serial. Only a newer serial replaces it.
5. A new epoch starts all serials anew.

The caller holds the pool's lock around every method. Afterwards it wakes the waiters and closes the
leases that the method has returned.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping

from sharedpool.errors import SharedPoolError
from sharedpool.wire.desk import Moved
from sharedpool.wire.messages import Acquire, Grant, Recall, Release, ReleaseReason
from sharedpool.wire.values import NO_TOKEN, LeaseReport, Phase, Token
from sharedpool.worker.core.cache import Cache
from sharedpool.worker.core.lease import Closing, Lease, Waiter, collected


class BrokerMessages:
    """Handles the messages for one cache."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._epoch: int | None = None  # of the broker that sent the newest WELCOME
        self._returns_serial = 0  # of the message that `returns_due` comes from
        self._recall_serial = 0  # of the newest RECALL
        self._is_new = True  # until the first HELLO: no broker can know anything of this cache

    def granted(self, grant: Grant, now: float) -> Waiter | None:
        """Handle a GRANT; return the waiter to wake.

        The lease goes to the waiter that asked. If that waiter has gone, it goes to the next one,
        or back to the broker.
        """
        cache, reporter = self._cache, self._cache.reporter
        if grant.token.epoch != self._epoch:
            return None
        if self._take_returns_due(grant.serial, grant.returns_due, grant.returns_due > 0):
            cache.report_idle(now)
        if grant.token in cache.leases or grant.token <= reporter.newest_grant:
            return None
        reporter.newest_grant = grant.token
        lease = cache.leases[grant.token] = Lease(grant.token, None, now)
        lease.cache, lease.generation = cache, cache.generation
        lease.idle_s = cache.time_slice.gap_s
        lease.reached_directly, lease.refused_with = grant.direct, grant.code
        granted_at = cache.waiters.granted_at(grant.request, grant.waited_ms / 1000, now)
        lease.connect_by = granted_at + cache.connects_within_s
        waiter = cache.waiting.get(grant.request)
        if now > lease.connect_by:  # too late to connect: the broker may have taken the slot back
            cache.closed(lease, ReleaseReason.UNUSED, gone=True)
            if waiter is not None:
                cache.waiters.ask(waiter, now)
            return None
        if waiter is None:
            return cache.give_to_thread_or_keep(lease, None, now)
        waiter.answered = True
        cache.waiters.serve(waiter)
        cache.assign(lease, None, waiter, now)
        return waiter

    def received(self, message: Moved, conn: object, retire_at: float, now: float) -> Waiter | None:
        """Handle an open connection from the broker or another process; return the waiter to wake.

        Raise `SharedPoolError` if a former broker has passed the connection on: it must not be
        used.
        """
        cache, passed = self._cache, message.passed
        if passed is not None:
            if message.token.epoch != self._epoch:
                raise SharedPoolError(f"lease {message.token} was passed on by a former broker")
            self._take_returns_due(passed.serial, passed.returns_due, passed.others_wait)
        lease = Lease(message.token, None, now)
        lease.cell, lease.moves = message.cell, message.moves
        lease.cache, lease.idle_s = cache, cache.time_slice.gap_s
        if retire_at != math.inf:
            cache.note_retirement(retire_at)
        lease.backend, lease.generation = message.live.backend, message.live.generation
        lease.retire_at = retire_at
        lease.conn, lease.ref = conn, weakref.ref(conn, collected)
        lease.deposited = lease.needs_configure = lease.movable = True
        # Last: whenever an interrupt falls in between, the heartbeat finds only a complete lease,
        # which tells that its connection is gone.
        cache.leases[message.token] = lease
        waiter = cache.waiting.get(message.request)
        if waiter is None:
            return cache.give_to_thread_or_keep(lease, conn, now)
        waiter.answered = passed is not None
        cache.waiters.serve(waiter)
        cache.assign(lease, conn, waiter, now)
        return waiter

    def refuse(self, message: Moved, now: float) -> None:
        """Give back a connection that cannot be used here, and ask for a slot instead."""
        cache = self._cache
        release = Release(message.token, False, ReleaseReason.FAILED, message.live.backend)
        cache.outbox.append(release)
        cache.reporter.released(release)
        if (waiter := cache.waiting.get(message.request)) is not None:
            waiter.lane_place = -1
            cache.waiters.ask(waiter, now)

    def recalled(self, recall: Recall, now: float, threads: Mapping[int, str]) -> list[Closing]:
        """Handle a RECALL: take out idle leases, longest idle first, and answer with a RENEW."""
        if recall.serial <= self._recall_serial:
            return []
        self._recall_serial = recall.serial
        cache = self._cache
        # A passed connection may have overtaken this RECALL: then only its `returns_due` is
        # outdated.
        self._take_returns_due(recall.serial, recall.returns_due, recall.returns_due > 0)
        closing = cache.expire(now) if recall.expired else []
        for _ in range(recall.take):
            if (lease := cache.pop_oldest_idle()) is not None:
                closing.append(cache.close(lease, lease.conn, ReleaseReason.TAKEN, now))
        for lease in list(cache.idle):
            if (
                cache.returns_due
                and cache.time_slice.wastes(lease, now)
                and cache.remove_idle(lease)
            ):
                cache.returns_due -= 1
                closing.append(cache.close(lease, lease.conn, ReleaseReason.RETURN_DUE, now))
        if recall.answer:
            cache.outbox.append(cache.reporter.renewal(now, threads, answers=recall.serial))
        return closing

    def register(
        self, now: float, threads: Mapping[int, str]
    ) -> tuple[list[LeaseReport], Token, Acquire | None]:
        """Start over with a broker; return HELLO's leases, newest grant and first request.

        The outbox is composed anew, since the broker may have lost, or never received, what was
        sent before:

        1. Unsent RELEASEs stay. HELLO lists their leases as closing; only the RELEASE tells whether
           the backend has ended.
        2. Every waiter is asked for again. A request that the broker has queued keeps its place.
        3. A RENEW follows. It removes withdrawn requests from the broker's queue, which the very
           first HELLO has no need of.
        """
        cache = self._cache
        unsent = [message for message in cache.outbox if isinstance(message, Release)]
        cache.outbox.clear()
        cache.outbox.extend(unsent)
        self._forget_serials()
        cache.waiters.ask_for_all(now)
        if not self._is_new or self._epoch is not None:
            cache.outbox.append(cache.reporter.renewal(now, threads))
        self._is_new = False
        closing = [
            LeaseReport(release.token, Phase.CLOSING, 0, "", release.backend)
            for release in unsent
            if release.backend is not None or not release.gone  # else it never had a connection
        ]
        # A lease being given to another process may be in use there already: it is not claimed.
        given = {
            token
            for token, lease in cache.leases.items()
            if lease.phase is Phase.CLOSING and lease.conn is None
        }
        held = [each for each in cache.reporter.held(now, threads) if each.token not in given]
        return held + closing, cache.reporter.newest_grant, cache.waiters.first_request(now)

    def welcomed(self, epoch: int, generation: int, now: float, served: int = 0) -> list[Closing]:
        """Handle a WELCOME; return leases to close.

        Grants of a former broker that have not arrived are lost. `served` is the request from the
        HELLO that this broker answers without being asked again, or 0.
        """
        cache = self._cache
        if epoch == self._epoch:
            return self.renew_generation(generation, now)
        self._epoch, cache.reporter.newest_grant = epoch, NO_TOKEN
        cache.waiters.start_over(now, served)
        self._forget_serials()  # a former broker's message may have come since our HELLO
        # A new broker counts generations anew: it takes over all leases as they are.
        cache.generation = generation
        for lease in cache.leases.values():
            lease.generation = generation
        return []

    def renew_generation(self, generation: int, now: float) -> list[Closing]:
        """Take out all idle leases of older generations. Those in use follow at their checkin."""
        cache = self._cache
        if generation <= cache.generation:
            return []
        cache.generation = generation
        for lease in cache.leases.values():
            lease.fast_checkin = False
        stale = [
            lease
            for lease in list(cache.idle)
            if lease.generation < generation and cache.remove_idle(lease)
        ]
        return [cache.close(lease, lease.conn, ReleaseReason.STALE, now) for lease in stale]

    def _forget_serials(self) -> None:
        self._cache.returns_due = self._returns_serial = self._recall_serial = 0

    def _take_returns_due(self, serial: int, returns_due: int, others_wait: bool) -> bool:
        """Set `returns_due`; return False if a newer message has set it."""
        if serial <= self._returns_serial:
            return False
        self._returns_serial = serial
        self._cache.returns_due, self._cache.time_slice.others_wait = returns_due, others_wait
        return True
