"""Slots of connects whose end nobody saw: when may they be used again? Pure: no I/O, no clock.

A worker that is killed in `connect()`, or whose connect timed out, may leave a backend in start-up, about which the
books know nothing. The server tells: `pg_stat_activity` lists a backend once it has started, `pg_locks` already while
it authenticates its client. What was there at the first look, after the postmaster had accepted every earlier connect
(see `Control`), shows a moment later, and is neither the books' nor gone, keeps the slot.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from sharedpool.broker.core.commands import SurveyResult
from sharedpool.wire.messages import Backend, Token

# Between the fork of a backend and the first lock that shows it: what was forked by the first look, a second one that
# much later shows, unless it is gone.
SETTLE_S = 0.03


@dataclass(slots=True)
class _Case:
    since: int  # surveys ordered up to this one began too early
    not_before: float  # a connect may be in a proxy's queue until then
    first_at: float | None = (
        None  # when the first look was heard of: its backend, if any, was forked by then
    )
    pids: frozenset[int] | None = None  # those it may be, once there was a second look


class Quarantine:
    """All cases of one broker."""

    def __init__(self) -> None:
        self._cases: dict[Token, _Case] = {}
        self._serial = 0
        self._outstanding = False

    def __len__(self) -> int:
        return len(self._cases)

    def __contains__(self, token: Token) -> bool:
        return token in self._cases

    def add(self, token: Token, not_before: float = -math.inf) -> None:
        """Put a slot into quarantine; the looks begin at `not_before`, when its connect has reached the server."""
        self._cases[token] = _Case(self._serial, not_before)

    def hurry(self, token: Token) -> None:
        """Let the looks begin at once."""
        if token in self._cases:
            self._cases[token].not_before = -math.inf

    def discard(self, token: Token) -> None:
        """Its slot was freed by other evidence."""
        self._cases.pop(token, None)

    def due(self, now: float) -> bool:
        """Say whether a look is needed, now or when the one that is under way is over."""
        return any(case.not_before <= now for case in self._cases.values())

    def order(self, now: float) -> tuple[int, bool] | None:
        """Return the (serial, barrier) of a look that is needed now, if none is under way."""
        if self._outstanding or not self._cases or not self.due(now):
            return None
        self._outstanding = True
        self._serial += 1
        waiting = [
            case
            for case in self._cases.values()
            if case.first_at is None and case.not_before <= now
        ]
        for case in self._cases.values():
            if case.not_before > now:
                case.since = self._serial
        return self._serial, bool(waiting)

    def surveyed(
        self, survey: SurveyResult, strangers: Iterable[Backend], now: float
    ) -> list[Token]:
        """Take in what the server lists, `strangers` being those that the books do not know; return free slots."""
        self._outstanding = False
        strange = {backend.pid for backend in strangers} | survey.starting
        free = []
        for token, case in list(self._cases.items()):
            if case.since >= survey.serial:
                continue
            if case.first_at is None:
                case.first_at = now
                continue
            if case.pids is None and now - case.first_at < SETTLE_S:
                continue
            # The second look shows it even if the first did not; what begins later is not it.
            case.pids = frozenset(strange if case.pids is None else case.pids & strange)
            if not case.pids:
                free.append(token)
                del self._cases[token]
        return free
