"""What a request costs the broker: deadlines that are over, and the work with many sessions."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable

from sharedpool.broker.core.ledger import Ledger
from sharedpool.wire.messages import (
    PROTOCOL_VERSION,
    Acquire,
    Bye,
    Confirm,
    Hello,
    Release,
    ReleaseReason,
    Renew,
    Withdraw,
)
from sharedpool.wire.values import Backend, LeaseReport, Phase, PoolSpec, Token
from tests.unit.ledger_driver import EPOCH, TTL_S, Broker

# --- deadlines


def test_deadlines_of_requests_that_are_over_wake_nobody(broker: Broker) -> None:
    """A wait without end would else be more than a selector can wait for."""
    a = broker.worker("a")
    a.ask(wait_s=2**40)
    broker.send(a.id, Bye())
    assert broker.ledger.next_deadline() is None


def test_a_request_granted_at_once_leaves_no_deadline(broker: Broker) -> None:
    a = broker.worker("a")
    deadlines = len(broker.ledger._timers)
    a.granted(a.ask(wait_s=3600))
    assert len(broker.ledger._timers) == deadlines


def test_one_deadline_serves_all_sessions_that_are_heard(broker: Broker) -> None:
    """Its alarm is for the one who was unheard for longest: all others are heard meanwhile, as a
    rule."""
    a, b = broker.worker("a"), broker.worker("b")
    broker.pass_time(5)
    assert broker.ledger.next_deadline() == 1000.0 + TTL_S
    a.beat()
    broker.pass_time(5)
    b.beat()
    assert len(broker.ledger._timers) == 1
    broker.pass_time(5)
    assert broker.ledger.sessions == 2
    assert broker.ledger.next_deadline() == 1005.0 + TTL_S


def test_deadlines_of_requests_that_are_over_do_not_pile_up(broker: Broker) -> None:
    a = broker.worker("a")
    for _ in range(2000):
        a.release(a.granted(a.ask(wait_s=3600)), ReleaseReason.UNUSED)
    assert len(broker.ledger._timers) < 1000


# --- work


class CountingTrace:
    """Counts the calls and lines of the broker's core."""

    def __init__(self) -> None:
        self.lines: Counter[str] = Counter()

    def __call__(self, frame: object, event: str, arg: object) -> CountingTrace:
        if event == "line":
            self.lines["all"] += 1
        return self


def lines_run(work: Callable[[], object]) -> int:
    trace, before = CountingTrace(), sys.gettrace()
    gc.disable()  # a finalizer of what other tests have left behind would be counted
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
        gc.enable()
    return trace.lines["all"]


def cost_with(sessions: int) -> dict[str, int]:
    """Count the lines run for one request of each kind, with so many other sessions, one connection
    each."""
    ledger = Ledger(EPOCH, ttl_s=TTL_S)
    spec = PoolSpec("p", sessions + 1, 60_000)
    for number in range(sessions + 1):
        name = b"%d" % number
        ledger.handle(name, Hello(PROTOCOL_VERSION, number + 1, "", "w", spec), 0.0)
        if number < sessions:
            ledger.handle(name, Acquire(1, 0), 0.0)
            ledger.handle(name, Confirm(Token(EPOCH, number + 1), Backend(number + 1)), 0.0)
            idle = LeaseReport(Token(EPOCH, number + 1), Phase.IDLE, 0)
            ledger.handle(name, Renew([idle], idle.token), 0.0)
    asker, token = b"%d" % sessions, Token(EPOCH, sessions + 1)
    steps: dict[str, Callable[[], object]] = {
        "grant": lambda: ledger.handle(asker, Acquire(1, 0), 1.0),
        "confirm": lambda: ledger.handle(asker, Confirm(token, Backend(1)), 1.0),
        "renew": lambda: ledger.handle(
            asker, Renew([LeaseReport(token, Phase.IN_USE, 0)], token), 1.0
        ),
        "tick": lambda: ledger.tick(1.0),
        "wait and recall": lambda: ledger.handle(asker, Acquire(2, 60_000), 1.0),
        "cancel": lambda: ledger.handle(asker, Withdraw(2), 1.0),
        "release": lambda: ledger.handle(asker, Release(token, True, ReleaseReason.CLOSED), 1.0),
    }
    return {name: lines_run(step) for name, step in steps.items()}


def test_the_work_for_a_request_does_not_grow_with_the_number_of_sessions() -> None:
    assert cost_with(10_000) == cost_with(10)
