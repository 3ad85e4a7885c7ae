"""How often a worker that the server refuses may try to connect. Pure: no I/O, no clock.

A connect may fail for a reason of its worker's own, such as a wrong password. That holds no other
worker back, but the refused one must not try again and again:

1. Refused for the first time, it may try again at once: it may have a new password by then.
2. Refused again for the same reason, it waits, and twice as long each time.
3. Where many are refused for a reason of their role or their database, they take *turns*: one of
   them tries for all, and when it succeeds, all may.

A session that was not refused itself never waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

RETRY_S = 0.7
_LONGEST_S = 5.6
_JITTER = 0.3

# SQLSTATEs, and classes of them, with which a server refuses everybody: it is full, starts up or
# shuts down.
_NOBODY = ("53", "57P01", "57P02", "57P03", "58")
# SQLSTATEs that concern a role or a database, and so all of its workers: no login, no such
# database, no right to it, no connections allowed.
_SHARED = frozenset({"28000", "3D000", "42501", "55000", "57P04"})


def concerns_all(code: str, *, unreachable: bool) -> bool:
    """Return True if a connect that failed so would have failed in any worker.

    An unknown reason counts as the worker's own.
    """
    return unreachable or code.startswith(_NOBODY)


@dataclass(slots=True, eq=False)
class Turns:
    """When the next of the sessions that are refused for one reason may try."""

    wait_s: float
    retry_at: float
    refused_at: float = 0.0  # when one of them was last refused
    over: bool = False  # one of them has connected, so all may
    last: bytes = b""  # the session that tried last
    others: bool = False  # another session has asked since


@dataclass(slots=True, eq=False)
class Refusal:
    """Why one session was refused, and when it may try again."""

    code: str
    error: str
    turns: Turns


@dataclass(slots=True, eq=False)
class Refusals:
    """The refusals of one pool."""

    random: Callable[[], float] = lambda: 0.5  # returns numbers from 0 to 1
    shared: dict[str, Turns] = field(default_factory=dict)  # by SQLSTATE

    def failed(
        self, session: bytes, before: Refusal | None, code: str, error: str, now: float
    ) -> Refusal:
        """Return the refusal of a session that was refused now; `before` is its former one."""
        again = before is not None and before.code == code and not before.turns.over
        if code in _SHARED:
            turns = self.shared.setdefault(code, Turns(RETRY_S, now))
            turns.last = turns.last or session
        elif again and before is not None:
            turns = before.turns
            turns.wait_s = min(2 * turns.wait_s or RETRY_S, _LONGEST_S)
        else:
            turns = Turns(0.0, now)
        turns.retry_at, turns.refused_at = max(turns.retry_at, self._after(turns, now)), now
        return Refusal(code, error, turns)

    def blocked_until(self, session: bytes, refusal: Refusal | None, now: float) -> float | None:
        """Return when a session may try to connect, None if it may now.

        Among sessions that take turns, the one that tried last leaves the next turn to another that
        has asked since.
        """
        if refusal is None or refusal.turns.over:
            return None
        turns = refusal.turns
        turns.others = turns.others or turns.last not in (b"", session)
        free_at = turns.retry_at + (RETRY_S if turns.others and turns.last == session else 0.0)
        return free_at if now < free_at else None

    def note_try(self, session: bytes, refusal: Refusal | None, now: float) -> None:
        """Record that a session tries to connect: if it was refused before, this is its turn."""
        if refusal is not None:
            turns = refusal.turns
            turns.last, turns.others, turns.retry_at = session, False, self._after(turns, now)

    def opened(self, refusal: Refusal) -> None:
        """Record that a refused session has connected: all that were refused alike may try."""
        refusal.turns.over = True
        if self.shared.get(refusal.code) is refusal.turns:
            del self.shared[refusal.code]

    def _after(self, turns: Turns, now: float) -> float:
        return now + turns.wait_s * (1 + _JITTER * self.random())
