"""No faults, but races: a checkin when its connection expires, a checkout when it is idle
elsewhere."""

import pytest

from tests.faults.environment import Environment
from tests.faults.results import Row, percentile, scale, spread
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.fault, pytest.mark.timeout(scale(120, 900))]

EXPIRATION_S = 0.02
# Each needs two connections at a time.
MEETING = 5


@pytest.mark.long
@pytest.mark.row("expiry", "checkin within ±5 ms of expiry, 10⁴ times", "double use 0")
def test_a_connection_that_expires_at_its_checkout_is_closed_or_lent_not_both(
    field: Environment, row: Row
) -> None:
    """One meeting: a checkin within 5 ms of another connection's expiry, then a checkout within 5
    ms of its own.

    A connection that the pool closes while it is lent out fails its statements; one lent twice
    overlaps.
    """
    goal = scale(1000, 10_000)
    crew = field.open(config={"expiration": EXPIRATION_S})
    crew.start(MEETING, "e")
    wait_until(
        lambda: sum(crew.tally(n, "met") for n in range(MEETING)) >= goal,
        scale(60, 800),
        f"{goal} meetings",
    )
    found = field.judge()
    row.faults = sum(crew.tally(number, "met") for number in range(MEETING))
    broken = [error for checkout in found for error in checkout.errors]
    failed = [checkout for checkout in found if checkout.failure]
    row.figures |= {"broken": len(broken), "refused": len(failed)}
    row.worst = row.double_use or 0
    row.measured = (
        f"{row.faults} checkins, {row.backends} backends; double use {row.double_use};"
        f" errors {len(broken)}"
    )
    assert row.backends > row.faults // 10, "hardly anything has expired"
    assert not broken, broken[:5]
    assert not failed, failed[:5]


@pytest.mark.long
@pytest.mark.row(
    "recall", "one process idle on all 10, another asks, 10³ times", "recall p99 ≤ 20 ms"
)
def test_a_connection_idle_elsewhere_is_recalled_at_once(field: Environment, row: Row) -> None:
    """Recall: the whole `get_conn` of the one who asks: the request, the recall, the close, the
    grant and the connect.

    The process that is idle does not call its pool meanwhile. A close that is reported before it is
    done overshoots.
    """
    crew = field.open()
    rich, poor = crew.start(2, "p")
    times = scale(60, 1000)
    for _ in range(times):
        crew.order([rich], "k")
        crew.wait_until_done([rich])
        crew.order([poor], "1")
        crew.wait_until_done([poor])
    found = field.judge()
    took = [c.waited for c in found if c.worker == str(poor) and c.backend is not None]
    row.faults = len(took)
    broken = [error for checkout in found for error in checkout.errors]
    failed = [checkout for checkout in found if checkout.failure]
    row.figures |= {"recall": spread(took)}
    row.worst = percentile(took, 99)
    row.measured = f"recall with connect {spread(took, 1e-3, 'ms')}"
    assert len(took) == times
    assert not broken, broken[:5]
    assert not failed, failed[:5]
    assert percentile(took, scale(90, 99)) <= scale(0.25, 0.02)
