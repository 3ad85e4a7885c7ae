"""How many connections a pool may have while connects fail. Pure: no I/O, no clock.

A connect may fail for a reason that concerns every worker: the server is down, starts up, or is
full. Then the pool keeps what it has and *probes*: one connect at a time, for all its processes,
about every 0.8 s. Each probe that succeeds allows the next one at once, until the limit is reached
again.

| state       | the pool may grow                   | until                                  |
|-------------|-------------------------------------|----------------------------------------|
| `OPEN`      | up to its limit                     | a connect fails                        |
| `HOLDING`   | up to the ceiling                   | `probe_at`                             |
| `PROBE_DUE` | by one                              | a connect is granted, which is a probe |
| `PROBING`   | not at all                          | the probe is over, or `probe_at`       |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from sharedpool.wire.values import Token

# While connects fail there are at most two a second: the probe, and one that replaces a connection
# that was just lost.
PROBE_EVERY_S = 0.7
_JITTER = 0.3
# A probe without an outcome is given up after so long: its worker may be stopped, or its connect
# unanswered.
PROBE_LIMIT_S = 2.0


class BackoffState(Enum):
    """What a pool may do while its connects fail."""

    OPEN = "open"
    HOLDING = "holding"
    PROBE_DUE = "probe due"
    PROBING = "probing"


# In Python 3.11 an attribute of an Enum class takes as long as five names of a module.
OPEN, HOLDING, PROBE_DUE, PROBING = BackoffState


@dataclass(slots=True)
class Backoff:
    """The state of one pool."""

    random: Callable[[], float]  # returns numbers from 0 to 1
    state: BackoffState = OPEN
    ceiling: int = 0  # how many leases there may be, unless OPEN
    error: str = ""  # of the last failed connect; "" while OPEN
    code: str = ""  # its SQLSTATE, if the server has answered
    probe_at: float = 0.0  # when the next probe may be tried, or the one under way is given up
    probe: Token | None = None  # the lease that probes, while PROBING

    @property
    def active(self) -> bool:
        """Return True while connects are held back."""
        return self.state is not OPEN

    def allowance(self, limit: int, leases: int, *, connecting: bool = False) -> int:
        """Return how many leases there may be now, at most `limit`, when there are `leases`.

        A probe is one more than there are, whatever their state is: the leases of a stopped worker
        must not keep the others from trying. `connecting`: a connect that is no probe is under way.
        The probe waits for it, as it could take the last place on a full server.
        """
        match self.state:
            case BackoffState.OPEN:
                return limit
            case BackoffState.PROBING:
                return 0
            case BackoffState.PROBE_DUE if not connecting:
                return min(limit, max(self.ceiling, leases) + 1)
            case _:
                return min(limit, self.ceiling)

    def granted(self, token: Token, others: int, now: float) -> bool:
        """Record a grant beside `others` leases; return True if it is a probe, until `probe_at`."""
        if not self.active or others < self.ceiling:
            return False
        self._change(PROBING, token)
        self.probe_at = now + PROBE_LIMIT_S
        return True

    def failed(self, token: Token, connected: int, error: str, now: float, code: str = "") -> float:
        """Record a failed connect beside `connected` others; return when the next may be tried."""
        self.ceiling, self.error, self.code = connected, error, code
        if self.state is not PROBING or token == self.probe:
            self._change(HOLDING)
        self.probe_at = now + PROBE_EVERY_S * (1 + _JITTER * self.random())
        return self.probe_at

    def end(self) -> None:
        """Allow all connects again: another session of the same role has just succeeded."""
        self._change(OPEN)
        self.error, self.code = "", ""

    def elapsed(self, now: float) -> None:
        """Allow the next probe if it is time, or if the last one has taken too long."""
        if self.active and now >= self.probe_at:
            self._change(PROBE_DUE)

    def opened(self, token: Token, connected: int, limit: int) -> None:
        """Record a successful connect, after which `connected` are open.

        A probe's success allows the next probe, or ends the backoff once the limit is reached.
        """
        if token != self.probe:
            return
        self.ceiling = max(self.ceiling, connected)
        if self.ceiling < limit:
            self._change(PROBE_DUE)
        else:
            self._change(OPEN)
            self.error, self.code = "", ""

    def ended(self, token: Token) -> None:
        """Give up a probe whose lease is over, or whose worker is silent."""
        if token == self.probe:
            self._change(PROBE_DUE)

    def _change(self, state: BackoffState, probe: Token | None = None) -> None:
        self.state, self.probe = state, probe
