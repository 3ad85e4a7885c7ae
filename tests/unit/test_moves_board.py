"""What the ledger makes of the board, and of words that come late."""

from __future__ import annotations

from sharedpool.broker.core.commands import CancelBackend, Record
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.messages import Ack, CancelQuery, Renew
from sharedpool.wire.values import Phase, Token
from tests.unit.ledger_driver import Worker
from tests.unit.moves_driver import Rig, rig
from tests.unit.restarts import journal_of

__all__ = ["rig"]  # pytest finds it here


# --- what the board says


def test_a_lease_that_moves_is_its_receivers(rig: Rig) -> None:
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    handovers = rig.report().handovers
    rig.moves_itself(token, receiver)
    rig.moves_itself(token, rig.workers[2])
    rig.moves_itself(token, receiver)
    assert rig.report().handovers == handovers + 3  # also those that were not seen
    assert rig.holder_of(token) == "w0"
    _, sessions = rig.broker.ledger.report(rig.broker.now)
    assert [session.leases for session in sessions] == [1, 0, 1]
    (line,) = [x for x in rig.broker.ledger.oldest_leases(9, rig.broker.now) if x.token == token]
    assert (line.title, line.state) == ("w0", "in use")
    rig.broker.ledger.check_invariants()


def test_a_lease_on_the_shelf_is_nobodys_and_counts(rig: Rig) -> None:
    rig.proceed()
    rig.moves_itself(rig.tokens[1], None)
    pool = rig.report()
    assert (pool.leases, pool.idle) == (2, 1)
    assert rig.holder_of(rig.tokens[1]) == "shelf"
    _, sessions = rig.broker.ledger.report(rig.broker.now)
    assert [session.title for session in sessions] == ["w0", "w1", "w2"]  # the shelf is no worker
    assert rig.broker.ledger.sessions == 3
    rig.moves_itself(rig.tokens[1], rig.workers[0])
    rig.sync()
    assert rig.holder_of(rig.tokens[1]) == "w0"


def test_the_journal_has_the_next_holder_and_the_number_of_moves(rig: Rig) -> None:
    rig.proceed()
    rig.moves_itself(rig.tokens[1], rig.workers[0])
    rig.sync()
    rig.beat_all()
    entry = next(x for x in journal_of(rig.broker) if x.token == rig.tokens[1])
    assert (entry.session, entry.moves) == (b"w0", 1)
    assert entry.backend == Worker.backend(rig.tokens[1])


def test_the_journal_says_that_a_lease_may_move_before_it_moves(rig: Rig) -> None:
    """Else a later broker would take it from whoever has it by then, past this one."""
    rig.proceed()
    assert {entry.token: entry.moves for entry in journal_of(rig.broker)} == dict.fromkeys(
        rig.tokens, 0
    )


def test_without_a_move_nothing_is_journaled(rig: Rig) -> None:
    rig.proceed()
    before = len(rig.broker.all(Record))
    for _ in range(3):
        rig.sync()
        rig.beat_all()
    assert len(rig.broker.all(Record)) == before


def test_a_closing_lease_that_moved_is_open(rig: Rig) -> None:
    """The giver reports the lease as closing while its connection moves."""
    rig.proceed()
    token, giver = rig.tokens[1], rig.workers[1]
    giver.held[token] = Phase.CLOSING
    giver.beat()
    assert rig.state(token) is SlotState.CLOSING
    rig.moves_itself(token, rig.workers[0])
    rig.sync()
    assert rig.state(token) is SlotState.OPEN
    assert rig.pool.incoming == {}


def test_a_closing_lease_on_the_shelf_is_passed_on(rig: Rig) -> None:
    rig.proceed()
    token, giver = rig.tokens[1], rig.workers[1]
    giver.held[token] = Phase.CLOSING
    giver.beat()
    rig.moves_itself(token, None)
    rig.halt()
    passed = len(rig.desk.passed())
    rig.take_from_shelf(token)
    assert len(rig.desk.passed()) == passed + 1


def test_a_lease_given_by_a_silent_session_is_no_longer_suspect(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    rig.give_up()
    for _ in range(31):
        rig.board.count_request()
        rig.broker.pass_time(0.5)
        rig.workers[0].beat()
        rig.workers[2].beat()
    assert rig.state(token) is SlotState.SUSPECT
    rig.moves_itself(token, rig.workers[0])  # the stopped worker goes on, and gives it
    rig.contend(rig.workers[2], place=3)
    assert rig.state(token) is SlotState.OPEN
    assert rig.fenced() == []


def test_a_lease_given_to_a_silent_session_is_suspect(rig: Rig) -> None:
    """The receiver was stopped while it waited, unseen by the giver.

    The next waiter gets the slot.
    """
    rig.proceed()
    token, stopped = rig.tokens[1], rig.workers[2]
    rig.give_up()
    for _ in range(31):
        rig.board.count_request()
        rig.broker.pass_time(0.5)
        rig.workers[0].beat()
        rig.workers[1].beat()
    assert rig.state(rig.tokens[0]) is SlotState.SUSPECT  # the stopped worker's own lease
    rig.moves_itself(token, stopped, arrives=False)
    rig.contend(rig.workers[0], place=3)
    rig.contend(rig.workers[0], place=4)
    assert set(rig.fenced()) == set(rig.tokens)


# --- words that come late


def test_a_former_holders_late_message_neither_revokes_nor_ends_a_lease(rig: Rig) -> None:
    rig.proceed()
    token, former = rig.tokens[1], rig.workers[1]
    late = Renew(former.reports(), former.seen)
    rig.moves_itself(token, rig.workers[0])
    rig.workers[0].beat()
    rig.broker.send(former.id, late)
    former.beat()
    assert all(not ack.revoked for ack in former.sent(Ack))
    assert rig.fenced() == []
    assert rig.holder_of(token) == "w0"
    assert rig.state(token) is SlotState.OPEN


def test_a_former_holders_late_message_does_not_count_for_the_next_holder(rig: Rig) -> None:
    rig.proceed()
    token, former = rig.tokens[1], rig.workers[1]
    late = Renew(former.reports(), former.seen)
    rig.moves_itself(token, rig.workers[0], arrives=False)
    rig.broker.send(former.id, late)
    assert rig.lease(token).unconfirmed


def test_a_lease_that_its_former_holder_no_longer_lists_is_not_lost(rig: Rig) -> None:
    rig.proceed()
    rig.moves_itself(rig.tokens[1], rig.workers[0])
    rig.workers[1].beat()
    assert rig.fenced() == []


def test_a_struck_cell_is_not_followed(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    cell = rig.lease(token).cell
    rig.broker.take_in(rig.broker.ledger.ended_without_proof(token, rig.broker.now))
    assert rig.board.find(token) == -1
    rig.board.set_holder(cell, rig.number(rig.workers[0]))  # whoever had looked before
    rig.beat_all()
    assert rig.holder_of(token) == "w1"
    rig.broker.take_in(rig.broker.ledger.backend_gone(token, rig.broker.now))
    assert cell in rig.pool.lane.free  # type: ignore[union-attr]


def test_a_lease_with_a_cancel_under_way_does_not_move_yet(rig: Rig) -> None:
    rig.open_lane()
    rig.broker.send(b"w1", CancelQuery(rig.tokens[1]))
    rig.contend()
    rig.answer_all()
    rig.contend(place=2)
    assert (rig.moving, rig.board.find(rig.tokens[1])) == (True, -1)
    rig.broker.take_in(
        rig.broker.ledger.control.query_cancelled(
            rig.broker.all(CancelBackend)[-1], True, rig.broker.now
        )
    )
    assert rig.board.find(rig.tokens[1]) >= 0


def test_a_token_too_large_for_the_board_is_not_entered() -> None:
    """A worker has said it; it must not stop the broker."""
    rig = Rig(workers=3, max_conn=3)
    odd = Token(-3, -4)
    rig.workers[2].held[odd] = Phase.IN_USE
    rig.workers[2].hello()
    rig.proceed()
    assert rig.board.find(rig.tokens[1]) >= 0
