"""Fixtures for all tests: a PostgreSQL server of our own, and nothing of the developer's environment."""

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import psycopg2.extensions
import pytest
from psycopg2 import sql

from sharedpool.cli.postgres import EphemeralPostgres

_OURS = ("SHAREDPOOL_", "PG", "DATABASE_DSN", "DATABASE_URL")
_database_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the developer's settings; only SHAREDPOOL_PG_BIN stays: it chooses the server that is tested."""
    for name in list(os.environ):
        if name.startswith(_OURS) and name != "SHAREDPOOL_PG_BIN":
            monkeypatch.delenv(name)


@pytest.fixture
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Point XDG_RUNTIME_DIR to a private directory, with a path short enough for unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="spr-", dir="/tmp"))  # mkdtemp makes it 0700
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[EphemeralPostgres]:
    """A PostgreSQL server for the whole session; under xdist each worker has its own."""
    with EphemeralPostgres(max_connections=100) as server:
        yield server


@pytest.fixture
def server_connection(postgres: EphemeralPostgres) -> Iterator[psycopg2.extensions.connection]:
    """An autocommit connection to the database `postgres`, for a look at pg_stat_activity."""
    connection = psycopg2.connect(postgres.dsn, application_name="test observer")
    connection.autocommit = True
    yield connection
    connection.close()


@pytest.fixture
def database(postgres: EphemeralPostgres, server_connection: psycopg2.extensions.connection) -> Iterator[str]:
    """The conninfo string of a new, empty database, dropped afterwards with whoever is still connected."""
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
