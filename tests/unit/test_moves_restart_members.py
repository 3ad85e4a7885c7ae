"""Another broker takes over while connections move: leases are ended once no member of the lane can
have them."""

from __future__ import annotations

import pytest

from sharedpool.broker.core.commands import Admit, Dismiss, Forget, InviteToLane, Member
from sharedpool.broker.core.lane_members import ARRIVAL_S
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.messages import Bye, Recall, Renew
from sharedpool.wire.values import LeaseReport, Phase, Token
from tests.unit.ledger_driver import EPOCH, Broker, Worker
from tests.unit.moves_driver import Rig, restarted, rig, say_hello
from tests.unit.restarts import journal_of, members_of, moved

__all__ = ["rig"]  # pytest finds it here


def lost_with_the_broker(rig: Rig) -> tuple[Rig, Token]:
    """A broker dies while a connection is on its way, which does not arrive; another takes over."""
    rig.proceed()
    rig.moves_itself(rig.tokens[1], None)
    return restarted(rig), rig.tokens[1]


def listing(worker: Worker, moves: dict[Token, int], *, unsure: bool = False) -> None:
    """Answer the newest recall, saying how often what is held has moved."""
    reports = [
        LeaseReport(t, phase, 0, "T1", worker.backend(t), moves=moves.get(t, 0))
        for t, phase in worker.held.items()
    ]
    worker.broker.send(
        worker.id, Renew(reports, worker.seen, worker.last(Recall).serial, unsure=unsure)
    )


def test_an_unclaimed_lease_is_ended_once_all_members_have_reported(
    rig: Rig,
) -> None:
    after, token = lost_with_the_broker(rig)
    for worker in after.workers:
        say_hello(after, worker, {})
        assert worker.sent(Recall)  # each has left that lane by then
        worker.beat()  # a heartbeat that was on its way
    for worker in after.workers:
        assert after.fenced() == []
        worker.answer()
    assert after.fenced() == [token]


def test_an_unclaimed_lease_is_not_ended_before_all_members_have_said_hello(rig: Rig) -> None:
    """One who held nothing when the former broker died, and whom only its journal knows as a
    member."""
    after, token = lost_with_the_broker(rig)
    assert b"w0" not in {entry.session for entry in journal_of(rig.broker)}
    for worker in after.workers[1:]:
        say_hello(after, worker, {})
        worker.answer()
    after.contend(after.workers[1])
    assert after.fenced() == []
    late = after.workers[0]
    late.held[token] = Phase.IN_USE  # the connection has arrived
    say_hello(after, late, {token: 2})
    listing(late, {token: 2})
    assert (after.holder_of(token), after.fenced()) == ("w0", [])


def test_a_lease_that_arrives_before_the_welcome_is_the_receivers(rig: Rig) -> None:
    after, token = lost_with_the_broker(rig)
    for worker in after.workers:
        say_hello(after, worker, {})
    after.workers[0].held[token] = Phase.IN_USE
    after.workers[1].answer()
    after.workers[2].answer()
    assert after.fenced() == []
    listing(after.workers[0], {token: 2})
    assert (after.holder_of(token), after.fenced()) == ("w0", [])


def test_a_lease_that_arrives_where_the_journal_has_it_already_is_the_receivers(rig: Rig) -> None:
    """Its giver named the receiver on the board before it sent the connection. So the receiver's
    HELLO may lack it, and no move has followed when its answer lists it."""
    rig.proceed()
    token = rig.tokens[1]
    rig.moves_itself(token, rig.workers[0])
    rig.workers[2].beat()  # with any message the board is read
    after = restarted(rig)
    receiver = after.workers[0]
    assert after.holder_of(token) == "w0"
    del receiver.held[token]
    for worker in after.workers:
        say_hello(after, worker, {})
    assert after.holder_of(token) == "shelf"
    receiver.held[token] = Phase.IN_USE
    for worker in after.workers[1:]:
        worker.answer()
    listing(receiver, {token: 1})
    assert (after.holder_of(token), after.fenced()) == ("w0", [])


def test_a_member_whose_thread_may_be_receiving_is_asked_once_more(rig: Rig) -> None:
    after, token = lost_with_the_broker(rig)
    for worker in after.workers:
        say_hello(after, worker, {})
    for worker in after.workers[1:]:
        worker.answer()
    unsure = after.workers[0]
    listing(unsure, {}, unsure=True)
    assert after.fenced() == []
    asked = unsure.last(Recall)
    after.broker.pass_time(ARRIVAL_S)
    assert unsure.last(Recall).serial > asked.serial
    listing(unsure, {})
    assert after.fenced() == [token]


def test_a_member_is_waited_for_though_the_lease_it_had_is_over(rig: Rig) -> None:
    """Its own connection has ended before it says HELLO, and another is on its way to it."""
    after, token = lost_with_the_broker(rig)
    late, other = after.workers[2], rig.tokens[0]
    assert after.holder_of(other) == "w2"
    after.broker.take_in(after.broker.ledger.backend_gone(other, after.broker.now))
    assert Forget(b"w2") not in after.broker.commands  # its process is watched on
    for worker in after.workers[:2]:
        say_hello(after, worker, {})
        worker.answer()
    assert after.fenced() == []
    late.held = {token: Phase.IN_USE}
    say_hello(after, late, {token: 2})
    listing(late, {token: 2})
    assert (after.holder_of(token), after.fenced()) == ("w2", [])


def test_a_silent_member_is_waited_for(rig: Rig) -> None:
    """It is stopped while it receives a connection, and has no lease by the records."""
    after, token = lost_with_the_broker(rig)
    late = after.workers[0]
    for worker in after.workers:
        say_hello(after, worker, {})
    for _ in range(30):
        after.broker.pass_time(0.5)
        for worker in after.workers[1:]:
            worker.beat()
    assert b"w0" not in after.broker.slots.sessions
    assert Dismiss(b"w0") not in after.broker.commands  # a third broker is to know of it
    for worker in after.workers[1:]:
        worker.answer()
    assert after.fenced() == []
    late.held[token] = Phase.IN_USE
    say_hello(after, late, {token: 2})
    listing(late, {token: 2})
    assert (after.holder_of(token), after.fenced()) == ("w0", [])


@pytest.mark.parametrize("known", [True, False], ids=["had said hello", "had not"])
def test_a_dead_member_holds_nothing(rig: Rig, known: bool) -> None:
    after, token = lost_with_the_broker(rig)
    for worker in after.workers if known else after.workers[1:]:
        say_hello(after, worker, {})
    for worker in after.workers[1:]:
        worker.answer()
    assert after.fenced() == []
    after.broker.take_in(after.broker.ledger.session_died(b"w0", after.broker.now))
    assert after.fenced() == [token]
    assert {member.session for member in members_of(after.broker)} <= {b"w1", b"w2"}


def test_a_silent_member_of_the_present_lane_is_known_to_a_later_broker(rig: Rig) -> None:
    """It may go on after this broker's end, and receive a connection in this lane."""
    rig.open_lane()
    for _ in range(40):
        rig.broker.pass_time(0.5)
        for worker in rig.workers[1:]:
            worker.beat()
    assert b"w0" not in rig.broker.slots.sessions
    assert b"w0" in {member.session for member in members_of(rig.broker)}


def test_a_dead_members_lease_may_have_moved_on(rig: Rig) -> None:
    """The member gave the connection after the former broker's death, and died; another uses it."""
    rig.proceed()
    token, holder = rig.tokens[1], rig.workers[0]
    assert rig.holder_of(token) == "w1"
    rig.moves_itself(token, holder)
    after = restarted(rig)
    after.broker.take_in(after.broker.ledger.session_died(b"w1", after.broker.now))
    assert (after.fenced(), after.holder_of(token)) == ([], "shelf")
    say_hello(after, after.workers[0], {token: 1})
    listing(after.workers[0], {token: 1})
    say_hello(after, after.workers[2], {})
    after.workers[2].answer()
    assert (after.fenced(), after.holder_of(token)) == ([], "w0")


def test_a_dead_members_lease_is_ended_once_no_other_member_can_have_it(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    after = restarted(rig)
    for worker in (after.workers[0], after.workers[2]):
        say_hello(after, worker, {})
        worker.answer()
    assert after.fenced() == []
    after.broker.take_in(after.broker.ledger.session_died(b"w1", after.broker.now))
    assert after.fenced() == [token]


def test_a_lease_reported_after_leaving_the_lane_is_ended_when_its_member_dies(
    rig: Rig,
) -> None:
    """Nobody else can have it, whoever has not told yet."""
    rig.proceed()
    after = restarted(rig)
    say_hello(after, after.workers[1], {})
    after.workers[1].answer()
    after.broker.take_in(after.broker.ledger.session_died(b"w1", after.broker.now))
    assert after.fenced() == [rig.tokens[1]]


def test_once_all_members_have_reported_an_unlisted_lease_is_nobodys(rig: Rig) -> None:
    rig.proceed()
    after = restarted(rig)
    for worker in after.workers:
        say_hello(after, worker, {})
        worker.answer()
    del after.workers[1].held[rig.tokens[1]]
    after.workers[1].beat()
    assert after.fenced() == [rig.tokens[1]]


def test_without_a_complete_journal_the_members_are_unknown(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    rig.moves_itself(token, None)
    after = restarted(rig)
    after.broker = Broker(EPOCH + 1, journal_complete=False, handover=True)
    after.broker.take_in(
        after.broker.ledger.takeover.restore(journal_of(rig.broker), after.broker.now)
    )
    after.workers = [moved(worker, after.broker) for worker in rig.workers]
    for worker in after.workers:
        say_hello(after, worker, {})
    assert (after.fenced(), after.holder_of(token)) == ([], "shelf")


def test_a_member_is_journaled_before_it_joins(rig: Rig) -> None:
    rig.open_lane()
    for n, command in enumerate(rig.broker.commands):
        if isinstance(command, InviteToLane):
            assert (
                Admit(Member(command.session, None, rig.workers[0].spec)) in rig.broker.commands[:n]
            )
    assert {member.session for member in members_of(rig.broker)} == {b"w0", b"w1", b"w2"}
    rig.broker.send(b"w0", Bye())
    assert {member.session for member in members_of(rig.broker)} == {b"w1", b"w2"}
    after = restarted(rig)
    say_hello(after, after.workers[1], {})
    after.workers[1].answer()
    assert Dismiss(b"w1") in after.broker.commands  # there is no lane yet


def test_the_last_worker_to_leave_ends_nothing_that_another_member_may_have(rig: Rig) -> None:
    """That one has not said HELLO yet."""
    after, token = lost_with_the_broker(rig)
    for worker in after.workers[1:]:
        say_hello(after, worker, {})
        worker.answer()
        for held in list(worker.held):
            worker.release(held)
        after.broker.send(worker.id, Bye())
    assert (after.fenced(), after.holder_of(token)) == ([], "shelf")
    after.broker.take_in(after.broker.ledger.session_died(b"w0", after.broker.now))
    assert after.fenced() == [token]


def test_a_lease_that_could_not_move_and_is_not_listed_is_ended_at_once() -> None:
    rig = Rig(workers=2)
    token = rig.tokens[0]
    after = restarted(rig)
    del after.workers[0].held[token]
    say_hello(after, after.workers[0], {})
    assert after.fenced() == [token]


def test_a_lease_given_before_the_later_broker_knew_of_it_is_the_receivers(rig: Rig) -> None:
    """The giver has claimed the lease, and left that lane at its WELCOME."""
    rig.proceed()
    token = rig.tokens[1]
    after = restarted(rig)
    giver, receiver = after.workers[1], after.workers[0]
    say_hello(after, giver, {})
    assert after.state(token) is SlotState.OPEN
    receiver.held[token] = giver.held.pop(token)
    giver.beat()
    assert (after.fenced(), after.state(token)) == ([], SlotState.SUSPECT)
    say_hello(after, receiver, {token: 1})
    assert (after.holder_of(token), after.state(token)) == ("w0", SlotState.OPEN)
    assert after.fenced() == []
