"""For how long a process keeps a connection that others want, because it uses it all the time. Pure: no clock.

A transfer costs more than a short transaction does: a worker that asks again at once has a slice of time for each
connection, a longer one where that must be closed in place of moving, and a longer one while nobody is known to wait.
"""

from __future__ import annotations

from sharedpool.worker.core.lease import Lease

# Who asks again so soon after a checkin is at work all the time.
STEADY_GAP_S = 0.001
# A close and a connect take so many times what a hand-over does, and more.
_BY_CLOSE = 10
# The broker tells of a waiter within its NUDGE_S; a transfer every so many slices costs next to nothing.
_ALONE = 10


class TimeSlice:
    """One cache's. `slice_s` is 0 where there are none; `hands_over`: what can move is given in place of being closed.

    `others_wait`: others are known to wait. `gap_s` is the pause between what was last given up and the next request.
    """

    def __init__(self) -> None:
        self.slice_s = 0.0
        self.hands_over = False
        self.others_wait = False
        self.gap_s = float("inf")
        self._parted_at = float("-inf")

    def note_given(self, now: float) -> None:
        """Note that something which others wait for was given up, closed or given: its user goes on now."""
        self._parted_at = now

    def note_request(self, now: float) -> None:
        """Note a request."""
        self.gap_s = now - self._parted_at

    def keeps(self, lease: Lease, now: float) -> bool:
        """Say whether a connection that others want is kept at its checkin."""
        slice_s = self.slice_s * (1 if lease.movable and self.hands_over else _BY_CLOSE)
        if not self.others_wait:
            slice_s *= _ALONE
        return now - lease.arrived_at < slice_s and lease.idle_s < STEADY_GAP_S

    def wastes(self, lease: Lease, now: float) -> bool:
        """Say whether a connection lies idle that was kept for a checkout which did not come."""
        return self.slice_s > 0 and (
            now - lease.since >= STEADY_GAP_S or not self.keeps(lease, now)
        )
