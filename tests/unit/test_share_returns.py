"""Wake-ups by other hosts, and what this host gives back before it has learned more."""

from __future__ import annotations

from sharedpool.broker.core.commands import SyncShare
from sharedpool.broker.core.share_returns import lacked
from sharedpool.broker.core.shares import HostShare
from sharedpool.wire.messages import Recall, ReleaseReason
from sharedpool.wire.values import Phase, Token
from tests.unit.ledger_driver import Worker
from tests.unit.sharing_driver import SharingBroker, with_share


def with_idle(idle: int, *, held: int = 10) -> tuple[SharingBroker, Worker]:
    """A host beside another one, with idle connections that its broker does not know to be idle."""
    broker, worker = with_share(held, in_use=idle)
    for token in worker.held:
        worker.checkin(token)
        worker.ages[token] = 1000  # ms
    broker.pass_time(1.0)
    return broker, worker


def syncs(broker: SharingBroker) -> int:
    return len(broker.all(SyncShare))


def closing(worker: Worker) -> list[Token]:
    return [token for token, phase in worker.held.items() if phase is Phase.CLOSING]


def test_what_others_lack_is_asked_back_before_a_sync_and_given_back_with_the_next() -> None:
    broker, worker = with_idle(10)
    before = syncs(broker)
    broker.wake(wanted=3)
    worker.answer()
    assert syncs(broker) == before
    worker.answer()
    wanted_back = closing(worker)
    assert len(wanted_back) == 3
    for token in wanted_back[:2]:
        worker.release(token)
    assert syncs(broker) == before
    worker.release(wanted_back[2])
    assert syncs(broker) == before + 1
    assert broker.order.claim.least == 7


def test_what_nobody_waits_for_is_not_given_back_one_by_one() -> None:
    broker, worker = with_idle(10)
    broker.wake()
    worker.answer()
    worker.answer()
    (first,) = closing(worker)
    worker.release(first)
    asked = len(worker.sent(Recall))
    broker.answer(broker.order, held=9, owed=4)
    assert len(worker.sent(Recall)) == asked, "those who wait come first"
    broker.pass_time(0.06)
    worker.answer()
    others = closing(worker)
    assert len(others) == 4
    before = syncs(broker)
    for token in others[:-1]:
        worker.release(token)
    assert syncs(broker) == before
    worker.release(others[-1])
    assert syncs(broker) == before + 1


def test_what_has_come_is_given_back_after_a_moment() -> None:
    broker, worker = with_idle(10)
    broker.wake(wanted=3)
    worker.answer()
    worker.answer()
    worker.release(closing(worker)[0])
    before = syncs(broker)
    broker.pass_time(0.01)
    assert syncs(broker) == before + 1


def test_a_wake_up_by_somebody_else_is_only_a_reason_to_look() -> None:
    """Every user of a database may send a NOTIFY with any text."""
    broker, worker = with_idle(10)
    before = syncs(broker)
    broker.wake(wanted=10, pid=3)
    worker.answer()
    assert worker.last(Recall).take == 0
    assert syncs(broker) == before + 1


def test_a_wake_up_in_the_middle_of_a_sync_leads_to_another_one() -> None:
    """The sync under way may have read the table before the other host wrote what it wants."""
    broker, worker = with_idle(0)
    worker.ask(60.0)
    pending = broker.sync_again()
    before = syncs(broker)
    broker.wake()
    worker.answer()
    assert syncs(broker) == before
    broker.answer(pending, held=10)
    assert syncs(broker) == before + 1


def test_a_host_that_lacks_slots_looks_at_once_when_another_has_given_some_back() -> None:
    broker, worker = with_share(0)
    worker.ask(60.0)
    broker.answer(broker.order, held=0, lacking=1)
    broker.pass_time(1.0)
    before = syncs(broker), len(worker.sent(Recall))
    if broker.order.serial == broker.ledger.sharing.shares[broker.order.key].pending:
        broker.answer(broker.order, held=0, lacking=1)
    broker.wake(wanted=0)
    assert syncs(broker) == before[0] + 1
    assert len(worker.sent(Recall)) == before[1]


def test_a_worker_that_does_not_answer_delays_the_sync_for_a_moment_only() -> None:
    broker, _ = with_idle(10)
    before = syncs(broker)
    broker.wake()
    assert syncs(broker) == before
    broker.pass_time(0.01)
    assert syncs(broker) == before + 1


def test_connections_in_use_are_not_asked_back_for_a_forecast() -> None:
    broker, worker = with_share(10, in_use=10)
    before = syncs(broker)
    broker.wake()
    worker.answer()
    assert worker.last(Recall).take == 0
    assert syncs(broker) == before + 1


def test_what_is_free_is_not_lacked() -> None:
    others = [HostShare("b", 2, 5), HostShare("c", 3, 1)]
    assert lacked(10, 5, others) == 3
    assert lacked(10, 3, others) == 1
    assert lacked(10, 1, others) == 0


def test_a_return_after_another_reason_counts_as_well() -> None:
    broker, worker = with_idle(10)
    broker.wake(wanted=10)
    worker.answer()
    before = syncs(broker)
    for token in list(worker.held):
        worker.release(token, ReleaseReason.EXPIRED)
    assert syncs(broker) > before
