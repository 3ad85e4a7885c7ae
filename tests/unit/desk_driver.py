"""What workers do at the desk and in the lane, driven event by event."""

from __future__ import annotations

import pytest

from sharedpool.broker.core.commands import PassOn
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.board import BOARD_BYTES, PLACES, Board
from sharedpool.wire.desk import Give, Live, Moved, Passed
from sharedpool.wire.messages import Acquire, ReleaseReason
from sharedpool.wire.values import Token
from tests.unit.ledger_driver import Broker, Worker


class Desk:
    """What workers do at the desk and in the lane, and what comes there.

    Who asks takes part in the lane.
    """

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.generation = 1
        self.boards: dict[str, Board] = {}

    def lend(self, worker: Worker) -> Token:
        """Have a connection opened in the ordinary way and deposited."""
        token = worker.lend()
        self.broker.take_in(self.broker.ledger.desk.deposited(token, self.broker.now))
        return token

    def board(self, pool: str = "p") -> Board:
        """Return the board of a pool's lane."""
        return self.boards.setdefault(pool, Board(memoryview(bytearray(BOARD_BYTES))))

    def join(self, worker: Worker) -> None:
        """Have a worker take part in the lane, which is made if there is none."""
        pool = worker.spec.name
        if self.broker.slots.pools[pool].lane is None:
            serial = self.broker.ledger._moves._members._requested.setdefault(pool, 0)
            self.broker.take_in(
                self.broker.ledger.lanes.opened(pool, serial, self.board(pool), self.broker.now)
            )
        self.broker.take_in(self.broker.ledger.lanes.joined(worker.id, self.broker.now))

    def ask(self, worker: Worker, place: int = 0, wait_s: float = 9.0) -> int:
        """Ask for a connection, at a wait socket in the lane."""
        session = self.broker.slots.sessions[worker.id]
        if not session.joined:
            self.join(worker)
        worker.requests += 1
        worker.pending.append(worker.requests)
        place = session.index * PLACES + place
        self.broker.send(worker.id, Acquire(worker.requests, int(wait_s * 1000), place))
        return worker.requests

    def give(
        self, worker: Worker, token: Token, reason: ReleaseReason = ReleaseReason.RETURN_DUE
    ) -> None:
        worker.held.pop(token, None)
        live = Live(worker.backend(token), self.generation, b"parameters")
        self.broker.take_in(
            self.broker.ledger.desk.given(Give(worker.id, token, reason, live), self.broker.now)
        )

    def passed(self) -> list[tuple[str, Moved]]:
        """Return what was passed on, and to whom."""
        pools = self.broker.slots.pools
        found = []
        for each in self.broker.all(PassOn):
            lane = pools[each.pool].lane
            assert lane is not None
            assert each.place // PLACES == lane.members[each.member_number].index
            found.append((lane.members[each.member_number].id.decode(), each.message))
        return found

    def state(self, token: Token) -> SlotState:
        lease = self.broker.slots.leases.get(token)
        return SlotState.FREE if lease is None else lease.state


def passed_with(moved: Moved) -> Passed:
    assert moved.passed is not None
    return moved.passed


@pytest.fixture
def broker() -> Broker:
    return Broker(handover=True)
