"""What a broker says of a role's CONNECTION LIMIT that is too low for its pools."""

import pytest

from sharedpool.broker.core.commands import Log
from sharedpool.wire.values import PoolSpec
from tests.unit.ledger_driver import Broker, Worker


def limited(broker: Broker, limit: int | None, role: str = "app") -> None:
    broker.take_in(broker.ledger.control.limited(broker.now, role=role, limit=limit))


def worker(broker: Broker, name: str, max_conn: int, role: str = "app") -> None:
    Worker(broker, name, PoolSpec(name, max_conn, 60_000, server=f"{role}@db:5432/{name}")).hello()


def warnings(broker: Broker) -> list[str]:
    return [log.text for log in broker.all(Log) if "CONNECTION LIMIT" in log.text]


@pytest.mark.parametrize("first", ["the pool", "the limit"])
def test_the_role_limit_is_max_conn_and_three_whichever_is_known_first(first: str) -> None:
    for limit, is_enough in ((7, True), (6, False), (None, True)):
        broker = Broker()
        if first == "the pool":
            worker(broker, "a", 4)
            limited(broker, limit)
        else:
            limited(broker, limit)
            worker(broker, "a", 4)
        assert bool(warnings(broker)) is not is_enough
        assert is_enough or "role 'app' may have 6 connections" in warnings(broker)[0]
        assert (
            is_enough
            or "7 are needed: max_conn 4, and 3 of the broker's own" in warnings(broker)[0]
        )


def test_all_pools_of_that_role_count_together_up_to_the_limit_over_all_of_them() -> None:
    broker = Broker()
    limited(broker, 8)
    worker(broker, "a", 3)
    worker(broker, "b", 20, role="somebody else")
    worker(broker, "c", 20, role="app2")
    assert not warnings(broker)
    worker(broker, "d", 3)
    assert "9 are needed: max_conn 6" in warnings(broker)[0]
    capped = Broker(max_conn=5)
    limited(capped, 8)
    worker(capped, "a", 3)
    worker(capped, "d", 3)
    assert not warnings(capped)


def test_a_low_role_limit_is_logged_once_until_it_changes() -> None:
    broker = Broker()
    for number in range(5):
        limited(broker, 5)
        worker(broker, f"pool {number}", 4)
    assert len(warnings(broker)) == 1
    limited(broker, 3)
    assert len(warnings(broker)) == 2
    limited(broker, 100)
    worker(broker, "one more", 4)
    assert len(warnings(broker)) == 2
