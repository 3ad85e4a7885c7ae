"""Fixtures for all tests: a private PostgreSQL server, and an environment without the developer's
settings."""

import contextlib
import itertools
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest
from hypothesis import settings
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants
from psycopg2 import sql

import sharedpool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.fixture_types import Backends, MakePool
from tests.support.processes import LONG

# A shell starts background jobs with SIGINT ignored, and children inherit that; some tests send
# SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests start hundreds of Python processes. Without bytecode, compiling would take half their
# time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# The same examples in every run, so that no run fails by luck. `--hypothesis-profile=search` tries
# others.
settings.register_profile("search", max_examples=20_000, deadline=None)
settings.register_profile("steady", derandomize=True)
settings.load_profile("steady")
# Hypothesis also draws constants that it finds in the project's modules, as far as they are
# imported: others in a run of the whole suite than of one file. A seed would not repeat a failure.
_NO_CONSTANTS = Constants()
providers._get_local_constants = lambda: _NO_CONSTANTS

_OURS = ("SHAREDPOOL_", "PG", "DATABASE_DSN", "DATABASE_URL")
_database_numbers = itertools.count(1)


@pytest.hookimpl(optionalhook=True)  # xdist's
def pytest_xdist_auto_num_workers() -> int:
    """Let `-n auto` start two workers more than there are processors, since many
    tests mostly wait."""
    return (os.cpu_count() or 1) + 2


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked as long, unless something is asked for by name or mark."""
    if LONG or config.option.markexpr or any("::" in each for each in config.args):
        return
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    variants: Counter[str] = Counter()
    for item in items:
        is_long = item.get_closest_marker("long") is not None
        if (marker := item.get_closest_marker("long_variants")) is not None:
            function = item.nodeid.partition("[")[0]
            is_long |= variants[function] >= marker.kwargs.get("first", 1)
            variants[function] += 1
        (left_out if is_long else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the developer's settings, except SHAREDPOOL_PG_BIN, which chooses the server."""
    for name in list(os.environ):
        if name.startswith(_OURS) and name != "SHAREDPOOL_PG_BIN":
            monkeypatch.delenv(name)


@pytest.fixture
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Point XDG_RUNTIME_DIR to a private directory whose path is short enough for unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="spr-", dir="/tmp"))  # mode 0700
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[EphemeralPostgres]:
    """A PostgreSQL server for the session; under xdist, one for each worker."""
    with EphemeralPostgres(
        max_connections=100, settings={"max_prepared_transactions": "5"}
    ) as server:
        yield server


@pytest.fixture
def server_connection(postgres: EphemeralPostgres) -> Iterator[psycopg2.extensions.connection]:
    """An autocommit connection to the database `postgres`, for queries of pg_stat_activity."""
    connection = psycopg2.connect(postgres.dsn, application_name="test observer")
    connection.autocommit = True
    yield connection
    connection.close()


@pytest.fixture
def database(
    postgres: EphemeralPostgres, server_connection: psycopg2.extensions.connection
) -> Iterator[str]:
    """The conninfo string of a new, empty database, dropped after the test, open
    sessions included."""
    name = f"test_{next(_database_numbers)}"
    with server_connection.cursor() as cursor:
        cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    yield psycopg2.extensions.make_dsn(postgres.dsn, dbname=name)
    # A new connection: the test may have restarted the server.
    connection = psycopg2.connect(postgres.dsn)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
    connection.close()


@pytest.fixture(scope="module")
def broker(postgres: EphemeralPostgres) -> Iterator[sharedpool.Broker]:
    """A broker with a control connection, a cap that no test reaches, and a short TTL."""
    path = tempfile.mkdtemp(prefix="spb-", dir="/tmp")
    address = f"ipc://{path}/broker.sock"
    with sharedpool.start_broker(60, address=address, dsn=postgres.dsn, ttl=3.0) as broker:
        yield broker
    shutil.rmtree(path)


_pool_numbers = itertools.count(1)


@pytest.fixture
def make_pool(broker: sharedpool.Broker, postgres: EphemeralPostgres) -> Iterator[MakePool]:
    """`config_pool` on the module's broker, with a new name each time; the pools are disposed of
    afterwards."""
    made: list[sharedpool.Pool] = []

    def make(**settings: Any) -> sharedpool.Pool:
        settings = {
            "dsn": postgres.dsn,
            "broker": broker.address,
            "name": f"pool{next(_pool_numbers)}",
        } | settings
        pool = sharedpool.config_pool(**settings)
        made.append(pool)
        return pool

    yield make
    for pool in made:
        with contextlib.suppress(sharedpool.PoolClosed):  # the test has disposed of it itself
            pool.release_all()


@pytest.fixture
def backends(server_connection: psycopg2.extensions.connection) -> Backends:
    """The pids of a pool's backends, by pg_stat_activity."""

    def of(pool: sharedpool.Pool) -> set[int]:
        with server_connection.cursor() as cursor:
            pattern = f"sharedpool {pool.name} [%"
            cursor.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name LIKE %s", [pattern]
            )
            return {pid for (pid,) in cursor.fetchall()}

    return of
