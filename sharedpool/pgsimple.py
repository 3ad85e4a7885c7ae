"""PgSimple: one connection of a pool, with the everyday statements as methods.

Names of tables and columns are quoted through `psycopg2.sql`, so they are taken literally, upper
case included. Values are always parameters. Every name may also be a `psycopg2.sql.Composable`, for
expressions: `fields=sql.SQL("count(*) AS n")`, `data={"modified": sql.SQL("now()")}`.
"""

import contextlib
import logging
import operator
import os
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, cast

import psycopg2
from psycopg2.extensions import connection, cursor
from psycopg2.extras import DictCursor, NamedTupleCursor
from psycopg2.sql import Composable

from sharedpool import config
from sharedpool.statement import Fields, Name, Order, Statement, Where, as_list
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.wrapper import unwrap
from sharedpool.worker.pool import Pool


class Writer(Protocol):
    """A log other than a `logging.Logger`, such as sys.stdout."""

    def write(self, text: str, /) -> object: ...


Log = logging.Logger | logging.LoggerAdapter[Any] | Writer
LogFormat = Callable[[Any], str | None]


class PgSimple:
    """A connection of `pool` (default: `get_pool()`), until `close()` or the end of `with`.

    Raises PoolError when no connection can be had. Rows are named tuples, or with `nt_cursor=False`
    those of DictCursor. `log` is a Logger or has a `write()` method. `log_fmt` makes the logged
    text from the executed cursor, or from a str if the statement failed.
    """

    # Defaults on the class: __del__ also runs on an object whose __init__ failed.
    _pool: Pool | None = None
    _conn: connection | None = None

    def __init__(
        self,
        pool: Pool | None = None,
        log: Log | None = None,
        log_fmt: LogFormat | None = None,
        nt_cursor: bool = True,
    ) -> None:
        self._log = log
        self._log_fmt = log_fmt
        self._cursor_factory: type[cursor] = NamedTupleCursor if nt_cursor else DictCursor
        self._pool = config.get_pool() if pool is None else pool
        self._conn = self._pool.get_conn()

    def __repr__(self) -> str:
        return f"<PgSimple {'open' if self.is_open else 'closed'} pool={self._pool!r}>"

    def fetchone(
        self,
        table: Name,
        fields: Fields = "*",
        where: Where = None,
        order: Order = None,
        offset: int | None = None,
    ) -> Any:
        """Return the first row that matches, or None."""
        return self._select(table, fields, where, order, 1, offset).fetchone()

    def fetchall(
        self,
        table: Name,
        fields: Fields = "*",
        where: Where = None,
        order: Order = None,
        limit: int | None = None,
        offset: int | None = None,
    ) -> list[Any]:
        """Return the rows that match.

        `where` is a condition, or a pair such as `("published > %s", [date])`. `order` is a field,
        or a pair such as `["published", "DESC"]`.
        """
        return self._select(table, fields, where, order, limit, offset).fetchall()

    def join(
        self,
        tables: Sequence[Name],
        fields: Sequence[Fields],
        join_fields: Sequence[Name],
        where: Where = None,
        order: Order = None,
        limit: int | None = None,
        offset: int | None = None,
    ) -> list[Any]:
        """Return the rows of the first table LEFT JOINed to the second.

        `tables`, `fields` and `join_fields` have one part for each table. Columns of the same name
        need an alias ("id AS book_id"), or a named tuple has only one of them.
        """
        for name, pair in (("tables", tables), ("fields", fields), ("join_fields", join_fields)):
            if isinstance(pair, str | Composable) or len(pair) != 2:
                raise ValueError(f"{name} must have two parts, one for each table")
        sql = self._statement()
        left, right = (sql.table(table) for table in tables)
        columns = [
            sql.fields(part, table)
            for part, table in zip(fields, (left, right), strict=True)
            if part
        ]
        if not columns:
            raise ValueError("fields has no field for either table")
        on = [
            sql.field(field, table) for field, table in zip(join_fields, (left, right), strict=True)
        ]
        source = f"{left} LEFT JOIN {right} ON ({on[0]} = {on[1]})"
        return self._select_from(
            sql, ", ".join(columns), source, where, order, limit, offset
        ).fetchall()

    def insert(self, table: Name, data: Mapping[str, Any], returning: Fields | None = None) -> Any:
        """Insert one row.

        Return its `returning` fields as a row, or the number of rows without them.
        """
        sql = self._statement()
        columns = ", ".join(sql.column(name) for name in data)
        marks = ", ".join(sql.value(value) for value in data.values())
        what = f"({columns}) VALUES ({marks})" if data else "DEFAULT VALUES"
        text = f"INSERT INTO {sql.table(table)} {what}{sql.returning(returning)}"
        done = self.execute(text, sql.params)
        return done.rowcount if returning is None else done.fetchone()

    def update(
        self,
        table: Name,
        data: Mapping[str, Any],
        where: Where = None,
        returning: Fields | None = None,
    ) -> Any:
        """Update the rows that match.

        Return a list of their `returning` fields, or the number of rows without them.
        """
        if not data:
            raise ValueError("data is empty: there is nothing to update")
        sql = self._statement()
        pairs = ", ".join(
            f"{sql.column(name)} = {sql.value(value)}" for name, value in data.items()
        )
        text = f"UPDATE {sql.table(table)} SET {pairs}{sql.where(where)}{sql.returning(returning)}"
        done = self.execute(text, sql.params)
        return done.rowcount if returning is None else done.fetchall()

    def delete(self, table: Name, where: Where = None, returning: Fields | None = None) -> Any:
        """Delete the rows that match.

        Return a list of their `returning` fields, or the number of rows without them.
        """
        sql = self._statement()
        text = f"DELETE FROM {sql.table(table)}{sql.where(where)}{sql.returning(returning)}"
        done = self.execute(text, sql.params)
        return done.rowcount if returning is None else done.fetchall()

    def truncate(
        self, table: Name | Sequence[Name], restart_identity: bool = False, cascade: bool = False
    ) -> None:
        """Empty one table or several ("tbl2, tbl3", or a list)."""
        sql = self._statement()
        names = table.split(",") if isinstance(table, str) else as_list(table)
        text = f"TRUNCATE {', '.join(sql.table(name) for name in names)}"
        self.execute(f"{text}{' RESTART IDENTITY' * restart_identity}{' CASCADE' * cascade}", [])

    def drop(self, table: Name, cascade: bool = False) -> None:
        """Drop a table if it exists."""
        name = self._statement().table(table)
        self.execute(f"DROP TABLE IF EXISTS {name}{' CASCADE' * cascade}", [])

    def create(self, table: Name, schema: str | Composable) -> None:
        """Create a table. `schema` is the SQL between the parentheses: never a user's input."""
        sql = self._statement()
        self.execute(f"CREATE TABLE {sql.table(table)} ({sql.literal(schema)})", [])

    def execute(self, sql: str | Composable, params: Any = None) -> cursor:
        """Execute any statement and return its cursor.

        Each call makes a new cursor, so earlier results stay readable. Blocks on the server. Raises
        psycopg2's errors as they are, and InterfaceError after `close()`.
        """
        current, log = self._live().cursor(cursor_factory=self._cursor_factory), self._log
        if log is None:
            current.execute(sql, params)
            return current
        # For a `log_fmt` that computes how long the statement took.
        current.timestamp = time.time()  # type: ignore[attr-defined]
        try:
            current.execute(sql, params)
        except Exception as error:
            # A failing log must not hide the statement's error.
            with contextlib.suppress(Exception):
                self._write(log, logging.ERROR, f"execute() failed: {error}")
            raise
        self._write(log, logging.DEBUG, current)
        return current

    def commit(self) -> None:
        """Commit the transaction."""
        self._live().commit()

    def rollback(self) -> None:
        """Roll the transaction back."""
        self._live().rollback()

    @property
    def is_open(self) -> bool:
        """True while this handle has a connection that psycopg2 believes to be open."""
        return self._conn is not None and self._conn.closed == 0

    def close(self) -> None:
        """Give the connection back to the pool, which rolls back what was not committed.

        A second call does nothing.
        """
        self._give_back()

    def __enter__(self) -> Self:
        self._live()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        conn = self._conn
        if conn is None:  # `close()` was called inside the block
            return
        if exc is not None and self._pool is not None:
            self._pool.notice(conn, exc)
        close = failed = True
        try:
            if exc_type is None:
                # A commit that fails, such as by a deferred constraint, leaves a good connection.
                close = False
                conn.commit()
                failed = False
            else:
                # Any exception means half-done work: KeyboardInterrupt, SystemExit and
                # GeneratorExit too. That exception matters more than one of the rollback.
                with contextlib.suppress(Exception):
                    conn.rollback()
                    close = False
        finally:
            self._give_back(close=close, quietly=failed)

    def __del__(self) -> None:
        # This runs inside garbage collection: in any thread, and while that thread holds any lock,
        # so it may take none. It also runs at interpreter shutdown, when names may be gone.
        try:
            conn, self._conn = self._conn, None
            if conn is not None and self._pool is not None:
                self._pool.put_conn_later(conn)
        except BaseException:
            pass

    def _live(self) -> connection:
        if self._conn is None:
            raise psycopg2.InterfaceError(
                "this PgSimple is closed; its connection is back in the pool"
            )
        return self._conn

    def _statement(self) -> Statement:
        """Return a new statement, for the connection without an agent's wrapper."""
        conn = self._live()
        return Statement(unwrap(conn) or conn)  # `psycopg2.sql` refuses a wrapper

    def _give_back(self, close: bool = False, quietly: bool = False) -> None:
        """Return the connection to the pool.

        `quietly`: another exception is being raised, and the pool's own must not hide it.
        """
        # Whatever `put_conn` does, this handle no longer has the connection.
        conn, self._conn = self._conn, None
        if conn is None or self._pool is None:
            return
        # A child that was forked inside a `with` block leaves the block, too. The connection is the
        # parent's, and `put_conn` refuses it.
        quietly = quietly or cast(PooledConnection, conn).sharedpool_pid != os.getpid()
        with contextlib.suppress(Exception) if quietly else contextlib.nullcontext():
            self._pool.put_conn(conn, close=close, fail_silently=quietly)

    def _write(self, log: Log, level: int, what: cursor | str) -> None:
        text = what if isinstance(what, str) else (what.query or b"").decode("utf-8", "replace")
        if self._log_fmt is not None:
            text = self._log_fmt(what) or ""
        if not text:
            return
        if isinstance(log, logging.Logger | logging.LoggerAdapter):
            log.log(level, "%s", text)
        else:
            log.write(f"{text}\n")

    def _select(
        self,
        table: Name,
        fields: Fields,
        where: Where,
        order: Order,
        limit: int | None,
        offset: int | None,
    ) -> cursor:
        sql = self._statement()
        columns, source = sql.fields(fields), sql.table(table)
        return self._select_from(sql, columns, source, where, order, limit, offset)

    def _select_from(
        self,
        sql: Statement,
        columns: str,
        source: str,
        where: Where,
        order: Order,
        limit: int | None,
        offset: int | None,
    ) -> cursor:
        text = f"SELECT {columns} FROM {source}{sql.where(where)}{sql.order(order)}"
        for word, number in (("LIMIT", limit), ("OFFSET", offset)):
            if number is not None:
                text += f" {word} {sql.value(operator.index(number))}"
        return self.execute(text, sql.params)
