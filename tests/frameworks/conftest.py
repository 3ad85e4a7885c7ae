"""What the frameworks' tests share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sharedpool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support import automatic_broker as automatic
from tests.support.processes import BackendSampler


@pytest.fixture
def sampler(postgres: EphemeralPostgres, name: str) -> Iterator[BackendSampler]:
    """The most backends that the server has at a time."""
    with BackendSampler(postgres.dsn, f"sharedpool {name} [%") as sampler:
        yield sampler


@pytest.fixture
def automatic_broker(runtime_dir: Path) -> Iterator[None]:
    """No broker is named: the first process that needs one starts it, as in README.

    In the end nobody uses it.
    """
    with automatic.seen_off():
        yield


@pytest.fixture
def all_slots(postgres: EphemeralPostgres, name: str) -> Callable[[int], int]:
    """Have all slots of the pool at once, in this process, by whatever broker it finds; return how
    many that were."""

    def have(limit: int) -> int:
        threaded = sharedpool.ThreadedConnectionPool
        pool = sharedpool.config_pool(
            dsn=postgres.dsn, name=name, max_conn=limit, pool_manager=threaded
        )
        try:
            conns = [pool.get_conn(timeout=5) for _ in range(limit)]
            return len({conn.info.backend_pid for conn in conns})
        finally:
            pool.release_all()

    return have
