"""What is counted for a pool for as long as the broker lives, whether or not anybody uses it."""

from __future__ import annotations

from dataclasses import dataclass, field

from sharedpool.broker.core.histograms import Histograms


@dataclass(slots=True, eq=False)
class Counters:
    """One pool's counters; see `wire.reports.PoolReport`."""

    grants: int = 0
    handovers: int = 0
    waits: int = 0  # requests that were granted or handed a connection, but not at once
    denials: int = 0
    timeouts: int = 0
    recalls: int = 0
    fences: int = 0
    overdue: int = 0  # checkouts longer than `max_checkout`
    totals: Histograms = field(default_factory=Histograms)
