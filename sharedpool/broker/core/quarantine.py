"""Slots of connects whose end nobody saw: when may they be used again? Pure: no I/O, no clock.

A worker that is killed in `connect()`, or whose connect timed out, may leave a backend in start-up
that the records know nothing about. The server tells: `pg_stat_activity` lists a backend once it
has started, `pg_locks` already while it authenticates its client.

The slot stays occupied as long as some backend

1. was forked by the time of the first survey, for which the postmaster had accepted every earlier
   connect (see `ControlConnection.pass_barrier`),
2. is still listed at the second survey, a moment later, and
3. belongs to no known lease.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from sharedpool.broker.core.commands import SurveyResult
from sharedpool.wire.values import Backend, Token

# A backend is visible only some time after its fork, with its first lock. A second survey so much
# later shows every backend that was forked by the first one, unless it has exited.
SETTLE_S = 0.03


@dataclass(slots=True)
class _Case:
    """One slot. It waits for its first survey, then for the second, then for `pids` to exit."""

    since: int  # surveys up to this serial began too early
    not_before: float  # the connect may be in a proxy's queue until then
    first_at: float | None = None  # when the first survey was answered
    pids: frozenset[int] | None = None  # the backends that it may be, from the second survey on


class Quarantine:
    """The quarantined slots of one broker."""

    def __init__(self) -> None:
        self._cases: dict[Token, _Case] = {}
        self._serial = 0
        self._outstanding = False

    def __len__(self) -> int:
        return len(self._cases)

    def __contains__(self, token: Token) -> bool:
        return token in self._cases

    def add(self, token: Token, not_before: float = -math.inf) -> None:
        """Quarantine a slot; its connect has reached the server by `not_before`."""
        self._cases[token] = _Case(self._serial, not_before)

    def hurry(self, token: Token) -> None:
        """Let the surveys for a slot begin at once."""
        if token in self._cases:
            self._cases[token].not_before = -math.inf

    def discard(self, token: Token) -> None:
        """Forget a slot that other evidence has freed."""
        self._cases.pop(token, None)

    def due(self, now: float) -> bool:
        """Return True if a survey is needed, now or after the one that is under way."""
        return any(case.not_before <= now for case in self._cases.values())

    def order(self, now: float) -> tuple[int, bool] | None:
        """Return the (serial, barrier) of a survey to order now, None if there is none to order."""
        if self._outstanding or not self._cases or not self.due(now):
            return None
        self._outstanding = True
        self._serial += 1
        barrier = any(
            case.first_at is None and case.not_before <= now for case in self._cases.values()
        )
        for case in self._cases.values():
            if case.not_before > now:
                case.since = self._serial
        return self._serial, barrier

    def surveyed(
        self, survey: SurveyResult, strangers: Iterable[Backend], now: float
    ) -> list[Token]:
        """Handle a survey, with the backends that the records do not know; return free slots."""
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
            # The second survey shows the backend even if the first did not. A later survey only
            # narrows the set down: a backend that is new there was forked too late.
            case.pids = frozenset(strange if case.pids is None else case.pids & strange)
            if not case.pids:
                free.append(token)
                del self._cases[token]
        return free
