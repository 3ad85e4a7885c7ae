"""Take over from a former broker, and make way for another one.

1. With an intact journal, `restore` enters all that former brokers granted, and the broker serves
   at once.
2. Without one, `begin_grace_period`: nothing is granted until all workers have had the time to say
   what they hold, and a survey of the server agrees (`recovery.py`).
3. Where limits cannot be shared (`sharing.py`), the broker claims a lock instead. While another
   broker counts to the same limit, or may, this one is `outranked`: nothing is granted until it
   `leads`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from sharedpool.broker.core.commands import (
    ClaimLeadership,
    Command,
    Entry,
    Member,
    ResignLeadership,
    SurveyResult,
)
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.leases import QUEUE_LIMIT_S, Leases
from sharedpool.broker.core.moves import Moves
from sharedpool.broker.core.quarantine import SETTLE_S
from sharedpool.broker.core.recovery import Recovery
from sharedpool.wire.values import Backend


class Takeover:
    """The start of one broker's reign; `settle(now)` schedules, and returns what is to be done."""

    def __init__(
        self,
        context: Context,
        recovery: Recovery,
        leases: Leases,
        moves: Moves,
        settle: Callable[[float], list[Command]],
        *,
        ttl_s: float,
    ) -> None:
        self._context = context
        self._slots = context.slots
        self._arm = context.timers.arm
        self._recovery = recovery
        self._leases = leases
        self._moves = moves
        self._settle = settle
        self._ttl_s = ttl_s
        self._claimed = False

    def restore(
        self, entries: Iterable[Entry], now: float, members: Iterable[Member] = ()
    ) -> list[Command]:
        """Take over a former broker's leases and the members of its lanes, before anything else."""
        self._recovery.restore(entries, now, now + self._ttl_s)
        self._moves.restore(members)
        for lease in self._slots.leases.values():
            self._leases.watch_connect(lease)
        self._arm(now + self._ttl_s, _may_fence, None)
        return self._settle(now)

    @property
    def grace_s(self) -> float:
        """How long all workers take to notice that a broker is gone, and to tell another one.

        After 2.5 heartbeats, three to a TTL, and a second (`worker/link/link.py`): with a TTL below
        6 s that is later than one TTL.
        """
        return max(self._ttl_s, self._ttl_s * 2.5 / 3 + 1.25)

    def begin_grace_period(
        self, grace_s: float, now: float, why: str = "no journal of a former broker"
    ) -> list[Command]:
        """Grant nothing for `grace_s`: former brokers may have granted unknown leases."""
        stop = self._slots.grant_stop
        stop.holding_back = True
        stop.because = f"{why}, so it waits until all workers have said what they hold"
        self._recovery.begin_grace_period(now, now + grace_s)
        self._arm(now + grace_s, self._grace_due, None)
        self._context.log(logging.WARNING, "%s: granting nothing for %.1f s", why, grace_s)
        return self._settle(now)

    def _grace_due(self, _: None, now: float) -> None:
        """End the grace period: by a survey, if the server can be asked."""
        recovery = self._recovery
        if now < recovery.grace_until:
            return  # the grace period has begun anew
        # Without a direct way to the server, a connect may be in a proxy's queue until then.
        not_before = recovery.grace_since + QUEUE_LIMIT_S
        if not self._leases.routes.control_is_direct and now < not_before:
            self._arm(not_before, self._grace_due, None)
        elif self._context.has_control_connection:
            recovery.order_survey(now)
        else:
            recovery.serve()

    def surveyed(self, survey: SurveyResult, strangers: list[Backend], now: float) -> None:
        """Handle the survey at the grace period's end: begin to serve, or look again."""
        if self._recovery.complete(survey, now):
            self._recovery.adopt(survey, strangers)
        else:
            self._arm(now + SETTLE_S, self._grace_due, None)

    def claim(self) -> None:
        """Claim the lock that keeps other brokers out: limits cannot be shared. Until then wait."""
        if not self._claimed:
            self._claimed = True
            self._recovery.give_way()
            self._slots.grant_stop.because = "the lock on the limit has not been claimed yet"
            self._context.emit(ClaimLeadership())

    def resign(self) -> None:
        """Do without the lock: limits are shared."""
        if self._claimed:
            self._claimed = False
            self._context.emit(ResignLeadership())
            self._recovery.lead()

    def outranked(self, now: float, why: str) -> list[Command]:
        """Grant nothing until `leads`: another broker counts to the same limit, or may (`why`)."""
        if not self._claimed:
            return self._settle(now)  # the answer is late: limits are shared by now
        self._recovery.give_way()
        self._slots.grant_stop.because = why
        return self._settle(now)

    def leads(self, now: float, *, after_another: bool) -> list[Command]:
        """Begin to grant; `after_another`: only once its workers have said what they hold."""
        self._recovery.lead()
        if after_another and self._claimed:
            self._leases.believe_claims()
            return self.begin_grace_period(self.grace_s, now, "the journal is another broker's")
        return self._settle(now)


def _may_fence(_: None, now: float) -> None:
    """Do nothing: after the alarm the scheduler looks again; restored leases may be fenced now."""
