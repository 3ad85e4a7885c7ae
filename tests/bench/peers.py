"""What clients connect through: sharedpool, and everybody else. Made in the process that uses it."""

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


MakeClient = Callable[[], Client]


def knows_handover() -> bool:
    """Say whether this sharedpool can hand connections over, and can be told not to."""
    return "handover" in inspect.signature(sharedpool.config_pool).parameters


@dataclass(frozen=True)
class Shared:
    """A client of sharedpool's pool behind `broker`. `handover` is passed on where sharedpool knows it."""

    dsn: str
    broker: str
    max_conn: int
    handover: str = "auto"
    threads: bool = False

    def __call__(self) -> Client:
        manager = sharedpool.ThreadedConnectionPool if self.threads else sharedpool.SimpleConnectionPool
        options: dict[str, Any] = {"handover": self.handover} if knows_handover() else {}
        pool = sharedpool.config_pool(
            self.max_conn, pool_manager=manager, dsn=self.dsn, broker=self.broker, timeout=WAIT_S, **options
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
    """The pool that comes with psycopg2. It raises when it is empty: for as many threads as it has connections."""

    dsn: str
    size: int
    threads: bool = True

    def __call__(self) -> Client:
        kind = psycopg2.pool.ThreadedConnectionPool if self.threads else psycopg2.pool.SimpleConnectionPool
        pool = kind(self.size, self.size, self.dsn)
        return Client(pool.getconn, pool.putconn, pool.closeall)


@dataclass(frozen=True)
class PsycopgPool:
    """psycopg_pool, of psycopg 3."""

    dsn: str
    size: int

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

    def __call__(self) -> Client:
        from dbutils.pooled_db import PooledDB  # type: ignore[import-untyped]

        pool = PooledDB(psycopg2, self.size, self.size, 0, self.size, True, dsn=self.dsn)
        return Client(pool.connection, methodcaller("close"), pool.close)
