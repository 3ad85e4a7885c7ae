"""The database backend: Django's own for PostgreSQL, with connections that come from a sharedpool pool.

    DATABASES = {"default": {
        "ENGINE": "sharedpool.integrations.django",
        "NAME": "app",
        "OPTIONS": {"max_conn": 20, "timeout": 5},
    }}

OPTIONS are `config_pool`'s, beside those of libpq. All threads and processes with the same alias and database share one
pool; a connection goes back to it when Django closes it, which with CONN_MAX_AGE = 0 is at the end of the request.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import psycopg2
from django.core.exceptions import ImproperlyConfigured

try:
    import psycopg  # noqa: F401 - as Django does, to see which one it will take
except ImportError:
    pass
else:
    raise ImproperlyConfigured(
        "sharedpool.integrations.django needs psycopg2, but Django takes psycopg 3 wherever that is installed:"
        " uninstall it (pip uninstall psycopg), or use Django's own backend"
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
_pools: dict[
    str, tuple[dict[str, Any], Pool]
] = {}  # by name, with the settings that they were made of
_lock = threading.Lock()


class _Database:
    """psycopg2, to Django, with another `connect`."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self.connect = connect

    def __getattr__(self, name: str) -> Any:
        return getattr(psycopg2, name)


class DatabaseWrapper(postgresql.DatabaseWrapper):
    """One thread's connection, which it has for as long as it uses it.

    Connecting raises `django.db.OperationalError` when none becomes free within OPTIONS["timeout"] (30 seconds by
    default), or no broker answers; the pool's own error is its cause.
    """

    def check_settings(self) -> None:
        """Refuse settings under which connections would not come back; see Django's method."""
        super().check_settings()
        if self.settings_dict["CONN_MAX_AGE"] != 0:
            raise ImproperlyConfigured(
                f"DATABASES[{self.alias!r}]: CONN_MAX_AGE must be 0: sharedpool keeps connections open between"
                " requests itself, and one that a thread keeps could serve nobody else"
            )
        if self.settings_dict["OPTIONS"].get("pool"):
            raise ImproperlyConfigured(
                f"DATABASES[{self.alias!r}]: OPTIONS['pool'] is for Django's own pool: remove it, and give max_conn"
                " and the like in OPTIONS itself"
            )

    def get_connection_params(self) -> dict[str, Any]:
        """Return what psycopg2 is to be told."""
        return {
            name: value
            for name, value in super().get_connection_params().items()
            if name not in _OPTIONS
        }

    @async_unsafe
    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        """Check a connection out; Django's `close()` checks it in."""
        if self.alias == NO_DB_ALIAS:
            return super().get_new_connection(
                conn_params
            )  # to the server, not to a database: CREATE DATABASE

        pool = self._shared_pool(conn_params)

        def lend() -> Any:
            try:
                return pool.connect()
            except PoolError as error:
                if isinstance(error, psycopg2.OperationalError):
                    raise
                raise psycopg2.OperationalError(str(error)) from error

        # All that Django sets on a new connection is set on this one too. What wraps `psycopg2.connect` is left out: it
        # has wrapped this connection when it was opened, and a checkout is no connect.
        self.Database = _Database(lend)
        try:
            return super().get_new_connection({})
        finally:
            del self.Database

    def _shared_pool(self, conn_params: dict[str, Any]) -> Pool:
        options = {
            name: value for name, value in self.settings_dict["OPTIONS"].items() if name in _OPTIONS
        }
        settings = (
            {"timeout": DEFAULT_TIMEOUT_S} | options | conn_params | {"name": self._pool_name()}
        )
        name = settings["name"]
        if (made := _pools.get(name)) is None or made[0] != settings:
            with _lock:
                if (made := _pools.get(name)) is None or made[0] != settings:
                    try:
                        made = (
                            settings,
                            config_pool(pool_manager=ThreadedConnectionPool, **settings),
                        )
                    except ConfigError as error:
                        raise ImproperlyConfigured(f"DATABASES[{self.alias!r}]: {error}") from error
                    _pools[name] = made
        return made[1]

    def _pool_name(self) -> str:
        # The database is part of it, so that a test run never meets a pool of the database that it is a copy of.
        name = self.settings_dict["OPTIONS"].get("name", f"django {self.alias}")
        return f"{name} {self.settings_dict['NAME']}".rstrip()

    def close_pool(self) -> None:
        """Close what lies idle in this process: Django calls this before it copies or drops a test database."""
        with _lock:
            _, pool = _pools.pop(self._pool_name(), (None, None))
        if pool is not None:
            pool.retire()

    def ensure_timezone(self) -> bool:
        """Set the time zone of the connection, if there is one. Others are set at their checkout."""
        return self.connection is not None and self._configure_timezone(self.connection)
