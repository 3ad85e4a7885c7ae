"""Faults of the server that several hosts share: restarted, crashed, replaced by its replica."""

from typing import Literal

import pytest

from tests.faults.results import Row, scale, spread
from tests.faults.schedule import let_pass
from tests.hosts.world import World

pytestmark = [pytest.mark.fault, pytest.mark.hosts, pytest.mark.timeout(scale(240, 1800))]

FULL_S = scale(10.0, 5.0)


def restart(field: World, row: Row, mode: Literal["fast", "immediate"], times: int) -> None:
    """Restart the server under load.

    Measure from its first answer until all hosts have their fair share again.
    """
    field.open()
    took = []
    for _ in range(times):
        field.wait_until_full(field.living(), field.clock(), 60)
        let_pass(1.0)
        field.lab.server.restart(mode)
        since = field.clock()
        row.faults += 1
        took.append(field.wait_until_each_has(field.fair(), since, 60) - since)
    finish(field, row, took)


def finish(field: World, row: Row, took: list[float]) -> None:
    field.wait_until_full(field.living(), field.clock(), 60)
    found = field.judge()
    twice = [checkout for checkout in found if len(checkout.errors) > 1]
    row.figures |= {"took": spread(took)}
    row.worst = max(took)
    row.measured = spread(took)
    assert not twice, twice[:3]
    assert max(took) <= FULL_S


@pytest.mark.row(
    "hosts-restart-fast",
    "PostgreSQL restarted fast, 5 times",
    "all hosts have their shares ≤ 5 s after its first answer",
)
def test_all_hosts_have_their_shares_after_a_restart(field: World, row: Row) -> None:
    restart(field, row, "fast", scale(1, 5))


@pytest.mark.row(
    "hosts-restart-immediate",
    "PostgreSQL restarted by an immediate shutdown, as after a crash, 5 times",
    "all hosts have their shares ≤ 5 s after its first answer",
)
def test_all_hosts_have_their_shares_after_a_crash(field: World, row: Row) -> None:
    """Unlogged tables are empty then."""
    restart(field, row, "immediate", scale(1, 5))


@pytest.mark.row(
    "hosts-failover",
    "PostgreSQL crashes, and its streaming replica is promoted",
    "all hosts have their shares ≤ 5 s after the promotion",
)
def test_all_hosts_have_their_shares_after_a_failover(field: World, row: Row) -> None:
    """The workers' connection string names both, with target_session_attrs=read-write."""
    standby = field.add_standby()
    field.open()
    field.wait_until_full(field.living(), field.clock(), 60)
    let_pass(1.0)
    field.lab.server.shutdown("immediate")
    field.backends.follow(standby)
    row.faults += 1
    promoted = standby.promote()
    took = [field.wait_until_each_has(field.fair(), promoted, 60) - promoted]
    finish(field, row, took)
