"""One PostgreSQL connection limit, shared by every worker process."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharedpool.broker.launch.run import Broker, start_broker
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
    from sharedpool.pgsimple import PgSimple
    from sharedpool.worker.forks import reset_after_fork
    from sharedpool.worker.pool import Pool, SimpleConnectionPool, ThreadedConnectionPool
    from sharedpool.worker.settings import PoolConfig
    from sharedpool.worker.stats import PoolStats

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


# Where each name is. A module is loaded when one of its names is first used: the broker does not
# need the workers' modules, nor a worker the broker's, and a command starts twice as fast.
_MODULES = {
    "Broker": "broker.launch.run",
    "PgSimple": "pgsimple",
    "Pool": "worker.pool",
    "PoolConfig": "worker.settings",
    "PoolStats": "worker.stats",
    "SimpleConnectionPool": "worker.pool",
    "ThreadedConnectionPool": "worker.pool",
    "config_pool": "config",
    "get_pool": "config",
    "reset_after_fork": "worker.forks",
    "start_broker": "broker.launch.run",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
