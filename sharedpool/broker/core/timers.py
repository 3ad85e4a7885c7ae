"""The ledger's alarms: a heap of deadlines. An alarm whose subject is over costs nothing and wakes nobody."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

_FEWEST_SWEPT = 256


class Timers:
    """Deadlines in order of time, each with what to call. `over(kind, subject)` says whether one still matters."""

    def __init__(self, over: Callable[[str, Any], bool]) -> None:
        self._over = over
        self._heap: list[tuple[float, int, str, Any]] = []
        self._serial = 0
        self._sweep_at = _FEWEST_SWEPT

    def arm(self, when: float, kind: str, subject: object) -> None:
        """Set an alarm."""
        self._serial += 1
        heapq.heappush(self._heap, (when, self._serial, kind, subject))
        if len(self._heap) > self._sweep_at:
            # A request is mostly served long before its deadline: what it leaves behind must not pile up until then.
            self._heap = [entry for entry in self._heap if not self._over(entry[2], entry[3])]
            heapq.heapify(self._heap)
            self._sweep_at = max(_FEWEST_SWEPT, 2 * len(self._heap))

    def pop(self, now: float) -> tuple[str, Any] | None:
        """Take out the first alarm that is due, or None."""
        if not self._heap or self._heap[0][0] > now:
            return None
        _, _, kind, subject = heapq.heappop(self._heap)
        return kind, subject

    def next_deadline(self) -> float | None:
        """Return when the first alarm that still matters is due."""
        while self._heap and self._over(self._heap[0][2], self._heap[0][3]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def __len__(self) -> int:
        return len(self._heap)
