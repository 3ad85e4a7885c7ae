"""While connections move, a session ends: what becomes of the leases that it had, gave or was
given."""

from __future__ import annotations

import pytest

from sharedpool.broker.core.lane_members import ARRIVAL_S
from sharedpool.wire.messages import Recall
from tests.unit.moves_driver import Rig, rig

__all__ = ["rig"]  # pytest finds it here


def test_when_a_giver_dies_its_receiver_is_asked(rig: Rig) -> None:
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, receiver, arrives=False)
    asked = len(receiver.sent(Recall))
    rig.broker.take_in(rig.broker.ledger.session_died(b"w1", rig.broker.now))
    assert len(receiver.sent(Recall)) == asked + 1
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    receiver.answer()
    assert rig.fenced() == [token]


def test_when_a_giver_dies_the_shelf_is_searched_for_its_connection(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    rig.moves_itself(token, None)
    rig.broker.take_in(rig.broker.ledger.session_died(b"w1", rig.broker.now))
    assert not rig.moving
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    assert rig.fenced() == [token]


def test_a_dead_holders_lease_is_ended_at_once(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    rig.moves_itself(token, rig.workers[0])
    rig.broker.take_in(rig.broker.ledger.session_died(b"w0", rig.broker.now))
    assert rig.fenced() == [token]


def test_a_lease_given_to_an_ended_session_is_ended(rig: Rig) -> None:
    rig.proceed()
    token, number = rig.tokens[1], rig.number(rig.workers[0])
    rig.broker.take_in(rig.broker.ledger.session_died(b"w0", rig.broker.now))
    rig.board.set_holder(rig.lease(token).cell, number)
    rig.sync()
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    assert rig.fenced() == [token]
    assert rig.board.find(token) == -1


def test_a_lease_refused_by_an_ended_session_and_given_to_another_goes_on(rig: Rig) -> None:
    """The receiver's wait socket was gone; the giver saw it just after it had named
    the receiver."""
    rig.proceed()
    token, number, cell = rig.tokens[1], rig.number(rig.workers[0]), rig.lease(rig.tokens[1]).cell
    rig.broker.take_in(rig.broker.ledger.session_died(b"w0", rig.broker.now))
    rig.board.set_holder(cell, number)
    rig.sync()
    rig.moves_itself(token, rig.workers[2])
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    rig.beat_all()
    assert (rig.fenced(), rig.holder_of(token)) == ([], "w2")


@pytest.mark.parametrize("nonsense", [999, 0xFFFFFFFF])
def test_a_lease_given_to_a_number_that_never_was_is_ended(rig: Rig, nonsense: int) -> None:
    rig.proceed()
    token = rig.tokens[1]
    rig.board.set_holder(rig.lease(token).cell, nonsense)
    rig.sync()
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    assert rig.fenced() == [token]


def test_a_session_that_is_forgotten_later_makes_no_other_suspect(rig: Rig) -> None:
    """By then its end is history: who speaks is asked as of now, and has the time to answer."""
    rig.proceed()
    receiver = rig.workers[0]
    rig.broker.take_in(rig.broker.ledger.session_died(b"w1", rig.broker.now))
    assert rig.fenced() == [rig.tokens[1]]
    for _ in range(8):
        rig.board.count_request()
        rig.broker.pass_time(0.5)
        receiver.beat()
        rig.workers[2].beat()
    rig.moves_itself(rig.tokens[0], receiver, arrives=False)
    rig.sync()
    rig.broker.take_in(rig.broker.ledger.backend_gone(rig.tokens[1], rig.broker.now))
    rig.broker.pass_time(0.001)
    assert not rig.broker.slots.sessions[b"w0"].silent
    assert rig.fenced() == [rig.tokens[1]]
