"""Faults of the way between workers and broker."""

import pytest

from tests.faults.environment import WORKERS, Environment
from tests.faults.proxy import Proxy
from tests.faults.results import Row, scale, spread
from tests.faults.schedule import let_pass

pytestmark = [pytest.mark.fault, pytest.mark.timeout(scale(120, 600))]

# What a caller that did not ask to wait waits at most for the broker's answer: its table of errors
# says "some seconds".
NO_WAIT_S = 5.0


@pytest.mark.long
@pytest.mark.row(
    "proxy", "message proxy: 10 % dropped, 10 % doubled, 0-2 s late, reordered",
    "everything finishes or times out as asked",
)  # fmt: skip
def test_everybody_is_served_or_refused_in_time_on_a_bad_network(
    field: Environment, row: Row
) -> None:
    """Late: by how much a refusal came after the caller's own deadline.

    A worker of which nothing was heard for a TTL may lose what it holds to one that waits: loudly,
    so statements may fail here. They are counted. Sockets are passed at the desk, which is no
    network.
    """
    front = f"ipc://{field.directory}/proxy.sock"
    with Proxy(front, field.address, row.seed) as proxy:
        crew = field.open(address=front, timeouts=scale([0, 0.5, 1, 3], [0, 0.5, 2, 5]))
        crew.start(WORKERS)
        let_pass(scale(6, 120))  # the network is bad for so long
        row.faults = proxy.fates["dropped"] + proxy.fates["doubled"]
        fates = dict(proxy.fates)
        crew.quiet()
        proxy.heal()
        found = field.judge()
    refused = [c for c in found if c.failure]
    late = [c.lateness for c in refused if c.timeout]
    unasked = [c.waited for c in refused if not c.timeout]
    broken = [error for checkout in found for error in checkout.errors]
    row.figures |= {
        "messages": fates,
        "late": spread(late),
        "without a wait": spread(unasked),
        "broken": len(broken),
    }
    row.worst = max(late, default=0.0)
    row.measured = (
        f"{sum(fates.values())} messages, {fates.get('dropped', 0)} lost, "
        f"{fates.get('doubled', 0)} doubled;"
        f" {row.checkouts} checkouts, {len(refused)} refused, late by {spread(late, 1e-3, 'ms')};"
        f" failed statements {len(broken)}"
    )
    assert {c.failure for c in refused} <= {"PoolExhausted", "PoolTimeout", "BrokerUnavailable"}
    assert max(late, default=0.0) <= scale(1.0, 0.25)
    assert max(unasked, default=0.0) <= NO_WAIT_S + scale(1.0, 0.25)
