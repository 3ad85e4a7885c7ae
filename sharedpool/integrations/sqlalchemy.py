"""SQLAlchemy 2: an engine whose connections come from a sharedpool pool.

    pool = sharedpool.config_pool(
        max_conn=20, pool_manager=sharedpool.ThreadedConnectionPool, timeout=30
    )
    engine = create_engine("postgresql+psycopg2://", creator=pool.connect, poolclass=SharedPool)

SQLAlchemy has a *record* of each connection. `SharedPool` keeps it with the connection's lease
(`Lease.integration_state`), across checkouts. So `connect` events run once for each connection that
this process opens or receives, not at every checkout as with `NullPool` (which works as well).
"""

from __future__ import annotations

import os
from typing import Any, cast

from psycopg2.extensions import connection
from sqlalchemy import event, exc
from sqlalchemy.engine import Dialect, ExceptionContext
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.pool import Pool as EnginePool
from sqlalchemy.pool.base import _ConnectionRecord

from sharedpool.errors import PoolClosed, PoolExhausted, PoolTimeout
from sharedpool.worker.connection.state import record_settings
from sharedpool.worker.connection.wrapper import unwrap
from sharedpool.worker.core.lease import Lease
from sharedpool.worker.pool import Pool


class _Record(_ConnectionRecord):
    """SQLAlchemy's record of a connection, to which it refers only during a checkout."""

    # Checked out already; the record takes it when it connects.
    checked_out: connection | None = None


class SharedPool(EnginePool):
    """A `poolclass` for `create_engine`. `creator` must be the `connect` method of a pool.

    `pool_timeout` is how many seconds a checkout waits, by default the pool's own `timeout`. All
    other options are those of `sqlalchemy.pool.Pool`. A checkout blocks and raises as `get_conn`
    does, with `sqlalchemy.exc.TimeoutError` in place of `PoolTimeout` and `PoolExhausted`.
    `engine.dispose()` closes this process's idle connections. Give each engine a pool of its own:
    what its events set stays on the connections.
    """

    def __init__(self, creator: Any, timeout: float | None = None, **options: Any) -> None:
        shared = getattr(creator, "__self__", None)
        if not isinstance(shared, Pool) or creator != shared.connect:
            raise exc.ArgumentError(
                f"SharedPool: creator must be the connect method of a pool, not {creator!r}"
            )
        self._shared = shared
        self._timeout = timeout
        self._disposed = False
        super().__init__(cast(Any, self._connect_record), **options)
        dialect = options.get("dialect")
        if isinstance(dialect, Dialect) and not event.contains(dialect, "handle_error", _notice):
            event.listen(dialect, "handle_error", _notice)

    def connect(self) -> PoolProxiedConnection:
        """Check a connection out (see the class)."""
        proxy = super().connect()
        conn = unwrap(cast(Any, proxy).dbapi_connection)
        assert conn is not None
        record = cast(Any, proxy)._connection_record
        lease = cast(Lease, conn.sharedpool_lease)
        if lease.integration_state is None or lease.integration_state[1] is not record:
            # It has just connected, and its events have run: a checkin must keep their settings.
            lease.integration_state = (self, record)
            record_settings(conn)
        return proxy

    def _do_get(self) -> ConnectionPoolEntry:
        conn = self._check_out()
        kept = _lease(conn).integration_state
        if kept is not None and kept[0] is self:
            record: _Record = kept[1]
            record.dbapi_connection = cast(Any, conn)
        else:
            record = _Record(self, connect=False)
            record.checked_out = conn
        return record

    def _connect_record(self, record: ConnectionPoolEntry) -> Any:
        """Return a connection to a record that has none, or has closed the one it had."""
        conn = cast(_Record, record).checked_out
        cast(_Record, record).checked_out = None
        while conn is None:
            conn = self._check_out()
            if _lease(conn).integration_state is not None:
                # SQLAlchemy wants a new connection, because the old ones are too old or found dead.
                # This one may be as old.
                self._shared.put_conn(conn, close=True)
                conn = None
        return conn

    def _check_out(self) -> connection:
        try:
            return self._shared.get_conn(timeout=self._timeout)
        except (PoolTimeout, PoolExhausted) as error:
            raise exc.TimeoutError(str(error)) from error

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        conn: Any = record.dbapi_connection
        cast(_Record, record).dbapi_connection = None
        if conn is None:  # closed or detached
            return
        # A forked child has inherited the connection, and must not return it.
        inherited = conn.sharedpool_pid != os.getpid()
        try:
            self._shared.put_conn(conn, close=self._disposed, fail_silently=inherited)
        except PoolClosed:
            pass  # `release_all` has closed the connection

    def _close_connection(self, connection: Any, **options: Any) -> None:
        super()._close_connection(connection, **options)
        # The connection is closed by now. In a forked child, or after `release_all`, it has no
        # lease to return.
        self._shared.put_conn(connection, close=True, fail_silently=True)

    def recreate(self) -> SharedPool:
        """Return a new pool with the same options, which the engine uses after `dispose`."""
        self.logger.info("Pool recreating")
        return self.__class__(
            self._shared.connect,
            timeout=self._timeout,
            recycle=self._recycle,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=self._reset_on_return,
            pre_ping=self._pre_ping,
            _dispatch=self.dispatch,
            dialect=self._dialect,
        )

    def dispose(self) -> None:
        """Close this process's idle connections now, and those in use at their checkin."""
        self._disposed = True
        self._shared.close_idle()
        self.logger.info("Pool disposed. %s", self.status())

    def status(self) -> str:
        """Return a description of the pool's state."""
        return repr(self._shared)


def _lease(conn: connection) -> Lease:
    return cast(Lease, cast(Any, conn).sharedpool_lease)


def _notice(context: ExceptionContext) -> None:
    """Report an error that may come from a failover (see `sharedpool.Pool.notice`)."""
    if context.connection is not None and not context.connection.invalidated:
        conn = unwrap(cast(Any, context.connection.connection).dbapi_connection)
        if conn is not None and conn.sharedpool_local is not None:
            conn.sharedpool_local.notice(conn, context.original_exception)
