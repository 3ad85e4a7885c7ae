"""A broker with metrics, and pools on it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import sharedpool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.broker_process import Broker, running


@pytest.fixture(scope="module")
def served(postgres: EphemeralPostgres) -> Iterator[Broker]:
    directory = Path(tempfile.mkdtemp(prefix="spm-", dir="/tmp"))
    with running(postgres.dsn, directory) as broker:
        yield broker
    shutil.rmtree(directory)


@contextmanager
def pool_on(
    served: Broker, postgres: EphemeralPostgres, name: str, **more: Any
) -> Iterator[sharedpool.Pool]:
    pool = sharedpool.config_pool(
        dsn=postgres.dsn,
        broker=served.address,
        name=name,
        pool_manager=sharedpool.ThreadedConnectionPool,
        **more,
    )
    try:
        yield pool
    finally:
        pool.release_all()
