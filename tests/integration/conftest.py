"""Fixtures for connections that move between sessions."""

from collections.abc import Iterator
from typing import Any

import pytest
from msgspec import structs

import sharedpool
from sharedpool import ThreadedConnectionPool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.pool import Pool
from tests.support.pool_pair import MakePair

_numbers = iter(range(1, 1000))


@pytest.fixture
def name() -> str:
    return f"moving{next(_numbers)}"


@pytest.fixture
def pair(broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str) -> Iterator[MakePair]:
    """Two sessions of one pool, as in two processes."""
    made: list[Pool] = []

    def make(**settings: Any) -> tuple[Pool, Pool]:
        options = {
            "dsn": postgres.dsn,
            "max_conn": 1,
            "timeout": 10,
            "pool_manager": ThreadedConnectionPool,
            **settings,
        }
        a = sharedpool.config_pool(name=name, broker=broker.address, **options)
        b = type(a)(structs.replace(a.config), a._broker)
        made.extend((a, b))
        for pool in (b, a):  # both are registered, and the connection is idle in the first
            pool.put_conn(pool.get_conn())
        return a, b

    yield make
    for pool in made:
        if not pool.disposed:
            pool.release_all()
