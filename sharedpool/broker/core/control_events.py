"""What the control connection finds out about the server."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sharedpool.broker.core.commands import CancelBackend, Command, SurveyResult, SurveyServer
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.denials import Denials
from sharedpool.broker.core.failover import Failover
from sharedpool.broker.core.handover import Handover
from sharedpool.broker.core.leases import Leases
from sharedpool.broker.core.moves import Moves
from sharedpool.broker.core.quarantine import SETTLE_S
from sharedpool.broker.core.recovery import GRACE_OVER
from sharedpool.broker.core.strangers import strangers_among
from sharedpool.broker.core.takeover import Takeover


class ControlEvents:
    """Handles the findings; `settle(now)` schedules, and returns what is to be done."""

    def __init__(
        self,
        context: Context,
        leases: Leases,
        handover: Handover,
        moves: Moves,
        failover: Failover,
        denials: Denials,
        takeover: Takeover,
        settle: Callable[[float], list[Command]],
    ) -> None:
        self._slots = context.slots
        self._emit = context.emit
        self._arm = context.timers.arm
        self._log = context.log
        self._leases = leases
        self._handover = handover
        self._moves = moves
        self._failover = failover
        self._denials = denials
        self._takeover = takeover
        self._settle = settle
        self._survey_pending = False  # the next survey waits for an alarm

    def reached(self, now: float, *, direct: bool, fault: str) -> list[Command]:
        """Handle the control connection's way to the server; a `fault` makes it unsuitable."""
        routes = self._leases.routes
        routes.reached(direct=direct, fault=fault)
        for pool in self._slots.pools.values():
            self._denials.deny_unsuitable(pool, now)
            if routes.is_direct(pool):
                # Dead workers of a former broker are found before this is known.
                self._leases.hurry(pool)
        return self._settle(now)

    def limited(self, now: float, *, role: str, limit: int | None) -> list[Command]:
        """Handle the control connection's role, and how many connections that role may have."""
        self._failover.limited(role, limit)
        return self._settle(now)

    def server_verified(self, pool: str, generation: int, same: bool, now: float) -> list[Command]:
        """Handle whether the server behind a pool is still the one it was."""
        self._failover.server_verified(pool, generation, same)
        return self._settle(now)

    def order_survey(self, now: float) -> None:
        """Have the server's backends listed, if slots in quarantine wait for that."""
        if self._survey_pending:
            return
        if (order := self._leases.quarantine.order(now)) is not None:
            self._emit(SurveyServer(*order))

    def surveyed(self, survey: SurveyResult, now: float) -> list[Command]:
        """Handle the server's list of backends."""
        strangers = strangers_among(self._slots, survey.tagged)
        if survey.serial == GRACE_OVER:
            self._takeover.surveyed(survey, strangers, now)
            return self._settle(now)
        quarantine = self._leases.quarantine
        for token in quarantine.surveyed(survey, strangers, now):
            self._leases.free(self._slots.leases[token], "no backend of its connect is left")
        if quarantine.due(now):
            self._survey_pending = True
            self._arm(now + SETTLE_S, self._survey_due, None)
        return self._settle(now)

    def _survey_due(self, _: None, now: float) -> None:
        self._survey_pending = False

    def query_cancelled(self, order: CancelBackend, sent: bool | None, now: float) -> list[Command]:
        """Handle the outcome of a cancel: sent, not allowed (False), or not needed or possible."""
        self._moves.transit.sync(now)
        if (pool := self._handover.query_cancelled(order, sent, now)) is not None:
            text = (
                "pool %r: no hand-over: the broker's role cannot cancel the workers' queries;"
                " grant it membership in their role"
            )
            self._log(logging.WARNING, text, pool.name, pool=pool.name)
        return self._settle(now)
