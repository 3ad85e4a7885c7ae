"""Pools of one name in several databases, at a broker that serves all of a server."""

import pytest

from sharedpool.wire.messages import Bye
from sharedpool.wire.values import Token
from tests.unit.ledger_driver import Broker


def names(broker: Broker) -> dict[str, str]:
    pools, _ = broker.ledger.report(broker.now)
    return {pool.server: pool.name for pool in pools}


def test_an_automatic_broker_has_a_pool_for_each_database() -> None:
    broker = Broker(by_database=True)
    a = broker.worker("a", max_conn=1, database="one", server="one")
    b = broker.worker("b", max_conn=1, database="two", server="two")
    again = broker.worker("c", max_conn=1, database="one", server="one")
    a.lend()
    b.lend()
    assert not isinstance(again.outcome(again.ask()), Token)
    assert names(broker) == {"one": "p", "two": "p/two"}


def test_another_broker_has_one_pool_for_a_name_whatever_the_database() -> None:
    broker = Broker()
    a = broker.worker("a", max_conn=1, database="one")
    b = broker.worker("b", max_conn=1, database="two")
    a.lend()
    assert not isinstance(b.outcome(b.ask()), Token)


def test_a_pool_keeps_its_name_when_the_one_that_had_the_plain_name_has_gone() -> None:
    broker = Broker(by_database=True)
    a = broker.worker("a", max_conn=1, database="one", server="one")
    b = broker.worker("b", max_conn=1, database="two", server="two")
    b.lend()
    broker.send(a.id, Bye())
    c = broker.worker("c", max_conn=1, database="two", server="two")
    assert names(broker) == {"two": "p/two"}
    assert not isinstance(c.outcome(c.ask()), Token), "two limits for one pool"
    broker.worker("d", max_conn=1, database="one", server="one")
    assert names(broker) == {"two": "p/two", "one": "p"}


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_names_that_look_like_anothers_are_told_apart(order: tuple[int, ...]) -> None:
    spec = [("p", "one"), ("p", "two"), ("p/two", "one"), ("p/two", "")]
    broker = Broker(by_database=True)
    for number in order:
        pool, database = spec[number]
        broker.worker(f"w{number}", pool, max_conn=1, database=database, server=str(number)).lend()
    for number, (pool, database) in enumerate(spec):
        late = broker.worker(
            f"late{number}", pool, max_conn=1, database=database, server=str(number)
        )
        assert not isinstance(late.outcome(late.ask(wait_s=60)), Token)
    assert len(set(names(broker).values())) == len(spec)
