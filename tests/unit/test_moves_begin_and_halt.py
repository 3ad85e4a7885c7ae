"""When connections move past the broker, and when they halt."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sharedpool.broker.core.commands import HaltMoves, JoinQueue, StartMoves
from sharedpool.broker.core.group_terms import GroupTerms
from sharedpool.broker.core.handover import SHARED_S
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.admin import Order, OrderKind
from sharedpool.wire.board import BROKER_PLACE, BROKER_REQUEST
from sharedpool.wire.messages import Recall, ReleaseReason, Stale, Withdraw
from sharedpool.wire.values import PoolSpec, Token
from tests.unit.ledger_driver import Broker, Worker
from tests.unit.moves_driver import QUIET_S, VERSION, Rig, rig

__all__ = ["rig"]  # pytest finds it here


def test_connections_move_while_a_thread_waits_and_the_broker_has_nothing_else_to_do(
    rig: Rig,
) -> None:
    rig.open_lane()
    assert not rig.moving
    rig.contend()
    rig.answer_all()
    rig.contend(place=2)
    assert rig.moving
    assert rig.broker.all(StartMoves) == [StartMoves("p")]
    assert [rig.board.find(token) >= 0 for token in rig.tokens] == [True, True]
    assert [rig.board.holding(rig.lease(t).cell).holder for t in rig.tokens] == [
        rig.number(rig.workers[2]),
        rig.number(rig.workers[1]),
    ]


def test_the_generation_is_on_the_board(rig: Rig) -> None:
    rig.proceed()
    assert rig.board.generation == 1
    rig.broker.take_in(
        rig.broker.ledger.order(Order(VERSION, OrderKind.RECONNECT, "p"), rig.broker.now)[1]
    )
    assert rig.workers[1].last(Stale).generation == 2
    assert rig.board.generation == 2


def test_a_place_that_waits_for_nobody_is_not_counted(rig: Rig) -> None:
    """Its ticket may have been lost with the giver; another is written a while later."""
    rig.proceed()
    queued = sum(each.times for each in rig.broker.all(JoinQueue))
    for _ in range(3):
        rig.board.count_request()
        rig.broker.pass_time(QUIET_S * 1.01)
        rig.beat_all()
    assert sum(each.times for each in rig.broker.all(JoinQueue)) > queued


def _suspect_a_silent_holder(rig: Rig) -> None:
    for _ in range(32):
        rig.board.count_request()
        rig.broker.pass_time(QUIET_S * 0.5)
        rig.workers[0].beat()
        rig.workers[2].beat()
        if not rig.moving:
            break
    assert rig.state(rig.tokens[1]) is SlotState.SUSPECT


def _reserve_in_a_group(rig: Rig) -> None:
    groups = {"g": GroupTerms(reserved=1)}
    rig.broker.take_in(rig.broker.ledger.configure(2, groups, {}, rig.broker.now))


def _order(kind: OrderKind, *target: str | int) -> Callable[[Rig], object]:
    def order(rig: Rig) -> None:
        message = Order(VERSION, kind, *target)  # type: ignore[arg-type]
        rig.broker.take_in(rig.broker.ledger.order(message, rig.broker.now)[1])

    return order


def _set(**attributes: object) -> Callable[[Rig], object]:
    """Set attributes of the pool, which the next heartbeat makes the ledger look at."""

    def set_(rig: Rig) -> None:
        for name, value in attributes.items():
            setattr(rig.pool, name, value)
        rig.workers[0].beat()

    return set_


def _hold_back_connects(rig: Rig) -> None:
    rig.pool.backoff.failed(Token(1, 99), 1, "down", rig.broker.now)
    rig.workers[0].beat()


HALTING: dict[str, Callable[[Rig], object]] = {
    "slot": lambda rig: rig.broker.take_in(
        rig.broker.ledger.backend_gone(rig.tokens[1], rig.broker.now)
    ),
    "suspect": _suspect_a_silent_holder,
    "paused": _order(OrderKind.PAUSE, "p"),
    "held": _order(OrderKind.PAUSE),
    "lowered": _order(OrderKind.LIMIT, "p", 1),
    "drain": lambda rig: rig.broker.take_in(rig.broker.ledger.drain(rig.broker.now)),
    "groups": _reserve_in_a_group,
    "cap": lambda rig: rig.broker.worker("o", "other").ask(9.0),
    "backoff": _hold_back_connects,
    "quiet": lambda rig: rig.broker.pass_time(QUIET_S * 1.01),
    "cancels": _set(cancel_works=None),
    "unsuitable": _set(unsuitable="its server loses sessions"),
}


@pytest.mark.parametrize("why", HALTING)
def test_moves_halt_as_soon_as_the_broker_has_something_else_to_do(why: str) -> None:
    cap = 2 if why in ("groups", "cap") else None
    broker = Broker(handover=True, **({} if cap is None else {"max_conn": cap}))
    rig = Rig(broker, workers=3)
    rig.proceed()
    if why in ("slot", "suspect", "quiet"):  # otherwise the broker would serve its own waiter
        rig.give_up()
        assert rig.moving
    HALTING[why](rig)
    assert not rig.moving
    assert broker.all(HaltMoves) == [HaltMoves("p")]
    assert not rig.board.is_waiting_at(BROKER_PLACE, BROKER_REQUEST)
    assert len(broker.all(StartMoves)) == 1


@pytest.mark.parametrize("why", ["outside", "cancels", "paused", "capped", "backoff"])
def test_moves_do_not_begin_while_the_broker_has_something_else_to_do(why: str) -> None:
    broker = Broker(handover=True, max_conn=2) if why == "capped" else Broker(handover=True)
    rig = Rig(broker, workers=3)
    rig.open_lane()
    if why == "outside":  # its connections would never be seen in the lane
        outsider = Worker(broker, "s", PoolSpec("p", 2, 60_000, server="another"))
        outsider.hello()
        broker.take_in(broker.ledger.backend_gone(rig.tokens[1], broker.now))
        outsider.lend()
    elif why == "cancels":
        rig.pool.cancel_works = None
    elif why == "paused":
        broker.take_in(broker.ledger.order(Order(VERSION, OrderKind.PAUSE, "p"), broker.now)[1])
    elif why == "capped":
        broker.worker("o", "other").ask(9.0)
    elif why == "backoff":
        rig.pool.backoff.failed(Token(1, 99), 1, "down", rig.broker.now)
    rig.contend()
    rig.answer_all()
    rig.contend(place=2)
    rig.answer_all()
    assert not rig.moving
    assert broker.all(StartMoves) == []


def test_under_a_cap_moves_go_on_beside_a_pool_that_wants_nothing_they_could_give() -> None:
    """A pool at its own limit, with slots left under the cap, or with nobody who waits."""
    broker = Broker(handover=True, max_conn=3)
    rig = Rig(broker, workers=3)
    other = broker.worker("o", "other", max_conn=1)
    other.lend()
    rig.proceed()
    other.ask(9.0)  # its own limit is what keeps it waiting
    assert rig.moving
    broker.take_in(broker.ledger.backend_gone(next(iter(other.held)), broker.now))
    assert rig.moving  # that slot was free for it
    assert broker.all(HaltMoves) == []


def test_under_a_cap_a_waiter_of_another_pool_halts_the_moves_and_gets_the_next_checkin() -> None:
    broker = Broker(handover=True, max_conn=2)
    rig = Rig(broker, workers=3)
    rig.proceed()
    rig.give_up()
    other = broker.worker("o", "other", max_conn=1)
    assert rig.moving
    request = other.ask(9.0)
    assert not rig.moving
    rig.answer_all()
    holder = next(worker for worker in rig.workers if rig.tokens[1] in worker.held)
    assert holder.last(Recall).returns_due == 1
    holder.release(rig.tokens[1], ReleaseReason.RETURN_DUE)
    assert isinstance(other.outcome(request), Token)


def test_under_a_cap_moves_begin_again_when_no_other_pool_waits() -> None:
    broker = Broker(handover=True, max_conn=2)
    rig = Rig(broker, workers=3)
    rig.proceed()
    other = broker.worker("o", "other", max_conn=1)
    request = other.ask(9.0)
    assert not rig.moving
    broker.send(other.id, Withdraw(request))
    rig.answer_all()
    rig.contend(place=3)
    rig.answer_all()
    assert rig.moving


def test_a_session_that_has_not_joined_delays_the_moves_until_it_joins(rig: Rig) -> None:
    rig.open_lane()
    late = rig.broker.worker("late")
    rig.broker.take_in(rig.broker.ledger.backend_gone(rig.tokens[1], rig.broker.now))
    token = rig.desk.lend(late)
    rig.contend()
    rig.answer_all()
    late.answer()
    rig.contend(place=2)
    assert not rig.moving
    rig.join(late)
    assert rig.moving
    assert rig.board.find(token) >= 0


def test_idle_connections_are_recalled_while_others_move(rig: Rig) -> None:
    rig.proceed()
    rig.workers[1].checkin(rig.tokens[1])
    rig.workers[1].beat()
    assert rig.workers[1].last(Recall).take == 1
    assert rig.moving


def test_moves_go_on_while_requests_come_now_and_then(rig: Rig) -> None:
    rig.proceed()
    rig.give_up()
    for _ in range(5):
        rig.board.count_request()
        rig.broker.pass_time(QUIET_S * 1.01)
        rig.beat_all()
        assert rig.moving
    rig.broker.pass_time(QUIET_S * 1.01)
    assert not rig.moving


def test_moves_proceed_after_a_halt(rig: Rig) -> None:
    rig.proceed()
    rig.give_up()
    rig.broker.pass_time(QUIET_S * 1.01)
    assert not rig.moving
    rig.contend(place=3)
    rig.answer_all()
    rig.contend(place=4)
    assert rig.moving
    for _ in range(3):  # the watch for the end of it, too
        rig.broker.pass_time(QUIET_S * 1.01)
        rig.beat_all()
    rig.give_up()
    rig.broker.pass_time(QUIET_S * 1.01)
    assert not rig.moving


def test_when_moves_begin_the_waiters_decide_what_is_to_be_returned(rig: Rig) -> None:
    """Not by what was shared a while ago: no returns are due where others wait in the lane."""
    rig.proceed()
    assert rig.pool.shared_until <= rig.broker.now < rig.broker.now + SHARED_S
