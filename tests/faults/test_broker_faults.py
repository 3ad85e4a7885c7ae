"""Faults of the broker: killed and restarted, frozen, started twice."""

import random
import time

import pytest
from arena import TTL_S, WORKERS, Arena
from events import Checkout
from record import Row, percentile, scale, spread
from waiting import wait_until

pytestmark = [pytest.mark.fault, pytest.mark.timeout(scale(120, 900))]


@pytest.mark.row(
    "broker-sigkill", "broker SIGKILLed and restarted 50 times under load",
    "failed statements on held connections: 0; service back p99 ≤ TTL + 1 s",
)  # fmt: skip
def test_a_killed_broker_breaks_nothing_and_is_back_soon(field: Arena, row: Row) -> None:
    """Service back: from the kill until a probe, whose every checkout needs a grant and a connect, has got one it asked
    for after the kill. That includes the start of the new broker's interpreter."""
    rng = random.Random(row.seed)
    crew = field.open()
    crew.start(WORKERS - 1)
    (probe,) = crew.start(1, "c")
    crew.wait_for([probe], "out")
    back = []
    for _ in range(scale(3, 50)):
        time.sleep(rng.uniform(0, 1.0))  # the schedule is the fault: killed at a random moment
        at = field.broker.kill()
        time.sleep(rng.choice([0.0, rng.uniform(0, scale(0.5, 2.0))]))  # and away for a random time
        relaunched = time.monotonic()
        field.broker.launch()

        def served(since: float = at) -> Checkout | None:
            mine = [c for c in field.checkouts() if c.worker == str(probe) and c.asked >= since]
            return next((c for c in mine if c.backend is not None), None)

        checkout = wait_until(served, 30, "a checkout after the broker's restart")
        assert checkout.answered is not None
        back.append(checkout.answered - max(at, relaunched))
        row.faults += 1
    field.broker.wait_until_it_answers()
    found = field.judge()
    broken = [error for checkout in found for error in checkout.errors]
    row.figures |= {"service back": spread(back), "broken": len(broken)}
    row.measured = f"{row.faults} kills; failed statements {len(broken)}; service back {spread(back)}"
    assert not broken, f"statements failed: {broken[:5]}"
    assert percentile(back, 99) <= TTL_S + scale(3.0, 1.0)
