"""Fences: have a backend ended, and expect its slot back for a while.

A *suspect* lease belongs to a worker that is silent, dead or unsure. Its backend may still work, so
the slot stays counted until the server's side is seen to end: fencing orders that end.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import chain, islice

from sharedpool.broker.core.commands import Fence, Log
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.recalls import ANSWER_LIMIT_S
from sharedpool.broker.core.records import Lease, Pool
from sharedpool.broker.core.slot_states import SlotState


class Fences:
    """All fences of one broker."""

    def __init__(self, context: Context) -> None:
        self._slots = context.slots
        self._epoch = context.epoch
        self._emit = context.emit
        self._arm = context.timers.arm

    def fence_suspects(self, pools: Iterable[Pool], most: int, now: float) -> int:
        """Fence up to `most` suspect leases, longest suspect first; return how many.

        A lease without a connection is left alone: there is nothing to look for, and its worker
        may still connect (see `Leases.watch_connect`).
        """
        suspects = chain.from_iterable(pool.suspects.values() for pool in pools)
        ripe = (lease for lease in suspects if lease.findable and now >= lease.session.spared_until)
        chosen = list(islice(ripe, max(most, 0)))
        for lease in chosen:
            self.begin(lease, "its worker is silent and somebody waits", now)
        return len(chosen)

    def begin(self, lease: Lease, why: str, now: float, *, level: int = logging.INFO) -> None:
        """Have a suspect lease's backend ended and verified; its slot stays counted until then."""
        pool, whose = lease.pool.name, lease.session.label
        pid = lease.backend.pid if lease.backend is not None and lease.backend.pid else "(unknown)"
        fields = {
            "pool": pool,
            "lease": str(lease.token),
            "epoch": self._epoch,
            "session": whose,
            "reason": why,
        }
        text = f"pool {pool!r}: lease {lease.token} of {whose}: ending backend {pid} ({why})"
        self._emit(Log(level, text, fields))
        self._slots.move(lease, SlotState.FENCING, why)
        lease.pool.counters.fences += 1
        lease.since = now
        self.expect(lease, now)
        self.send_order(lease, why)

    def send_order(self, lease: Lease, why: str) -> None:
        """Order the end of a lease's backend."""
        left = lease.left or lease.session.ended
        self._emit(Fence(lease.token, lease.pool.name, lease.backend, why, left))

    def expect(self, lease: Lease, now: float) -> None:
        """Count on the slot of a lease that is being closed or fenced, for `ANSWER_LIMIT_S`."""
        lease.pool.incoming[lease.token] = lease
        self._arm(now + ANSWER_LIMIT_S, self._expectation_over, lease)

    def _expectation_over(self, lease: Lease, now: float) -> None:
        lease.pool.incoming.pop(lease.token, None)  # still counted, but no longer expected soon
