"""The control connection itself: open it, replace it, and know which server it is on.

While it is opened the broker finds out three things: whether a proxy or a pooler is between it and
the server (`_inspect_route`), whether the server is the one that it was on before (`_prepare`), and
whether another broker counts to the same limit (`claim`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import psycopg2
from psycopg2.extensions import connection, make_dsn, parse_dsn

from sharedpool.broker.core.commands import RecordServer, ServerIncarnation
from sharedpool.broker.core.ledger import LedgerCall
from sharedpool.broker.core.routes import sessions_not_kept_text
from sharedpool.broker.core.seen_servers import SeenServers
from sharedpool.broker.postgres import statements
from sharedpool.broker.postgres.database import Database
from sharedpool.broker.postgres.leadership import Leadership
from sharedpool.postgres.libpq import socket_of_failed
from sharedpool.wire.values import Backend

logger = logging.getLogger("sharedpool.broker")

# How often two sessions behind a pooler are compared.
_COMPARISONS = 3
# How often a replica is asked whether it was promoted, while that matters.
_PROMOTED_S = 1.0


class ControlConnection:
    """One connection to PostgreSQL, used by one thread.

    `call_soon(call)` has the loop call the ledger. `seen` are the servers that former brokers'
    control connections were on. `leadership` is the lock to claim, if there is one. `maintenance`:
    see `Database`.
    """

    def __init__(
        self,
        dsn: str,
        max_conn: int | None,
        call_soon: Callable[[LedgerCall], None],
        seen: Iterable[ServerIncarnation],
        leadership: Leadership | None,
        *,
        maintenance: bool,
    ) -> None:
        self._dsn = dsn
        self._database = Database(dsn, maintenance=maintenance)
        self._max_conn = max_conn
        self._call_soon = call_soon
        self._servers = SeenServers(seen)
        self._leadership = leadership
        self._room = 0
        self._is_pooled = False  # a pooler is between it and the server
        self._is_replica = False
        self._identified_at = -math.inf
        self._fault = ""  # what makes the way to the server unsuitable
        self._lost = ""  # the error that ended the last connection, until there is a new one
        self.boot_us = 0  # when the server was started
        self.connected_at = -math.inf
        self.conn: connection | None = None
        self.state = "connecting"

    @property
    def claim_at(self) -> float:
        """When the leadership lock is to be claimed again."""
        return math.inf if self._leadership is None else self._leadership.claim_at

    def open(self) -> None:
        """Connect. Raise psycopg2's errors, or any that a connect can raise."""
        known, lost, self._lost = self.boot_us, self._lost, ""
        fresh = self._database.connect(self._parameters())
        try:
            self._inspect_route(fresh)
        except BaseException:
            fresh.close()
            raise
        self._prepare(fresh)
        self.connected_at = time.monotonic()
        pid, database = fresh.info.backend_pid, fresh.info.dbname
        if lost and self.boot_us == known:  # the server has ended one session, and lives
            text = "control connection: backend %d replaces one that has ended (%s)"
            logger.debug(text, pid, lost)
            return
        text = "control connection: backend %d in database %r, room for %d connections"
        logger.info(text, pid, database, self._room)
        if self._max_conn is not None and self._max_conn + 1 > self._room:
            text = (
                "max_conn %d and 1 control connection are more than the %d connections the server"
                " has for ordinary users: raise max_connections or lower max_conn"
            )
            logger.warning(text, self._max_conn, self._room)
        role, limit = statements.role_of(fresh)
        self._call_soon(lambda ledger, now: ledger.control.limited(now, role=role, limit=limit))

    def pass_barrier(self) -> None:
        """Replace the connection by a new one: every connect before that is a backend by then.

        A postmaster accepts in the order of arrival, so a connect that was tried earlier has been
        accepted too, or never will be. A refusal proves as much as a success. Raise psycopg2's
        errors if the server has not answered at all.
        """
        fresh = connection.__new__(connection)
        try:
            dsn = make_dsn(self._database.current, **self._parameters())
            fresh.__init__(dsn)  # type: ignore[misc]
        except (psycopg2.OperationalError, UnicodeDecodeError):
            # libpq keeps the socket on which it was refused, but none that was never answered.
            if (socket_of_failed(fresh) or -1) < 0:
                raise
            return
        old = self.conn
        try:
            self._prepare(fresh)
        finally:
            if old is not None:  # closed last, so that the leadership lock is held all along
                old.close()

    def is_same_server(self, *, reconnect: bool) -> bool:
        """Return True if the server that we know still answers.

        A failover ends this connection; so may a time-out or an administrator. If `reconnect`, a
        new connection tells.
        """
        known = self.boot_us
        try:
            if self.conn is not None:
                self._identify(self.conn)
                return self.boot_us == known
        except Exception as error:
            self.lose(error)
        try:
            if reconnect:
                self.open()
        except Exception as error:
            self.close(f"unreachable: {error_text(error)}")
        return self.conn is not None and self.boot_us == known

    def is_server_gone(self, backend: Backend) -> bool:
        """Return True if a backend's server is known to be gone. Raise psycopg2's errors.

        We saw that server ourselves, and now another one is in its place. A primary that was shut
        off from everybody and lives on may keep the backend for a while; the limit protects the
        one that has taken its place.
        """
        if self._servers.is_gone(backend.boot_us):
            return True
        if self.conn is None or not (self._is_replica and self._servers.was_seen(backend.boot_us)):
            return False
        if time.monotonic() >= self._identified_at + _PROMOTED_S:
            self._identify(self.conn)  # it may have been promoted since
        return self._servers.is_gone(backend.boot_us)

    def claim(self, now: float) -> None:
        """Take the leadership lock, or note who has it.

        Behind a pooler that does not keep sessions there is no session to hold it.
        """
        if self._fault:
            self.state = "connected, through a pooler that does not keep sessions"
            self.cannot_ask()
        elif self._leadership is not None and self._leadership.claimed and self.conn is not None:
            rival = self._leadership.claim(self.conn, now)
            self.state = f"another broker counts to this limit: {rival}" if rival else "connected"

    def cannot_ask(self) -> None:
        """Let the ledger begin without the leadership lock, as the server does not answer."""
        if self._leadership is not None:
            self._leadership.cannot_ask()

    # --- the end of a connection

    def lose(self, error: Exception) -> None:
        """Close the connection after an error. Only a failed reconnect is worth a warning."""
        self._lost = error_text(error)
        logger.debug("control connection lost: %s", self._lost)
        self.close("connecting")

    def rest(self) -> None:
        """Close the connection, and give up the lock, while nobody uses the broker."""
        self.close("at rest: nobody uses the broker")
        if self._leadership is not None:
            self._leadership.resign()

    def close(self, state: str) -> None:
        """Close the connection; `state` is shown by `sharedpool status`."""
        if self.conn is not None:
            self.conn.close()
        self.conn, self.state = None, state

    # --- a new connection

    def _parameters(self) -> dict[str, Any]:
        given = parse_dsn(self._dsn)
        wanted = {"fallback_application_name": "sharedpool broker", "connect_timeout": "10"}
        parameters = {name: value for name, value in wanted.items() if name not in given}
        if self._leadership is not None:
            # Whatever the DSN says: by this name other brokers see who has the lock.
            parameters["application_name"] = self._leadership.application_name
        return parameters

    def _inspect_route(self, conn: connection) -> None:
        """Find out who is between the broker and the server, and tell the ledger."""
        conn.autocommit = True
        direct, pooled = statements.route_of(conn)
        self._is_pooled = pooled
        sign = self._sign_of_sharing(conn) if pooled else ""
        self._fault = fault = sessions_not_kept_text(sign) if sign else ""
        if fault:
            logger.error("control connection: %s", fault)
        self._call_soon(lambda ledger, now: ledger.control.reached(now, direct=direct, fault=fault))

    def _sign_of_sharing(self, conn: connection) -> str:
        """Compare with a second session; return what shows that the pooler mixes them up."""
        try:
            other = psycopg2.connect(self._dsn, **self._parameters())
        except psycopg2.OperationalError as error:
            logger.info("no second session behind the pooler: %s", error_text(error))
            return ""
        try:
            other.autocommit = True
            first = statements.itself(conn)
            for _ in range(_COMPARISONS):
                theirs = statements.itself(other)
                if theirs is None:
                    break  # it waits for a backend of its own: the pooler keeps sessions
                if theirs == first:
                    return "two sessions of one moment have the same backend"
                if statements.itself(conn) != first:
                    return "one session has had two backends"
            return ""
        finally:
            other.close()

    def _prepare(self, conn: connection) -> None:
        """Use a new connection from now on, and find out which server it is on."""
        self.conn = conn
        conn.autocommit = True
        statements.lift_limits(conn)
        self._identify(conn)
        self._room = statements.room_of(conn)
        self.state = "connected"
        self.claim(time.monotonic())

    def _identify(self, conn: connection) -> None:
        """Find out which server a connection is on, and have that recorded."""
        server = statements.server_of(conn)
        self.boot_us, self._is_replica = server.boot_us, server.is_replica
        self._identified_at = time.monotonic()
        # Beside its own address the one that we know: machines may have the same private addresses,
        # and a unix socket has none.
        address = f"{conn.info.host}:{conn.info.port} {server.address}"
        names = [ServerIncarnation(address, server.boot_us)]
        if server.system is not None and not self._is_pooled:
            # A copy of the database has the identifier too. It takes the other's place only if the
            # same hosts are asked for both, and no pooler chooses the server.
            given = conn.info.dsn_parameters
            hosts = ":".join(given.get(name, "") for name in ("host", "hostaddr", "port"))
            name = f"primary of {server.system} at {hosts}"
            names.append(ServerIncarnation(name, server.boot_us, server.timeline))
        for news in self._servers.note(*names):
            self._record(news)

    def _record(self, server: ServerIncarnation) -> None:
        self._call_soon(lambda ledger, now: [RecordServer(server)])


def error_text(error: Exception) -> str:
    """Return an error's text in one line.

    psycopg2 cannot decode the text of a server in another encoding: it is decoded here.
    """
    if isinstance(error, UnicodeDecodeError):
        return error.object.decode("utf-8", "replace").strip()
    return str(error).strip() or type(error).__name__
