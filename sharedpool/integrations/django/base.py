"""A database backend: Django's own for PostgreSQL, with connections from a sharedpool pool.

    DATABASES = {"default": {
        "ENGINE": "sharedpool.integrations.django",
        "NAME": "app",
        "OPTIONS": {"max_conn": 20, "timeout": 5},
    }}

OPTIONS takes the arguments of `config_pool`, and those of libpq. All threads and processes with the
same alias and database share one pool. A connection goes back to the pool when Django closes it,
which is at the end of the request, because CONN_MAX_AGE is 0.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import psycopg2
from django.core.exceptions import ImproperlyConfigured

try:
    import psycopg  # noqa: F401 - Django prefers it wherever this import succeeds
except ImportError:
    pass
else:
    raise ImproperlyConfigured(
        "sharedpool.integrations.django needs psycopg2, but Django takes psycopg 3 wherever that is"
        " installed: uninstall it (pip uninstall psycopg), or use Django's own backend"
    )

from django.db.backends.base.base import NO_DB_ALIAS
from django.db.backends.postgresql import base as postgresql
from django.utils.asyncio import async_unsafe

from sharedpool.config import config_pool
from sharedpool.errors import ConfigError, PoolError
from sharedpool.worker.pool import Pool, ThreadedConnectionPool

DEFAULT_TIMEOUT_S = 30.0

_OPTIONS = frozenset(inspect.signature(config_pool).parameters) - {
    "pool_manager",
    "dsn",
    "db_url",
    "connect_kwargs",
}
# By name: each pool with the settings that it was made from.
_pools: dict[str, tuple[dict[str, Any], Pool]] = {}
_lock = threading.Lock()


def _current_pool(name: str, settings: dict[str, Any]) -> Pool | None:
    """Return the pool of this name if it was made from these settings."""
    made_from, pool = _pools.get(name, (None, None))
    return pool if made_from == settings else None


class _Database:
    """The module psycopg2 as Django sees it, with another `connect`."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self.connect = connect

    def __getattr__(self, name: str) -> Any:
        return getattr(psycopg2, name)


class DatabaseWrapper(postgresql.DatabaseWrapper):
    """One thread's connection, from its first query to the end of the request.

    Connecting raises `django.db.OperationalError` if no connection becomes free within
    OPTIONS["timeout"] (by default 30 seconds), or if no broker answers. The cause is the pool's own
    error.
    """

    def check_settings(self) -> None:
        """Also refuse settings under which connections would not go back to the pool."""
        super().check_settings()
        if self.settings_dict["CONN_MAX_AGE"] != 0:
            raise ImproperlyConfigured(
                f"DATABASES[{self.alias!r}]: CONN_MAX_AGE must be 0: sharedpool itself keeps"
                " connections open between requests, and a thread that keeps one keeps it from the"
                " others"
            )
        if self.settings_dict["OPTIONS"].get("pool"):
            raise ImproperlyConfigured(
                f"DATABASES[{self.alias!r}]: OPTIONS['pool'] is for Django's own pool: remove it,"
                " and give max_conn and the like in OPTIONS itself"
            )

    def get_connection_params(self) -> dict[str, Any]:
        """Return the parameters for psycopg2, without those of the pool."""
        return {
            name: value
            for name, value in super().get_connection_params().items()
            if name not in _OPTIONS
        }

    @async_unsafe
    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        """Check a connection out. Django's `close()` checks it in."""
        if self.alias == NO_DB_ALIAS:  # Django creates and drops test databases by this one
            return super().get_new_connection(conn_params)

        pool = self._shared_pool(conn_params)

        def check_out() -> Any:
            try:
                return pool.connect()
            except PoolError as error:
                if isinstance(error, psycopg2.OperationalError):
                    raise
                raise psycopg2.OperationalError(str(error)) from error

        # Django's own method makes all of Django's settings on a new connection. It calls
        # `check_out` in place of `psycopg2.connect`, which agents may have wrapped: a checkout is
        # no connect.
        self.Database = _Database(check_out)
        try:
            return super().get_new_connection({})
        finally:
            del self.Database

    def _shared_pool(self, conn_params: dict[str, Any]) -> Pool:
        """Return the pool of this alias and database. Make it, or replace it for new settings."""
        given = self.settings_dict["OPTIONS"]
        options = {name: value for name, value in given.items() if name in _OPTIONS}
        name = self._pool_name()
        settings = {"timeout": DEFAULT_TIMEOUT_S} | options | conn_params | {"name": name}
        # Without the lock in the usual case that the pool is there.
        if (pool := _current_pool(name, settings)) is not None:
            return pool
        with _lock:
            if (pool := _current_pool(name, settings)) is None:
                try:
                    pool = config_pool(pool_manager=ThreadedConnectionPool, **settings)
                except ConfigError as error:
                    raise ImproperlyConfigured(f"DATABASES[{self.alias!r}]: {error}") from error
                _pools[name] = (settings, pool)
        return pool

    def _pool_name(self) -> str:
        # With the database's name, so that a test run has another pool than the real database.
        name = self.settings_dict["OPTIONS"].get("name", f"django {self.alias}")
        return f"{name} {self.settings_dict['NAME']}".rstrip()

    def close_pool(self) -> None:
        """Close this process's idle connections.

        Django calls this before it copies or drops a test database.
        """
        with _lock:
            _, pool = _pools.pop(self._pool_name(), (None, None))
        if pool is not None:
            pool.retire()

    def ensure_timezone(self) -> bool:
        """Set the time zone of the current connection. Others get it at their checkout."""
        return self.connection is not None and self._configure_timezone(self.connection)
