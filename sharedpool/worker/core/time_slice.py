"""How long a process that keeps using a connection may keep it while others want it.

This is the rule while the broker passes connections on. While they move past it, `worker/mover.py`
decides by a simpler one. Pure: no clock.

Passing a connection on costs more than a short transaction. So a worker that asks again at once
keeps each connection for a slice of time. The slice is longer where the connection would have to be
closed instead of moved, and while no other process is known to wait.
"""

from __future__ import annotations

from sharedpool.worker.core.lease import Lease

# A worker that asks again this soon after a checkin is using the connection steadily.
STEADY_GAP_S = 0.001
# Factor for a close and a connect, which cost at least ten times as much as a hand-over.
_CLOSE_FACTOR = 10
# Factor while nobody is known to wait. The broker reports a waiter within `NUDGE_S`
# (`broker/core/handover.py`), and one transfer in ten slices costs next to nothing.
_ALONE_FACTOR = 10


class TimeSlice:
    """The time slice of one cache, while the broker passes connections on."""

    def __init__(self, slice_s: float) -> None:
        self._slice_s = slice_s  # 0 where nothing is kept
        self.hands_over = False  # movable connections are given instead of closed
        self.others_wait = False  # other processes are known to wait
        self.gap_s = float("inf")  # between the last connection given up and the next request
        self._given_at = float("-inf")

    def note_given(self, now: float) -> None:
        """Record that a connection which others want was closed or given away."""
        self._given_at = now

    def note_request(self, now: float) -> None:
        """Record a request."""
        self.gap_s = now - self._given_at

    def keeps(self, lease: Lease, now: float) -> bool:
        """Return True if a connection that others want is to be kept at its checkin."""
        slice_s = self._slice_s * (1 if lease.movable and self.hands_over else _CLOSE_FACTOR)
        if not self.others_wait:
            slice_s *= _ALONE_FACTOR
        return now - lease.arrived_at < slice_s and lease.idle_s < STEADY_GAP_S

    def wastes(self, lease: Lease, now: float) -> bool:
        """Return True if an idle connection was kept for a checkout that has not come."""
        return self._slice_s > 0 and (
            now - lease.since >= STEADY_GAP_S or not self.keeps(lease, now)
        )
