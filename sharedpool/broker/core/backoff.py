"""How many connections a pool may have while connects fail. Pure: no I/O, no clock.

A connect may fail for a reason that concerns every worker: the server is down, starts up, or is
full. Then the pool keeps what it has and *probes*: one connect at a time, for all its processes,
about every 0.8 s. Each probe that succeeds allows the next one at once, until the limit is reached
again.

| state       | `ceiling` | `probe_allowed` | `probe`  | the pool may grow                  |
|-------------|-----------|-----------------|----------|------------------------------------|
| open        | None      | False           | None     | up to its limit                    |
| holding     | a number  | False           | None     | up to the ceiling                  |
| probe due   | a number  | True            | None     | by one                             |
| probing     | a number  | False           | a token  | not at all, until the probe is over |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sharedpool.wire.values import Token

# While connects fail there are at most two a second: the probe, and one that replaces a connection
# that was just lost.
PROBE_EVERY_S = 0.7
_JITTER = 0.3
# A probe without an outcome is given up after so long: its worker may be stopped, or its connect
# unanswered.
PROBE_LIMIT_S = 2.0


@dataclass(slots=True)
class Backoff:
    """The state of one pool."""

    random: Callable[[], float]  # returns numbers from 0 to 1
    ceiling: int | None = None  # how many leases there may be; None: as many as the limit
    error: str = ""  # of the last failed connect
    code: str = ""  # its SQLSTATE, if the server has answered
    probe_at: float = 0.0  # when the next probe may be tried, or the one under way is given up
    probe_allowed: bool = False
    probe: Token | None = None

    def allowance(self, limit: int, leases: int, *, connecting: bool = False) -> int:
        """Return how many leases there may be now, at most `limit`, when there are `leases`.

        A probe is one more than there are, whatever their state is: the leases of a stopped worker
        must not keep the others from trying. `connecting`: a connect that is no probe is under way.
        The probe waits for it, as it could take the last place on a full server.
        """
        if self.ceiling is None:
            return limit
        if self.probe is not None:
            return 0
        if self.probe_allowed and not connecting:
            return min(limit, max(self.ceiling, leases) + 1)
        return min(limit, self.ceiling)

    def granted(self, token: Token, others: int, now: float) -> bool:
        """Record a grant beside `others` leases; return True if it is a probe, until `probe_at`."""
        if self.ceiling is None or others < self.ceiling:
            return False
        self.probe_allowed, self.probe = False, token
        self.probe_at = now + PROBE_LIMIT_S
        return True

    def failed(self, token: Token, connected: int, error: str, now: float, code: str = "") -> float:
        """Record a failed connect beside `connected` others; return when the next may be tried."""
        self.ceiling, self.error, self.code = connected, error, code
        self.probe_allowed = False
        if token == self.probe:
            self.probe = None
        self.probe_at = now + PROBE_EVERY_S * (1 + _JITTER * self.random())
        return self.probe_at

    def end(self) -> None:
        """Allow all connects again: another session of the same role has just succeeded."""
        self.ceiling, self.error, self.code = None, "", ""
        self.probe_allowed, self.probe = False, None

    def elapsed(self, now: float) -> None:
        """Allow the next probe if it is time, or if the last one has taken too long."""
        if self.ceiling is not None and now >= self.probe_at:
            self.probe_allowed, self.probe = True, None

    def opened(self, token: Token, connected: int, limit: int) -> None:
        """Record a successful connect, after which `connected` are open.

        A probe's success allows the next probe, or ends the backoff once the limit is reached.
        """
        if self.ceiling is None or token != self.probe:
            return
        self.ceiling, self.probe_allowed, self.probe = max(self.ceiling, connected), True, None
        if self.ceiling >= limit:
            self.ceiling, self.error, self.code = None, "", ""

    def ended(self, token: Token) -> None:
        """Give up a probe whose lease is over, or whose worker is silent."""
        if token == self.probe:
            self.probe_allowed, self.probe = True, None
