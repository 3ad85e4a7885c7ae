"""What clients connect through: sharedpool, and everybody else.

They are described in the main process, where a package that is not installed raises ImportError,
and called, to make the client, in the process that uses it.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

import psycopg2
import psycopg2.pool

import sharedpool

# A checkout that takes longer fails its row: nothing here should.
WAIT_S = 60.0


@dataclass(frozen=True)
class Client:
    """How to come by a connection, and what to do with it afterwards."""

    checkout: Callable[[], Any]
    checkin: Callable[[Any], object]
    close: Callable[[], object]


# The options of contestants that go without what their fellow has by default. PgBouncer in
# transaction mode resets nothing between two clients: "rollback" is what comes nearest to it.
OFF = (("handover", "off"),)
ROLLBACK = (("reset", "rollback"),)

MakeClient = Callable[[], Client]


class Unavailable(Exception):
    """A contestant cannot be measured here; the text says why and what to do."""


@dataclass(frozen=True)
class Shared:
    """A client of sharedpool's pool behind `broker`. `options` are `config_pool`'s.

    Raises Unavailable when made with an option that this sharedpool does not know.
    """

    dsn: str
    broker: str
    max_conn: int
    threads: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        known = inspect.signature(sharedpool.config_pool).parameters
        if unknown := [name for name, _ in self.options if name not in known]:
            raise Unavailable(f"this sharedpool's config_pool() has no {', '.join(unknown)}")

    def __call__(self) -> Client:
        manager = (
            sharedpool.ThreadedConnectionPool if self.threads else sharedpool.SimpleConnectionPool
        )
        pool = sharedpool.config_pool(
            self.max_conn,
            pool_manager=manager,
            dsn=self.dsn,
            broker=self.broker,
            timeout=WAIT_S,
            **dict(self.options),
        )
        return Client(pool.get_conn, pool.put_conn, pool.release_all)


@dataclass(frozen=True)
class Permanent:
    """One connection, kept for good: straight to the server, or to a PgBouncer."""

    dsn: str

    def __call__(self) -> Client:
        conn = psycopg2.connect(self.dsn)
        return Client(lambda: conn, lambda conn: None, conn.close)


@dataclass(frozen=True)
class Late:
    """A connection that is opened by the first checkout."""

    dsn: str

    def __call__(self) -> Client:
        return Client(lambda: psycopg2.connect(self.dsn), methodcaller("close"), lambda: None)


@dataclass(frozen=True)
class Psycopg2Pool:
    """The pool that comes with psycopg2.

    It raises when it is empty: for as many threads as it has connections.
    """

    dsn: str
    size: int
    threads: bool = True

    def __call__(self) -> Client:
        kind = (
            psycopg2.pool.ThreadedConnectionPool
            if self.threads
            else psycopg2.pool.SimpleConnectionPool
        )
        pool = kind(self.size, self.size, self.dsn)
        return Client(pool.getconn, pool.putconn, pool.closeall)


@dataclass(frozen=True)
class PsycopgPool:
    """psycopg_pool, of psycopg 3."""

    dsn: str
    size: int

    def __post_init__(self) -> None:
        importlib.import_module("psycopg_pool")  # once, before the processes are forked

    def __call__(self) -> Client:
        from psycopg_pool import ConnectionPool

        pool = ConnectionPool(self.dsn, min_size=self.size, max_size=self.size, open=True)
        pool.wait()
        return Client(pool.getconn, pool.putconn, pool.close)


@dataclass(frozen=True)
class SqlalchemyPool:
    """SQLAlchemy's QueuePool around psycopg2."""

    dsn: str
    size: int

    def __post_init__(self) -> None:
        importlib.import_module("sqlalchemy.pool")  # once, before the processes are forked

    def __call__(self) -> Client:
        from sqlalchemy.pool import QueuePool

        def connect() -> Any:
            return psycopg2.connect(self.dsn)

        pool = QueuePool(connect, pool_size=self.size, max_overflow=0, timeout=WAIT_S)
        return Client(pool.connect, methodcaller("close"), pool.dispose)


@dataclass(frozen=True)
class DbutilsPool:
    """DBUtils' PooledDB around psycopg2."""

    dsn: str
    size: int

    def __post_init__(self) -> None:
        importlib.import_module("dbutils.pooled_db")  # once, before the processes are forked

    def __call__(self) -> Client:
        from dbutils.pooled_db import PooledDB

        pool = PooledDB(psycopg2, self.size, self.size, 0, self.size, True, dsn=self.dsn)
        return Client(pool.connection, methodcaller("close"), pool.close)
