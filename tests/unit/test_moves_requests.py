"""While connections move: requests that come to the broker, and connections that are given to
it."""

from __future__ import annotations

from sharedpool.broker.core.commands import GiveInLane, JoinQueue
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.board import BROKER_PLACE, BROKER_REQUEST, SHELF
from sharedpool.wire.desk import Moved
from sharedpool.wire.messages import Deny, DenyReason
from tests.unit.moves_driver import Rig, rig

__all__ = ["rig"]  # pytest finds it here


def test_a_request_at_the_broker_takes_its_turn_in_the_lane(rig: Rig) -> None:
    rig.open_lane()
    rig.contend(place=1)
    rig.answer_all()
    rig.contend(rig.workers[1], place=2)
    assert rig.moving
    assert rig.board.is_waiting_at(BROKER_PLACE, BROKER_REQUEST)
    assert sum(each.times for each in rig.broker.all(JoinQueue)) == 2
    rig.contend(rig.workers[1], place=3)
    assert sum(each.times for each in rig.broker.all(JoinQueue)) == 3


def test_the_broker_passes_a_given_connection_to_its_first_waiter(rig: Rig) -> None:
    rig.proceed()
    queued = sum(each.times for each in rig.broker.all(JoinQueue))
    token = rig.tokens[0]
    rig.moves_itself(token, None)
    passed = len(rig.desk.passed())
    cell = rig.lease(token).cell
    came = Moved(BROKER_REQUEST, token, cell, rig.board.holding(cell).moves, rig.live(token))
    rig.broker.take_in(rig.broker.ledger.lanes.received("p", came, rig.broker.now))
    assert [name for name, _ in rig.desk.passed()[passed:]] == ["w0"]
    assert rig.state(token) is SlotState.FREE  # its heir has it
    assert queued - sum(each.times for each in rig.broker.all(JoinQueue)) == 0


def test_the_broker_puts_a_given_connection_without_a_waiter_back_into_the_lane(rig: Rig) -> None:
    rig.proceed()
    rig.give_up()
    token = rig.tokens[0]
    rig.moves_itself(token, None)
    cell = rig.lease(token).cell
    came = Moved(BROKER_REQUEST, token, cell, rig.board.holding(cell).moves, rig.live(token))
    rig.broker.take_in(rig.broker.ledger.lanes.received("p", came, rig.broker.now))
    assert rig.broker.all(GiveInLane) == [GiveInLane("p", token, cell, rig.live(token))]
    assert rig.holder_of(token) == "shelf"
    rig.broker.take_in(
        rig.broker.ledger.lanes.full("p", came, rig.broker.now)
    )  # there is no room in it
    rig.sync()
    assert rig.report().parked == 1


def test_a_request_without_a_wait_gets_the_connection_on_the_shelf(rig: Rig) -> None:
    rig.proceed()
    rig.give_up()
    token = rig.tokens[0]
    rig.moves_itself(token, None)
    looks, passed = (
        sum(each.most_from_shelf for each in rig.broker.all(JoinQueue)),
        len(rig.desk.passed()),
    )
    worker = rig.workers[0]
    rig.desk.ask(worker, place=3, wait_s=0)
    rig.answer_all()
    assert worker.sent(Deny) == []
    assert sum(each.most_from_shelf for each in rig.broker.all(JoinQueue)) > looks
    rig.board.set_holder(rig.lease(token).cell, SHELF)  # which is the broker's own name
    there = Moved(0, token, rig.lease(token).cell, 0, rig.live(token))
    rig.broker.take_in(rig.broker.ledger.lanes.found_on_shelf("p", there, rig.broker.now))
    assert [name for name, _ in rig.desk.passed()[passed:]] == ["w0"]


def test_a_request_without_a_wait_is_refused_if_the_shelf_is_empty(rig: Rig) -> None:
    rig.proceed()
    rig.give_up()
    rig.desk.ask(rig.workers[0], place=3, wait_s=0)
    rig.answer_all()
    assert [each.reason for each in rig.workers[0].sent(Deny)] == [DenyReason.EXHAUSTED]


def test_a_request_to_the_broker_has_the_shelf_looked_at(rig: Rig) -> None:
    rig.proceed()
    looks = sum(each.most_from_shelf for each in rig.broker.all(JoinQueue))
    rig.contend(rig.workers[1], place=3)
    assert sum(each.most_from_shelf for each in rig.broker.all(JoinQueue)) > looks


def test_a_request_without_a_wait_is_refused_once_the_shelf_was_found_empty(rig: Rig) -> None:
    """By the records something lies there: it was lost on its way, or another was faster."""
    rig.proceed()
    rig.give_up()
    rig.moves_itself(rig.tokens[1], None)
    asker = rig.workers[2]
    request = asker.ask(0.0)
    rig.answer_all()
    assert rig.broker.all(JoinQueue)[-1].most_from_shelf == 1
    assert asker.outcome(request) is None
    rig.broker.take_in(rig.broker.ledger.lanes.shelf_empty("p", rig.broker.now))
    assert isinstance(asker.outcome(request), Deny)
