"""Another broker takes over while connections move: which claim to a lease counts."""

from __future__ import annotations

import pytest

from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.board import MOVES
from sharedpool.wire.messages import Hello, Release, ReleaseReason, Welcome
from sharedpool.wire.values import LeaseReport, Phase, Token
from tests.unit.ledger_driver import Worker
from tests.unit.moves_driver import VERSION, Rig, restarted, rig, say_hello

__all__ = ["rig"]  # pytest finds it here


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_later_broker_takes_the_holder_with_the_most_moves(
    rig: Rig, order: tuple[int, int]
) -> None:
    """Whoever says HELLO first: the one of the journal, who has it no more, or the
    one who has it."""
    rig.proceed()
    token, holder, former = rig.tokens[1], rig.workers[0], rig.workers[1]
    assert rig.holder_of(token) == "w1"
    rig.moves_itself(token, holder)  # past the broker, which is dead
    after = restarted(rig)
    for n in order:
        say_hello(
            after, after.workers[n], {token: 1} if after.workers[n].name == holder.name else {}
        )
    assert after.holder_of(token) == "w0"
    assert after.state(token) is SlotState.OPEN
    assert all(
        welcome.revoked == [] for worker in after.workers for welcome in worker.sent(Welcome)
    )
    after.contend(after.workers[2])
    assert after.fenced() == []
    assert former.held == {}


def test_a_claim_after_fewer_moves_is_refused(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    rig.moves_itself(token, rig.workers[2])
    rig.moves_itself(token, rig.workers[0])
    rig.sync()
    after = restarted(rig)
    after.workers[2].held[token] = Phase.IN_USE  # said before it has given it
    say_hello(after, after.workers[0], {token: 2})
    say_hello(after, after.workers[2], {token: 1})
    assert after.holder_of(token) == "w0"
    assert after.workers[2].last(Welcome).revoked == []
    assert after.fenced() == []


def test_an_unclaimed_lease_ends_when_a_worker_reports_its_close(rig: Rig) -> None:
    """It was taken from a former broker's lane, and was of no use: nobody else can have it."""
    rig.proceed()
    token = rig.tokens[1]
    rig.moves_itself(token, None)
    after = restarted(rig)
    for worker in after.workers[1:]:
        say_hello(after, worker, {})
    assert after.holder_of(token) == "shelf"
    after.broker.send(
        b"w2", Release(token, False, ReleaseReason.FAILED, Worker.backend(Token(5, 99)))
    )
    assert after.fenced() == []  # another connection
    after.broker.send(b"w2", Release(token, False, ReleaseReason.FAILED, Worker.backend(token)))
    assert after.fenced() == [token]


def test_the_number_of_moves_begins_anew_after_weeks(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    rig.moves_itself(token, rig.workers[0])
    after = restarted(rig)
    after.lease(token).moves = MOVES - 1
    say_hello(after, after.workers[2], {token: MOVES - 2})
    assert after.holder_of(token) == "w1"  # as the journal says
    say_hello(after, after.workers[0], {token: 1})
    assert after.holder_of(token) == "w0"
    assert after.fenced() == []


def test_a_claim_with_another_backend_is_for_another_connection(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    rig.moves_itself(token, rig.workers[0])
    after = restarted(rig)
    report = LeaseReport(token, Phase.IN_USE, 0, "T1", Worker.backend(Token(5, 99)), moves=1)
    worker = after.workers[0]
    after.broker.send(worker.id, Hello(VERSION, 100, "", "w0", worker.spec, [report], worker.seen))
    assert after.holder_of(token) == "w1"


def test_an_unclaimed_lease_is_ended_for_a_waiter(rig: Rig) -> None:
    """A member of that lane has not reported its leases yet, and is waited for."""
    rig.proceed()
    token = rig.tokens[1]
    rig.moves_itself(token, None)  # and whoever has taken it since has died
    after = restarted(rig)
    for worker in after.workers:
        say_hello(after, worker, {})
    assert after.holder_of(token) == "shelf"
    after.contend(after.workers[0])
    assert after.fenced() == []
    for _ in range(31):  # for so long others may say HELLO
        after.broker.pass_time(0.5)
        for worker in after.workers:
            worker.beat()
    assert after.fenced() == [token]


def test_a_lease_of_this_broker_is_never_unclaimed(rig: Rig) -> None:
    """It has moved, but not since: who says HELLO and does not list it has lost it."""
    rig.proceed()
    rig.moves_itself(rig.tokens[1], rig.workers[0])
    rig.workers[0].beat()
    heir = rig.passed_by_broker(rig.workers[0], rig.tokens[1])
    holder = rig.workers[0]
    assert rig.lease(heir).moves == 1
    holder.held[heir], holder.moves[heir] = Phase.IN_USE, 1
    holder.beat()
    del holder.held[heir]
    holder.seen = heir
    holder.hello()
    assert rig.fenced() == [heir]
