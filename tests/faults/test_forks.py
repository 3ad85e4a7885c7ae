"""Forks of workers, in whatever state their pool is."""

import random

import pytest

from tests.faults.brokers import ReportWatch
from tests.faults.environment import Environment
from tests.faults.results import Row, percentile, scale, spread
from tests.faults.schedule import let_pass
from tests.support.processes import alive
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.fault, pytest.mark.timeout(scale(120, 600))]

# each has at most one connection in the parent and one in a child: nobody waits for a slot in vain
FORKING = 4
ORDERS_IN_A_ROUND = 2


@pytest.mark.row(
    "fork",
    "fork while idle / while holding; parent killed, child lives on",
    "parent unharmed; slots back ≤ 0.5 s",
)
def test_forks_harm_no_parent_and_keep_no_slot_of_a_killed_one(
    field: Environment, row: Row
) -> None:
    """Slot back: from the parent's SIGKILL until the first report of the broker has come that shows
    no lease of it.

    The child that lives on is one that has used the pool, or one forked behind Python's back (no
    fork hooks), which keeps duplicates of all of the parent's sockets.
    """
    rng = random.Random(row.seed)
    crew = field.open()
    crew.start(FORKING, "f")
    back: list[tuple[float, str]] = []
    kinds: dict[str, int] = {}
    with ReportWatch(field.address) as watch:
        for _ in range(scale(3, 30)):
            parents = crew.start(ORDERS_IN_A_ROUND, "F")
            forks = crew.wait_for(parents, "forked")
            children = [int(fork.words[0]) for fork in forks]
            for child in children:
                crew.adopt(child)
            crew.wait_for(
                [f"{n}-{child}" for n, child in zip(parents, children, strict=True)], "lives"
            )
            let_pass(rng.uniform(0, 0.2))  # killed at a random moment
            for number, fork, child in zip(parents, forks, children, strict=True):
                pid = crew.pid(number)
                if (
                    fork.words[2] == "holding"
                ):  # an idle one may have been recalled meanwhile: others wait
                    wait_until(lambda p=pid: watch.held(p), 10, "the parent's lease in a report")
                at = crew.kill(number)
                freed = watch.freed(pid, at)
                kind = f"{fork.words[1]}, {fork.words[2]}"
                kinds[kind] = kinds.get(kind, 0) + 1
                if freed is not None:
                    back.append((freed - at, kind))
                assert alive(child), "the child has died with its parent"
                row.faults += 1
            for number, child in zip(parents, children, strict=True):
                assert crew.bid_farewell(number, child) == 0, crew.errors()
    found = field.judge()
    noted = [
        event
        for events in field.events().values()
        for event in events
        if event.kind in ("reaped", "stole")
    ]
    ends = [event for event in noted if event.kind == "reaped"]
    stolen = [event for event in noted if event.kind == "stole"]
    broken = [error for checkout in found for error in checkout.errors]
    failed = [checkout for checkout in found if checkout.failure]
    took = [after_s for after_s, _ in back]
    row.figures |= {
        "kinds": kinds,
        "slot back": spread(took),
        "slowest": sorted(back)[-5:],
        "broken": len(broken),
        "forks": len(ends) + row.faults,
    }
    row.worst = max(took, default=0.0)
    row.measured = (
        f"{len(ends)} forks of living parents, {row.faults} of killed ones; failed statements "
        f"{len(broken)};"
        f" slot back {spread(took, 1e-3, 'ms')}"
    )
    assert ends
    assert all(event.words[1] == "0" for event in ends), ends
    assert not stolen, stolen
    assert not broken, broken[:5]
    assert not failed, failed[:5]
    assert len(back) >= row.faults // 2, "hardly any parent held a lease when it was killed"
    assert percentile(took, 100) <= scale(2.5, 0.5)
