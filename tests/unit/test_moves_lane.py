"""The ledger's side of a lane: when it is made, who is in it, when it ends."""

from __future__ import annotations

from sharedpool.broker.core.commands import CloseLane, InviteToLane, OpenLane
from sharedpool.wire.board import BROKER_PLACE, PLACES, SESSIONS
from sharedpool.wire.buckets import BUCKETS
from sharedpool.wire.messages import Bye, Renew
from sharedpool.wire.values import Histogram, PoolSpec, Timings
from tests.unit.ledger_driver import Broker, Worker
from tests.unit.moves_driver import Rig, rig

__all__ = ["rig"]  # pytest finds it here


def test_a_lane_is_made_for_the_first_waiter(rig: Rig) -> None:
    assert rig.broker.all(OpenLane) == []
    rig.workers[2].ask(9.0)
    assert rig.broker.all(OpenLane) == [OpenLane("p", 1)]
    rig.desk.ask(rig.workers[0], place=8)
    rig.desk.give(rig.workers[1], rig.tokens[1])
    assert rig.broker.all(OpenLane) == [OpenLane("p", 1)]  # it is ordered


def test_each_session_with_handover_joins_under_a_number_and_an_index_of_its_own(rig: Rig) -> None:
    rig.broker.worker("elsewhere")  # of the same pool
    rig.open_lane()
    late = rig.broker.worker("late")
    let_in = rig.broker.all(InviteToLane)
    assert [each.session for each in let_in] == [b"w0", b"w1", b"w2", b"elsewhere", late.id]
    assert [each.member_number for each in let_in] == [1, 2, 3, 4, 5]
    assert sorted(each.index for each in let_in) == [0, 1, 2, 3, 4]
    late.hello()
    assert rig.broker.all(InviteToLane) == let_in  # once


def test_a_session_without_handover_does_not_join() -> None:
    broker = Broker(handover=True)
    rig = Rig(broker, workers=3)
    rig.open_lane()
    stranger = Worker(broker, "s", PoolSpec("p", 2, 60_000, server="another"))
    stranger.hello()
    assert [each for each in broker.all(InviteToLane) if each.session == b"s"] == []


def test_an_index_is_used_again_a_number_never(rig: Rig) -> None:
    rig.open_lane()
    gone = next(each for each in rig.broker.all(InviteToLane) if each.session == b"w1")
    rig.board.take_place(gone.index * PLACES + 3, 77)
    rig.broker.take_in(rig.broker.ledger.session_died(b"w1", rig.broker.now))
    assert not rig.board.is_waiting_at(gone.index * PLACES + 3, 77)  # its ticket is stale
    rig.broker.worker("new")
    (let_in,) = [each for each in rig.broker.all(InviteToLane) if each.session == b"new"]
    assert let_in.index == gone.index
    assert let_in.member_number == 4


def test_the_last_index_is_the_brokers() -> None:
    assert BROKER_PLACE // PLACES == SESSIONS - 1
    broker = Broker(handover=True)
    rig = Rig(broker, workers=3)
    rig.open_lane()
    lane = broker.slots.pools["p"].lane
    assert lane is not None
    lane.indices |= set(range(SESSIONS - 1))
    broker.worker("late")
    assert [each for each in broker.all(InviteToLane) if each.session == b"late"] == []


def test_in_a_pool_with_max_waiting_the_broker_passes_connections_on() -> None:
    """Nobody counts who waits in the lane's own queue."""
    rig = Rig(workers=2, max_waiting=5)
    rig.open_lane()
    rig.contend()
    rig.answer_all()
    rig.contend(place=2)
    assert not rig.moving
    rig.desk.give(rig.workers[1], rig.tokens[1])
    assert len(rig.desk.passed()) == 2


def test_a_lane_of_a_discarded_pool_does_not_serve_a_new_pool_of_its_name(rig: Rig) -> None:
    rig.workers[2].ask(9.0)
    for worker in rig.workers:
        rig.broker.take_in(rig.broker.ledger.session_died(worker.id, rig.broker.now))
    for token in rig.fenced():
        rig.broker.take_in(rig.broker.ledger.backend_gone(token, rig.broker.now))
    a, b = (rig.broker.worker(name, max_conn=1) for name in "ab")
    a.lend()
    b.ask(9.0)
    assert rig.broker.all(OpenLane) == [OpenLane("p", 1), OpenLane("p", 2)]
    for serial in (1, 2):
        assert rig.pool.lane is None
        rig.broker.take_in(rig.broker.ledger.lanes.opened("p", serial, rig.board, rig.broker.now))
    assert rig.pool.lane is not None
    assert rig.broker.all(CloseLane) == []


def test_a_lane_ends_with_its_last_session(rig: Rig) -> None:
    rig.open_lane()
    for worker in rig.workers:
        for token in list(worker.held):
            worker.release(token)
        assert rig.broker.all(CloseLane) == []
        rig.broker.send(worker.id, Bye(worker.seen))
    assert rig.broker.all(CloseLane) == [CloseLane("p")]
    assert rig.broker.ledger.leases == 0
    rig.broker.commands.clear()
    Rig(rig.broker, workers=3).open_lane()  # in which nothing is left of the former


def test_a_lane_that_is_opened_after_its_pool_has_gone_is_closed(rig: Rig) -> None:
    rig.workers[2].ask(9.0)
    for worker in rig.workers:
        rig.broker.take_in(rig.broker.ledger.session_died(worker.id, rig.broker.now))
    for token in rig.fenced():
        rig.broker.take_in(rig.broker.ledger.backend_gone(token, rig.broker.now))
    rig.broker.take_in(rig.broker.ledger.lanes.opened("p", 1, rig.board, rig.broker.now))
    assert rig.broker.all(CloseLane) == [CloseLane("p")]


def test_while_connections_move_the_workers_report_the_waits(rig: Rig) -> None:
    rig.proceed()
    a = rig.workers[0]
    nothing = Histogram([0] * BUCKETS, 0)
    many = Histogram([0, 0, 0, 0, 200] + [0] * (BUCKETS - 5), 0)
    times = Timings(1, nothing, many, nothing)
    rig.broker.send(a.id, Renew(a.reports(), a.seen, pending=list(a.pending), times=times))
    assert 5000 < rig.report().wait_p50_us < rig.report().wait_p99_us <= 10_000
