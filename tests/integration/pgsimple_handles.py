"""A database and pools for PgSimple, its README's table of books, and what a pool counts."""

import itertools
import tempfile
from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import make_dsn

import sharedpool
from sharedpool import PgSimple, Pool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.fixture_types import MakePool

TTL_S = 1.5  # heartbeats twice a second


@pytest.fixture(scope="module")
def module_dsn(postgres: EphemeralPostgres) -> Iterator[str]:
    """A database for all tests here: creating one for each takes longer than the tests."""
    admin = psycopg2.connect(postgres.dsn)
    admin.autocommit = True
    with admin.cursor() as cursor:
        cursor.execute("CREATE DATABASE pgsimple")
        yield make_dsn(postgres.dsn, dbname="pgsimple")
        cursor.execute("DROP DATABASE pgsimple WITH (FORCE)")
    admin.close()


@pytest.fixture(scope="module")
def broker(postgres: EphemeralPostgres) -> Iterator[sharedpool.Broker]:
    """A broker for all tests here: every test has a pool of its own name."""
    with (
        tempfile.TemporaryDirectory(
            prefix="spr-", dir="/tmp"
        ) as folder,  # short enough for a unix socket
        sharedpool.start_broker(
            max_conn=8, address=f"ipc://{folder}/broker", dsn=postgres.dsn, ttl=TTL_S
        ) as broker,
    ):
        yield broker


_numbers = itertools.count(1)


@pytest.fixture
def make_pool(module_dsn: str, broker: sharedpool.Broker) -> Iterator[MakePool]:
    """Make pools, disposed of after the test; then the database is emptied."""
    pools: list[Pool] = []

    def make(max_conn: int = 2, **options: Any) -> Pool:
        options = {
            "dsn": module_dsn,
            "broker": broker.address,
            "name": f"test {next(_numbers)}",
            **options,
        }
        pools.append(sharedpool.config_pool(max_conn, **options))
        return pools[-1]

    yield make
    for pool in pools:
        if not pool.disposed:
            pool.release_all()
    cleaner = psycopg2.connect(module_dsn)
    with cleaner, cleaner.cursor() as cursor:
        cursor.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    cleaner.close()


@pytest.fixture
def pool(make_pool: MakePool) -> Pool:
    return make_pool()


@pytest.fixture
def db(pool: Pool) -> Iterator[PgSimple]:
    handle = PgSimple(pool)
    yield handle
    handle.close()


@pytest.fixture
def books(db: PgSimple) -> PgSimple:
    """The table of pg_simple's README with nine books, one for each year from 2001 on."""
    db.drop("books")
    db.create(
        "books",
        """
        "id" SERIAL NOT NULL,
        "genre" VARCHAR(20) NOT NULL,
        "name" VARCHAR(40) NOT NULL,
        "price" MONEY NOT NULL,
        "published" DATE NOT NULL,
        "modified" TIMESTAMP(6) NOT NULL DEFAULT now()
        """,
    )
    db.execute('ALTER TABLE "books" ADD CONSTRAINT "books_pkey" PRIMARY KEY ("id")')
    for i in range(1, 10):
        row = {
            "genre": "fiction",
            "name": f"Book Name vol. {i}",
            "price": 1.23 * i,
            "published": f"{2000 + i}-{i}-1",
        }
        assert db.insert("books", row) == 1
    db.commit()
    return db


def names(rows: list[Any]) -> list[str]:
    return [row.name for row in rows]


@pytest.fixture
def table(db: PgSimple) -> str:
    db.create("t", "id int UNIQUE DEFERRABLE INITIALLY DEFERRED")
    db.commit()
    return "t"


def count(db: PgSimple) -> int:
    rows = len(db.fetchall("t"))
    db.rollback()
    return rows


def in_use(pool: Pool) -> int:
    return pool.stats().in_use


def cached(pool: Pool) -> int:
    return pool.stats().idle


def pid_of(handle: PgSimple) -> int:
    return handle._live().info.backend_pid


def kill(handle: PgSimple, killer: PgSimple) -> None:
    killer.execute("SELECT pg_terminate_backend(%s, 10000)", [pid_of(handle)])
    killer.rollback()
