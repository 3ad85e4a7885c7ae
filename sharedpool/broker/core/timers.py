"""The ledger's alarms: callbacks in order of their deadlines.

Most alarms lose their subject long before their deadline: a request is served, a lease ends. Such
an alarm is never called, and `next_deadline` does not count it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

Subject = TypeVar("Subject")

_FEWEST_SWEPT = 256


@dataclass(slots=True, eq=False)
class Alarm:
    """A callback that takes the time; when `subject` is over, it is not called."""

    run: Callable[[float], None]
    subject: object
    cancelled: bool = False


class Timers:
    """A heap of alarms. `is_over(subject)` tells whether an alarm has lost its subject."""

    def __init__(self, is_over: Callable[[object], bool]) -> None:
        self._is_over = is_over
        self._heap: list[tuple[float, int, Alarm]] = []
        self._serial = 0  # keeps alarms of equal deadlines in the order in which they were set
        self._sweep_at = _FEWEST_SWEPT

    def arm(
        self, when: float, callback: Callable[[Subject, float], None], subject: Subject
    ) -> Alarm:
        """Set an alarm: `callback(subject, now)` is called by the first `tick` from `when` on."""
        alarm = Alarm(partial(callback, subject), subject)
        self._serial += 1
        heapq.heappush(self._heap, (when, self._serial, alarm))
        if len(self._heap) > self._sweep_at:
            self._sweep()
        return alarm

    def _sweep(self) -> None:
        """Remove dead alarms: those of served requests would pile up until they are due."""
        self._heap = [entry for entry in self._heap if not self._is_dead(entry[2])]
        heapq.heapify(self._heap)
        self._sweep_at = max(_FEWEST_SWEPT, 2 * len(self._heap))

    def _is_dead(self, alarm: Alarm) -> bool:
        return alarm.cancelled or self._is_over(alarm.subject)

    def pop(self, now: float) -> Alarm | None:
        """Remove and return the first live alarm that is due, or None."""
        due_at = self.next_deadline()
        if due_at is None or due_at > now:
            return None
        return heapq.heappop(self._heap)[2]

    def next_deadline(self) -> float | None:
        """Return when the first live alarm is due, or None."""
        while self._heap and self._is_dead(self._heap[0][2]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def __len__(self) -> int:
        return len(self._heap)
