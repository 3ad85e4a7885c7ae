"""How often a worker may connect whom the server refuses. Pure: no I/O, no clock.

A connect that fails for a reason of its worker's own (a wrong password) holds nobody else back. But who was refused may
not try again at once, again and again: a *refusal* is what stands against a session until it has waited, and longer
each time (not the first time: it may have been given a new password by then).

Where many are refused for a reason of their role's or their database's, they take *turns*: one of them tries for all,
and when it succeeds, all may. A session that was not refused itself never waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

RETRY_S = 0.7
_LONGEST_S = 5.6
_JITTER = 0.3

# SQLSTATEs, or the classes of them, by which a server says of itself that it cannot let anybody in.
_NOBODY = ("53", "57P01", "57P02", "57P03", "58")
# What a role or a database is refused for, whichever of its workers asks: no login, no such database, no right to it,
# or none to connect.
_SHARED = frozenset({"28000", "3D000", "42501", "55000", "57P04"})


def concerns_all(code: str, *, unreachable: bool) -> bool:
    """Say whether a connect that failed so would have failed in any worker. What is not known is the worker's own."""
    return unreachable or code.startswith(_NOBODY)


@dataclass(slots=True, eq=False)
class Turns:
    """When the next of those who are refused alike may try. `over`: one of them was let in."""

    wait_s: float
    retry_at: float
    refused_at: float = 0.0  # when one of them was last
    over: bool = False
    last: bytes = b""  # who tried last
    others: bool = False  # somebody else has asked since


@dataclass(slots=True, eq=False)
class Refusal:
    """What stands against one session: the server's word, and when it may try again."""

    code: str
    error: str
    turns: Turns


@dataclass(slots=True, eq=False)
class Refusals:
    """One pool's. `random` returns numbers from 0 to 1."""

    random: Callable[[], float] = lambda: 0.5
    shared: dict[str, Turns] = field(default_factory=dict)  # by SQLSTATE

    def failed(
        self, session: bytes, before: Refusal | None, code: str, error: str, now: float
    ) -> Refusal:
        """Return what stands against a session that was refused now; `before`: what stood against it already."""
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
        """Return when a session that would connect may try, or None if it may now.

        Of those who take turns, who has tried last leaves the next turn to another that asks.
        """
        if refusal is None or refusal.turns.over:
            return None
        turns = refusal.turns
        turns.others = turns.others or turns.last not in (b"", session)
        free_at = turns.retry_at + (RETRY_S if turns.others and turns.last == session else 0.0)
        return free_at if now < free_at else None

    def note_try(self, session: bytes, refusal: Refusal | None, now: float) -> None:
        """Note that a session may connect: if anything stands against it, this is its turn."""
        if refusal is not None:
            turns = refusal.turns
            turns.last, turns.others, turns.retry_at = session, False, self._after(turns, now)

    def opened(self, refusal: Refusal) -> None:
        """Note that one against whom this stood was let in: so may all be who were refused alike."""
        refusal.turns.over = True
        if self.shared.get(refusal.code) is refusal.turns:
            del self.shared[refusal.code]

    def _after(self, turns: Turns, now: float) -> float:
        return now + turns.wait_s * (1 + _JITTER * self.random())
