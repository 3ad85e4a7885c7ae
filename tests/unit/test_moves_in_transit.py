"""A connection that has moved: when its receiver is asked for it, and when it is ended."""

from __future__ import annotations

import pytest

from sharedpool.broker.core.lane_members import ARRIVAL_S
from sharedpool.broker.core.recalls import ANSWER_LIMIT_S
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.messages import Ack, Recall, Renew
from sharedpool.wire.values import Phase
from tests.unit.moves_driver import Rig, rig

__all__ = ["rig"]  # pytest finds it here


def test_a_receiver_that_confirms_keeps_the_lease(rig: Rig) -> None:
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, receiver)
    receiver.beat()
    assert receiver.last(Ack).revoked == []
    assert not rig.lease(token).unconfirmed
    for _ in range(5):
        rig.broker.pass_time(ARRIVAL_S)
        rig.beat_all()
    assert rig.fenced() == []
    assert rig.holder_of(token) == "w0"


def test_a_connection_that_has_not_arrived_is_asked_for_and_ended_a_quarter_of_a_second_later(
    rig: Rig,
) -> None:
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, receiver, arrives=False)
    asked = len(receiver.sent(Recall))
    receiver.beat()  # it may be on its way still
    assert len(receiver.sent(Recall)) == asked + 1
    assert rig.fenced() == []
    receiver.answer()
    assert rig.fenced() == []  # not before
    rig.broker.pass_time(ARRIVAL_S * 0.9)
    receiver.answer()
    assert rig.fenced() == []
    rig.broker.pass_time(ARRIVAL_S * 0.2)
    assert len(receiver.sent(Recall)) == asked + 2
    assert rig.fenced() == []
    receiver.answer()
    assert rig.fenced() == [token]


def test_a_connection_that_a_thread_may_be_receiving_is_not_ended(rig: Rig) -> None:
    """It has read it and not said so yet: of many threads each may be held up for long."""
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, receiver, arrives=False)
    receiver.beat()
    for _ in range(8):
        rig.broker.pass_time(ARRIVAL_S * 1.1)
        answers = receiver.last(Recall).serial
        renew = Renew(
            receiver.reports(), receiver.seen, answers, list(receiver.pending), unsure=True
        )
        rig.broker.send(receiver.id, renew)
    assert rig.fenced() == []
    for _ in range(2):
        rig.broker.pass_time(ARRIVAL_S * 1.1)
        receiver.answer()
    assert rig.fenced() == [token]


@pytest.mark.parametrize("asked", [False, True])
def test_an_arrived_connection_that_a_thread_is_receiving_is_not_ended(
    rig: Rig, asked: bool
) -> None:
    """It was listed while nobody had read it, and is listed again once it is taken in.

    Between the two it is not.
    """
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, receiver, arrives=False)
    if asked:
        receiver.beat()
    receiver.held[token] = Phase.CONNECTING
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    receiver.answer() if asked else receiver.beat()
    del receiver.held[token]
    rig.broker.send(
        receiver.id, Renew(receiver.reports(), receiver.seen, 0, list(receiver.pending))
    )
    assert rig.fenced() == []
    receiver.held[token] = Phase.IN_USE
    receiver.answer()
    assert rig.fenced() == []
    assert not rig.lease(token).unconfirmed


def test_a_list_from_before_a_connection_has_gone_and_come_back_proves_no_arrival(
    rig: Rig,
) -> None:
    """The broker was busy, as just after its start: the list came late, and so did the next one,
    from while the connection was elsewhere. A connection in use was ended for that."""
    rig.proceed()
    token, holder, other = rig.tokens[1], rig.workers[0], rig.workers[2]
    rig.moves_itself(token, holder)
    holder.beat()
    first = Renew(holder.reports(), holder.seen, 0, list(holder.pending))
    rig.moves_itself(token, other)
    second = Renew(holder.reports(), holder.seen, 0, list(holder.pending))
    rig.moves_itself(token, holder)
    rig.broker.send(holder.id, first)
    rig.broker.send(holder.id, second)
    assert rig.fenced() == []
    assert rig.lease(token).unconfirmed
    holder.answer()
    assert not rig.lease(token).unconfirmed
    assert rig.fenced() == []


def test_a_list_from_while_a_connection_was_given_away_does_not_end_it(rig: Rig) -> None:
    rig.proceed()
    token, holder, other = rig.tokens[1], rig.workers[0], rig.workers[2]
    rig.moves_itself(token, holder)
    holder.held[token] = Phase.CLOSING
    giving = Renew(holder.reports(), holder.seen, 0, list(holder.pending))
    rig.moves_itself(token, other)
    rig.moves_itself(token, holder)
    rig.broker.send(holder.id, giving)
    assert rig.state(token) is SlotState.OPEN


def test_an_arrived_connection_that_is_then_lost_is_ended(rig: Rig) -> None:
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, receiver, arrives=False)
    receiver.held[token] = Phase.CONNECTING
    receiver.beat()
    del receiver.held[token]
    receiver.beat()
    receiver.answer()
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    assert rig.fenced() == []
    receiver.answer()
    assert rig.fenced() == [token]


def test_a_connection_that_arrives_late_but_in_time_is_not_ended(rig: Rig) -> None:
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, receiver, arrives=False)
    receiver.beat()
    receiver.answer()
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    receiver.held[token] = Phase.IN_USE
    receiver.answer()
    assert rig.fenced() == []
    assert not rig.lease(token).unconfirmed


def test_a_question_that_was_lost_is_asked_again(rig: Rig) -> None:
    """A session that says HELLO again has forgotten the question."""
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, receiver, arrives=False)
    receiver.beat()
    asked = len(receiver.sent(Recall))
    receiver.hello()
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    receiver.beat()
    assert len(receiver.sent(Recall)) == asked + 1
    receiver.answer()
    assert rig.fenced() == [token]


def test_a_session_that_did_not_answer_in_time_is_asked_again_when_it_speaks(rig: Rig) -> None:
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, receiver, arrives=False)
    receiver.beat()
    asked = len(receiver.sent(Recall))
    for _ in range(2):
        rig.board.count_request()
        rig.broker.pass_time(ANSWER_LIMIT_S * 1.1)
    receiver.beat()
    assert len(receiver.sent(Recall)) == asked + 1
    receiver.answer()
    assert rig.fenced() == [token]


def test_a_lease_that_is_no_longer_listed_is_lost(rig: Rig) -> None:
    """Though its name is newer than what its holder was granted last."""
    rig.proceed()
    token, holder = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, holder)
    holder.beat()
    assert holder.seen < token
    del holder.held[token]
    holder.beat()
    assert rig.fenced() == [token]
