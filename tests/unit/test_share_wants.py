"""What a host tells the others that it wants, while connections move past its broker and after."""

from __future__ import annotations

from sharedpool.broker.core.commands import Command, SyncShare
from tests.unit.moves_driver import Rig
from tests.unit.sharing_driver import SharingBroker


class AnsweredBroker(SharingBroker):
    """Each of its syncs has an outcome at once: two slots, and another host."""

    answered = 0

    def take_in(self, commands: list[Command]) -> list[Command]:
        super().take_in(commands)
        orders = self.all(SyncShare)
        if len(orders) > self.answered:
            self.answered = len(orders)
            self.answer(orders[-1], held=2, lacking=1)
        return commands


def rig() -> Rig:
    return Rig(AnsweredBroker(handover=True), workers=3)


def wanted(rig: Rig) -> int:
    sharing = rig.broker.ledger.sharing
    (share,) = sharing.shares.values()
    return sharing._records.wanted(share, rig.broker.now)


def test_threads_that_wait_in_the_lane_are_wants() -> None:
    """The broker was not asked by them, and the host would never have more than it has."""
    field = rig()
    field.proceed()
    field.give_up()
    in_use = len(field.pool.leases)
    assert wanted(field) == in_use
    for place in (3, 4, 5):
        field.board.take_place(place, 100 + place)
    assert wanted(field) == in_use + 3


def test_a_parked_connection_is_not_wanted() -> None:
    """It was on the lane's shelf when the moves halted: nobody uses it."""
    field = rig()
    field.proceed()
    field.give_up()
    field.moves_itself(field.tokens[1], None)
    field.halt()
    before = wanted(field)
    field.take_from_shelf(field.tokens[1])
    assert len(field.pool.parked) == 1
    assert wanted(field) == before - 1
