"""Messages that come twice, late or never."""

from __future__ import annotations

from sharedpool.broker.core.commands import Fence, Watch
from sharedpool.wire.messages import (
    Ack,
    Acquire,
    Confirm,
    Grant,
    Reject,
    Release,
    ReleaseReason,
    Renew,
)
from sharedpool.wire.values import Backend, LeaseReport, Phase, Token
from tests.unit.ledger_driver import EPOCH, Broker

# --- doubles


def test_a_doubled_acquire_is_answered_once_while_it_waits(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    token = a.lend()
    broker.send(b.id, Acquire(b.ask(wait_s=60), 60_000))
    a.release(token)
    assert len(b.sent(Grant)) == 1
    assert broker.ledger.leases == 1


def test_a_doubled_acquire_after_the_grant_gets_the_same_lease(broker: Broker) -> None:
    a = broker.worker("a")
    broker.send(a.id, Acquire(a.ask(), 0))
    assert [grant.token for grant in a.sent(Grant)] == [Token(EPOCH, 1)] * 2
    assert broker.ledger.leases == 1


def test_a_doubled_release_frees_one_slot(broker: Broker) -> None:
    a, b = broker.worker("a"), broker.worker("b")
    token = a.lend()
    b.lend()
    a.release(token)
    a.release(token)
    assert broker.ledger.leases == 1


def test_a_doubled_hello_changes_nothing(broker: Broker) -> None:
    a = broker.worker("a")
    a.lend()
    request = a.ask()
    a.hello()
    assert broker.ledger.leases == 2
    assert broker.ledger.sessions == 1
    assert len(broker.all(Watch)) == 1
    assert isinstance(a.outcome(request), Token)


def test_a_doubled_confirm_changes_nothing(broker: Broker) -> None:
    a = broker.worker("a")
    token = a.lend()
    broker.send(a.id, Confirm(token, a.backend(token)))
    assert broker.ledger.leases == 1


# --- lost messages


def test_a_lost_grant_is_sent_again_at_the_heartbeat(broker: Broker) -> None:
    a = broker.worker("a")
    a.ask()
    a.beat()
    assert [grant.token for grant in a.sent(Grant)] == [Token(EPOCH, 1)] * 2


def test_a_grant_that_a_newer_one_overtook_is_freed(broker: Broker) -> None:
    a = broker.worker("a")
    a.ask()
    a.open(a.ask())
    a.pending.clear()
    a.beat()
    broker.show_nothing()
    assert broker.ledger.leases == 1


def test_a_lost_acquire_is_asked_for_again_at_the_heartbeat(broker: Broker) -> None:
    a = broker.worker("a")
    a.pending.append(9)
    a.beat()
    assert not a.last(Reject).fatal


def test_a_lost_cancel_is_made_good_by_the_heartbeat(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    token = a.lend()
    request = b.ask(wait_s=60)
    b.pending.clear()
    b.beat()
    a.release(token)
    assert b.outcome(request) is None


def test_a_lost_release_does_not_free_a_slot_unverified(broker: Broker) -> None:
    """It may have said that the close was not seen to end."""
    a = broker.worker("a")
    token = a.lend()
    del a.held[token]
    a.beat()
    assert [fence.token for fence in broker.all(Fence)] == [token]
    assert broker.ledger.leases == 1
    a.release(token)  # late after all, and good evidence
    assert broker.ledger.leases == 0


def test_a_late_report_does_not_take_a_connection_back_to_unconnected(broker: Broker) -> None:
    a = broker.worker("a")
    token = a.granted(a.ask())
    broker.send(a.id, Renew([LeaseReport(token, Phase.CLOSING, 0)], token))
    broker.send(a.id, Renew([LeaseReport(token, Phase.CONNECTING, 0)], token))
    assert broker.ledger.report(broker.now)[0][0].closing == 1


def test_words_about_other_peoples_leases_are_ignored(broker: Broker) -> None:
    a, b = broker.worker("a"), broker.worker("b")
    token = a.lend()
    broker.send(b.id, Release(token, True, ReleaseReason.TAKEN))
    broker.send(b.id, Confirm(token, Backend(1)))
    b.held = {token: Phase.IDLE}
    b.beat()
    assert b.last(Ack).revoked == [token]
    assert broker.ledger.leases == 1
