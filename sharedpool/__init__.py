"""One PostgreSQL connection limit, shared by every worker process."""

from typing import TYPE_CHECKING, Any

from sharedpool.config import config_pool, get_pool
from sharedpool.errors import (
    BrokerUnavailable,
    ConfigError,
    ConnectRefused,
    PoolClosed,
    PoolError,
    PoolExhausted,
    PoolTimeout,
    ProtocolError,
    ServerUnavailable,
    SessionsNotKept,
    SharedPoolError,
    TooManyWaiting,
)
from sharedpool.worker.forks import reset_after_fork
from sharedpool.worker.pool import Pool, SimpleConnectionPool, ThreadedConnectionPool
from sharedpool.worker.settings import PoolConfig
from sharedpool.worker.stats import PoolStats

if TYPE_CHECKING:
    from sharedpool.broker.launch.run import Broker, start_broker
    from sharedpool.pgsimple import PgSimple

__version__ = "0.1.0"

__all__ = [
    "Broker",
    "BrokerUnavailable",
    "ConfigError",
    "ConnectRefused",
    "PgSimple",
    "Pool",
    "PoolClosed",
    "PoolConfig",
    "PoolError",
    "PoolExhausted",
    "PoolStats",
    "PoolTimeout",
    "ProtocolError",
    "ServerUnavailable",
    "SessionsNotKept",
    "SharedPoolError",
    "SimpleConnectionPool",
    "ThreadedConnectionPool",
    "TooManyWaiting",
    "config_pool",
    "get_pool",
    "reset_after_fork",
    "start_broker",
]


def __getattr__(name: str) -> Any:
    # Only a process that starts a broker loads the broker's modules, which take 3 MB.
    if name in ("Broker", "start_broker"):
        from sharedpool.broker.launch import run

        return getattr(run, name)
    if name == "PgSimple":  # and only one that uses it loads psycopg2's extras and sql: 1 MB
        from sharedpool.pgsimple import PgSimple

        return PgSimple
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
