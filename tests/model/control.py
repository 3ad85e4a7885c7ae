"""What a broker's control connection does, each of its jobs by a step of the world."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from sharedpool.broker.core.commands import (
    CancelBackend,
    Command,
    Fence,
    SurveyServer,
    VerifyServer,
)
from sharedpool.broker.core.ledger import Ledger
from sharedpool.broker.core.recovery import GRACE_OVER
from sharedpool.broker.core.slots import Slots
from sharedpool.wire.values import Token

if TYPE_CHECKING:
    from tests.model.world import World


class ControlConnection:
    """The part of a broker that is its control connection's thread.

    `calls` are what other threads have to say, in order.
    """

    ledger: Ledger

    def __init__(self, world: World) -> None:
        self.world = world
        self.fences: dict[Token, Fence] = {}
        self.looks: deque[SurveyServer] = deque()
        self.doubts: deque[VerifyServer] = deque()
        self.interferes: deque[CancelBackend] = deque()
        self.calls: deque[Callable[[Ledger, float], list[Command]]] = deque()
        self.boot = 0  # of the server the control connection is on; 0: not connected yet

    @property
    def slots(self) -> Slots:
        """The ledger's records: its pools, sessions and leases."""
        return self.ledger._slots

    @property
    def has_control_work(self) -> bool:
        return bool(self.fences or self.looks or self.doubts or self.interferes)

    def reach_server(self) -> bool:
        """See whether the control connection works; remember every server it was on."""
        server = self.world.server
        if not server.up:
            self.boot = 0
            return False
        self.boot = server.boot
        self.world.seen_boots.add(server.boot)
        return True

    def work(self, pick: int) -> None:
        """Do one of the control connection's jobs; what comes out is told to the ledger later."""
        jobs: list[Fence | SurveyServer | VerifyServer | CancelBackend] = [*self.fences.values()]
        if self.interferes:
            jobs.append(self.interferes[0])
        if self.looks:
            jobs.append(self.looks[0])
        if self.doubts:
            jobs.append(self.doubts[0])
        if not jobs:
            return
        match jobs[pick % len(jobs)]:
            case VerifyServer() as doubt:
                self._answer_doubt(doubt)
            case CancelBackend() as order:
                self._cancel(order)
            case SurveyServer() as look:
                if self.reach_server():
                    self._survey(look)
            case Fence() as fence:
                if self.reach_server():
                    self._end(fence)

    def _cancel(self, order: CancelBackend) -> None:
        """Now or never."""
        self.interferes.popleft()
        proc = self.world.server.find(order.backend) if self.reach_server() else None
        if proc is not None and proc.busy and not order.trial:
            lease = self.slots.leases.get(order.token)
            assert lease is not None, f"a cancel for {order.token} hits another lease's query"
            assert lease.session.id in proc.workers or not proc.workers, (
                "a cancel hits another worker's query"
            )
            proc.busy = False
        sent = None if proc is None else order.backend.pid % 5 > 0  # to some it may not
        self.calls.append(lambda ledger, now: ledger.control.query_cancelled(order, sent, now))

    def _answer_doubt(self, doubt: VerifyServer) -> None:
        self.doubts.popleft()
        before = self.boot
        same = self.reach_server() and before == self.boot
        self.calls.append(
            lambda ledger, now: ledger.control.server_verified(
                doubt.pool, doubt.generation, same, now
            )
        )

    def _survey(self, look: SurveyServer) -> None:
        self.looks.popleft()
        survey = self.world.server.survey(look.serial, look.barrier, self.world.now)
        if look.serial == GRACE_OVER and look.barrier:
            self.world.excuse_unknowable()
        self.calls.append(lambda ledger, now: ledger.control.surveyed(survey, now))

    def _end(self, fence: Fence) -> None:
        assert fence.backend is not None
        if fence.backend.boot_us == self.boot:
            proc = self.world.server.find(fence.backend)
            if proc is not None:
                self.world.server.end(proc)
        elif fence.backend.boot_us not in self.world.seen_boots:
            return  # it cannot tell
        self.fences.pop(fence.token, None)
        self.calls.append(lambda ledger, now: ledger.backend_gone(fence.token, now))
