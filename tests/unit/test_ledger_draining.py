"""A broker that is to end: what it recalls, and whom it refuses."""

from __future__ import annotations

from sharedpool.wire.messages import Deny, DenyReason, Recall, ReleaseReason
from sharedpool.wire.values import Phase
from tests.unit.ledger_driver import Broker


def test_draining_recalls_what_is_idle_asks_for_the_rest_and_refuses_who_does_not_wait() -> None:
    broker = Broker()
    a, b = broker.worker("a", max_conn=3), broker.worker("b")
    busy, idle = a.lend(), a.lend()
    a.held[idle] = Phase.IDLE
    a.beat()
    b.lend()
    waits = b.ask(wait_s=60)
    broker.take_in(broker.ledger.drain(broker.now))
    denial = b.outcome(b.ask())
    assert isinstance(denial, Deny)
    assert denial.reason is DenyReason.DRAINING
    also_waits = b.ask(wait_s=30)
    recalls = a.sent(Recall)
    assert sum(recall.take for recall in recalls) == 1
    assert recalls[-1].returns_due == 2
    assert isinstance(a.outcome(a.ask()), Deny)
    a.release(idle, ReleaseReason.TAKEN)
    a.release(busy, ReleaseReason.RETURN_DUE)
    assert a.last(Recall).returns_due  # never relaxed while draining
    assert broker.ledger.leases == 1
    assert (b.outcome(waits), b.outcome(also_waits)) == (None, None)  # a successor may come
    for _ in range(31):
        b.beat()
        broker.pass_time(1.0)
    late = b.outcome(also_waits)
    assert isinstance(late, Deny)
    assert late.reason is DenyReason.DRAINING
    assert b.outcome(waits) is None
