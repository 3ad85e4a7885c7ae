"""How many connections a pool may have while the server refuses more. Pure: no I/O, no clock.

When a connect fails for a reason that concerns everybody (the server is down, starts up, or is full), the pool may keep
what it has and *probe*: one connect at a time, for the whole fleet, every half second or so. Each probe that succeeds
allows the next one at once, until the limit is reached again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sharedpool.wire.messages import Token

# At most two connects a second while they fail: the probe, and one in the place of a connection that has just gone.
PROBE_EVERY_S = 0.7
_JITTER = 0.3
# The worker that probes may be frozen, or its connect unanswered.
PROBE_LIMIT_S = 2.0


@dataclass(slots=True)
class Backoff:
    """One pool's. `ceiling` None: connects succeed, nothing is held back."""

    random: Callable[[], float]  # from 0 to 1
    ceiling: int | None = None
    error: str = ""
    code: str = ""  # the server's SQLSTATE, if it has answered
    probe_at: float = 0.0
    probe_allowed: bool = False
    probe: Token | None = None

    def allowance(self, limit: int, leases: int, *, connecting: bool = False) -> int:
        """Return how many leases there may be now, of `limit` at best, when there are `leases`.

        A probe is one more than there are, whatever those do: a frozen worker's must not keep the others from trying.
        It is alone (`connecting`: one that is no probe is being connected).
        """
        if self.ceiling is None:
            return limit
        if self.probe is not None:
            return 0
        if self.probe_allowed and not connecting:
            return min(limit, max(self.ceiling, leases) + 1)
        return min(limit, self.ceiling)

    def granted(self, token: Token, others: int, now: float) -> bool:
        """Note a grant beside `others` leases; say whether it is a probe, not to be waited for after `probe_at`."""
        if self.ceiling is None or others < self.ceiling:
            return False
        self.probe_allowed, self.probe = False, token
        self.probe_at = now + PROBE_LIMIT_S
        return True

    def failed(self, token: Token, connected: int, error: str, now: float, code: str = "") -> float:
        """Note a failed connect while `connected` others are open; return when the next may be tried."""
        self.ceiling, self.error, self.code = connected, error, code
        self.probe_allowed = False
        if token == self.probe:
            self.probe = None
        self.probe_at = now + PROBE_EVERY_S * (1 + _JITTER * self.random())
        return self.probe_at

    def elapsed(self, now: float) -> None:
        """Allow the next probe, when its time has come or the last one takes too long."""
        if self.ceiling is not None and now >= self.probe_at:
            self.probe_allowed, self.probe = True, None

    def opened(self, token: Token, connected: int, limit: int) -> None:
        """Note that a connect succeeded; `connected` are open now. The probe's success allows the next."""
        if self.ceiling is None or token != self.probe:
            return
        self.ceiling, self.probe_allowed, self.probe = max(self.ceiling, connected), True, None
        if self.ceiling >= limit:
            self.ceiling, self.error, self.code = None, "", ""

    def ended(self, token: Token) -> None:
        """Note that a lease is over, or that its worker is silent: a probe without an outcome is not waited for."""
        if token == self.probe:
            self.probe_allowed, self.probe = True, None
