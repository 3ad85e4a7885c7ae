"""The broker's one connection to PostgreSQL: see that a backend is gone, and end what is left of a dead worker.

It runs in a thread of its own, so that a slow server never stops the leases. What is to be ended, and what proves that
it has, is in `fencing.py`.

It also *surveys* the server for backends that nobody knows (see `broker/core/quarantine.py`). The look of a barrier
begins with a connection that is made anew: a postmaster accepts in the order of arrival, so whatever was tried before
is a backend by then, or will never be one.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import psycopg2
from psycopg2.extensions import connection, make_dsn, parse_dsn

from sharedpool.broker.core.commands import (
    CancelBackend,
    Fence,
    QueryActivity,
    RecordServer,
    Send,
    ServerIncarnation,
    SurveyResult,
    SurveyServer,
    VerifyServer,
)
from sharedpool.broker.core.ledger import LedgerCall
from sharedpool.broker.core.routes import sessions_not_kept_text
from sharedpool.broker.postgres import statements
from sharedpool.broker.postgres.activity import activity_of
from sharedpool.broker.postgres.database import Database
from sharedpool.broker.postgres.fencing import Fencing
from sharedpool.broker.postgres.leadership import Leadership
from sharedpool.postgres.libpq import socket_of_failed
from sharedpool.wire.application_name import pattern_of
from sharedpool.wire.messages import Backend, Token
from sharedpool.wire.reports import Activity

logger = logging.getLogger("sharedpool.broker")

_ROUNDS = 3  # of looks whether a pooler keeps two sessions apart
_FIRST_RECONNECT_S, _LAST_RECONNECT_S = 0.1, 1.0

# What is found out is told to the ledger, in the broker's own thread.


@dataclass(frozen=True, slots=True)
class _Need:
    """Whether anybody uses the broker."""

    needed: bool


# What other threads put into the inbox: an order and when it is due, what follows; None is the end.
_Item = (
    tuple[Fence, float]
    | Token
    | SurveyServer
    | VerifyServer
    | CancelBackend
    | QueryActivity
    | _Need
    | int
    | None
)


class Control:
    """Fences backends and looks at the server, over one connection. `call_soon(word)` is called in this thread.

    `seen` are the servers that former brokers' control connections were on. `leadership`: what is to be claimed there.
    `maintenance`: see `BrokerSettings`.
    """

    def __init__(
        self,
        dsn: str | None,
        max_conn: int | None,
        instance: str,
        call_soon: Callable[[LedgerCall], None],
        seen: Iterable[ServerIncarnation] = (),
        leadership: Leadership | None = None,
        *,
        maintenance: bool = False,
    ) -> None:
        self._dsn = dsn
        self._database = Database(dsn, maintenance=maintenance) if dsn is not None else None
        self._needed = True
        self._max_conn = max_conn
        self._instance = instance
        self._leadership = leadership
        self._call_soon = call_soon
        self._inbox: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._fencing = Fencing(self._free, self._restarted_since)
        self._surveys: list[SurveyServer] = []
        self._conn: psycopg2.extensions.connection | None = None
        self._boot_us = 0
        self._route = ""
        self._room = 0
        self._seen = set(seen)  # every server this connection, or a former broker's, has been on
        self._noted_servers: set[int] = set()  # starts of servers that workers have been on
        self._hurry = False
        self._lost = ""  # what ended the last connection, until there is a new one
        self._connected_at = -math.inf
        self._fault = ""  # what makes our way to the server unsuitable
        self.state = "connecting" if dsn else "none"
        self._thread = threading.Thread(target=self._run, name="sharedpool-control", daemon=True)

    @property
    def exists(self) -> bool:
        """Whether there is a server to ask."""
        return self._dsn is not None

    @property
    def has_leadership(self) -> bool:
        """Whether the limit's lock must be held before anything is granted."""
        return self._leadership is not None

    def start(self) -> None:
        """Connect in the background."""
        if self._dsn is None:
            text = (
                "no control connection (give --dsn): a killed worker's query is not ended, and its slot stays counted"
                " until it ends by itself; what cannot be seen from here (the query of a worker on another host, or"
                " of one that was killed with a former broker) stays counted. To free it %s"
            )
            logger.warning(text, _WAY_OUT)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; waits at most a second for a query that is under way."""
        self._inbox.put(None)
        self._thread.join(1.0)

    def enqueue_fence(self, fence: Fence, *, after_s: float = 0.0) -> None:
        """Queue a backend to be ended and confirmed gone, unless it is `forget_fence` within `after_s`. Does not
        block.
        """
        self._inbox.put((fence, time.monotonic() + after_s))

    def forget_fence(self, token: Token) -> None:
        """Forget a fence: other evidence has come. Does not block."""
        self._inbox.put(token)

    def need(self, needed: bool) -> None:
        """Be connected, or let go of the server, and of the limit's lock, while nobody uses the broker."""
        self._inbox.put(_Need(needed))

    def note_server(self, boot_us: int) -> None:
        """Take in that a worker is on a server that was started then: see it too, while it is there. Does not block.

        What was on a server that was never seen cannot be known to be gone with it.
        """
        if self.exists and boot_us not in self._noted_servers:
            self._noted_servers.add(boot_us)
            self._inbox.put(boot_us)

    def survey(self, request: SurveyServer) -> None:
        """Queue a survey of the server. Does not block."""
        self._inbox.put(request)

    def verify_server(self, request: VerifyServer) -> None:
        """Queue the question whether the server is still the one it was. Does not block."""
        self._inbox.put(request)

    def cancel_backend(self, command: CancelBackend) -> None:
        """Queue a cancel. Does not block."""
        self._inbox.put(command)

    def query_activity(self, request: QueryActivity) -> None:
        """Queue a command's question what backends are doing. Does not block."""
        self._inbox.put(request)

    def _run(self) -> None:
        retry_s, retry_at = _FIRST_RECONNECT_S, 0.0
        while True:
            if self._dsn and self._needed and self._conn is None and time.monotonic() >= retry_at:
                try:
                    self._connect()
                except (
                    Exception
                ) as error:  # whatever it is: without this thread no slot of the dead comes back
                    self._drop(f"unreachable: {_text(error)}")
                    logger.warning(
                        "control connection: %s; next try in %.1f s", _text(error), retry_s
                    )
                    retry_at, retry_s = (
                        time.monotonic() + retry_s,
                        min(retry_s * 2, _LAST_RECONNECT_S),
                    )
                    if self._leadership is not None:
                        self._leadership.cannot_ask()
            if not self._receive(self._wait_s(retry_at)):
                break
            if self._hurry:
                self._hurry = False
                if self._conn is not None:
                    self._is_same()
                retry_s, retry_at = _FIRST_RECONNECT_S, 0.0
            if self._conn is not None:
                try:
                    self._work(time.monotonic())
                    retry_s = _FIRST_RECONNECT_S
                except Exception as error:
                    self._lose(error)
                    now = time.monotonic()
                    if now - self._connected_at > _LAST_RECONNECT_S:
                        retry_at = now  # it has worked: a proxy ends what was silent for a while, somebody waits
                    else:
                        retry_at, retry_s = now + retry_s, min(retry_s * 2, _LAST_RECONNECT_S)
        self._drop("stopped")

    def _wait_s(self, retry_at: float) -> float | None:
        if self._dsn and self._needed and self._conn is None:
            return max(0.0, retry_at - time.monotonic())
        if self._conn is None:
            return None
        if self._surveys:
            return 0.0
        due = self._fencing.due
        if self._leadership is not None:
            due = min(due, self._leadership.claim_at)
        return None if due == math.inf else max(0.0, due - time.monotonic())

    def _receive(self, timeout: float | None) -> bool:
        """Take in new jobs, waiting up to `timeout` seconds for the first; return False at the end."""
        try:
            item = self._inbox.get(timeout=timeout)
            while True:
                match item:
                    case None:
                        return False
                    case (Fence() as fence, float(due)):
                        self._fencing.add(fence, due)
                        if self._dsn is None:
                            fields = {
                                "pool": fence.pool,
                                "lease": str(fence.token),
                                "reason": fence.why,
                            }
                            text = "pool %r: lease %s stays counted: %s"
                            logger.warning(
                                text,
                                fence.pool,
                                fence.token,
                                _NO_CONTROL,
                                extra={"sharedpool": fields},
                            )
                    case SurveyServer():
                        self._surveys.append(item)
                    case VerifyServer():
                        self._answer(item)
                    case CancelBackend():
                        self._cancel(item)
                    case QueryActivity():
                        self._query_activity(item)
                    case _Need(needed):
                        self._hurry = needed
                        self._needed = needed
                        if not needed:
                            self._rest()
                    case Token():
                        self._fencing.discard(item)
                    case int():
                        self._hurry = self._hurry or item != self._boot_us
                item = self._inbox.get_nowait()
        except queue.Empty:
            return True

    def _cancel(self, command: CancelBackend) -> None:
        """Cancel what a backend is executing: now or never, later it may be at something else."""
        sent: bool | None = None
        if self._conn is None:
            logger.warning(
                "lease %s: its query is not cancelled: no control connection", command.token
            )
        else:
            try:
                sent = statements.cancel(self._conn, command.backend)
            except Exception as error:
                self._lose(error)
        if sent is False:
            logger.warning(
                "lease %s: its query is not cancelled: the broker's role may not", command.token
            )
        self._call_soon(lambda ledger, now: ledger.query_cancelled(command, sent, now))

    def _query_activity(self, request: QueryActivity) -> None:
        """Tell a command what the server says. A question that cannot be put is not put later: nobody waits for it."""
        if time.monotonic() > request.until:
            return
        activity = Activity([], "no control connection just now")
        if self._conn is not None:
            here = [backend for backend in request.backends if backend.boot_us == self._boot_us]
            try:
                activity = Activity(activity_of(self._conn, here))
            except Exception as error:
                activity = Activity([], _text(error))
                if self._conn.closed:
                    self._lose(error)
        self._call_soon(lambda ledger, now: [Send(request.asker, activity)])

    def _answer(self, request: VerifyServer) -> None:
        """Say whether the server that we know still answers."""
        same = self._is_same()
        self._call_soon(
            lambda ledger, now: ledger.server_verified(request.pool, request.generation, same, now)
        )

    def _is_same(self) -> bool:
        """Say whether the server that we know still answers: to a new connection, if only ours has ended."""
        known = self._boot_us
        try:
            if self._conn is not None:
                return statements.server_of(self._conn)[0] == known
        except Exception as error:
            self._lose(error)
        try:
            if self._needed:
                self._connect()
        except Exception as error:
            self._drop(f"unreachable: {_text(error)}")
        return self._conn is not None and self._boot_us == known

    def _survey(self, request: SurveyServer) -> None:
        """Look for backends of this broker's pools and for backends in start-up."""
        if request.barrier:
            self._pass_barrier()
        assert self._conn is not None
        starting, found = statements.survey(self._conn, pattern_of(self._instance))
        listed = {
            Backend(pid, start_us, self._boot_us): (tag, database)
            for pid, start_us, tag, database in found
        }
        tagged = {backend: tag for backend, (tag, _) in listed.items()}
        survey = SurveyResult(
            request.serial,
            starting,
            tagged,
            {backend: name for backend, (_, name) in listed.items()},
        )
        self._call_soon(lambda ledger, now: ledger.surveyed(survey, now))

    def _pass_barrier(self) -> None:
        """Make the control connection anew. A server that answers, be it with a refusal, has accepted us."""
        assert self._database is not None
        fresh = connection.__new__(connection)
        try:
            fresh.__init__(make_dsn(self._database.current, **self._defaults()))  # type: ignore[misc] # connects
        except (psycopg2.OperationalError, UnicodeDecodeError):
            # libpq keeps the socket on which it was refused, and none of one that never answered.
            if (socket_of_failed(fresh) or -1) < 0:
                raise
            return
        old = self._conn
        try:
            self._prepare(fresh)  # what is held by the old one can be kept
        finally:
            if old is not None:
                old.close()

    def _connect(self) -> None:
        assert self._database is not None
        known, lost, self._lost = self._boot_us, self._lost, ""
        fresh = self._database.connect(self._defaults())
        try:
            self._inspect_route(fresh)
        except BaseException:
            fresh.close()
            raise
        self._prepare(fresh)
        self._connected_at = time.monotonic()
        assert self._conn is not None
        pid, database = self._conn.info.backend_pid, self._conn.info.dbname
        if lost and self._boot_us == known:  # a server that ends one session is the same one still
            logger.debug(
                "control connection: backend %d in the place of one that has ended (%s)", pid, lost
            )
            return
        text = "control connection: backend %d in database %r, room for %d connections"
        logger.info(text, pid, database, self._room)
        if self._max_conn is not None and self._max_conn + 1 > self._room:
            text = (
                "max_conn %d and 1 control connection are more than the %d connections the server has for ordinary"
                " users: raise max_connections or lower max_conn"
            )
            logger.warning(text, self._max_conn, self._room)
        role, limit = statements.role_of(self._conn)
        self._call_soon(lambda ledger, now: ledger.limited(now, role=role, limit=limit))

    def _inspect_route(self, conn: connection) -> None:
        """Find out who is between us and the server, and tell."""
        conn.autocommit = True
        direct, pooled = statements.route_of(conn)
        fault = self._sign_of_sharing(conn) if pooled else ""
        if fault:
            fault = sessions_not_kept_text(fault)
            logger.error("control connection: %s", fault)
        self._fault = fault
        self._call_soon(lambda ledger, now: ledger.reached(now, direct=direct, fault=fault))

    def _sign_of_sharing(self, conn: connection) -> str:
        """Open a second session behind a pooler for a moment: say what shows that it does not keep the two apart."""
        assert self._dsn is not None
        try:
            other = psycopg2.connect(self._dsn, **self._defaults())
        except psycopg2.OperationalError as error:
            logger.info("no second session behind the pooler: %s", _text(error))
            return ""
        try:
            other.autocommit = True
            first = statements.itself(conn)
            for _ in range(_ROUNDS):
                theirs = statements.itself(other)
                if theirs is None:
                    break  # it waits for a backend of its own
                if theirs == first:
                    return "two sessions of one moment have the same backend"
                if statements.itself(conn) != first:
                    return "one session has had two backends"
            return ""
        finally:
            other.close()

    def _prepare(self, conn: connection) -> None:
        self._conn = conn
        self._conn.autocommit = True
        statements.lift_limits(conn)
        self._boot_us, self._route = statements.server_of(conn)
        server = ServerIncarnation(self._route, self._boot_us)
        if server not in self._seen:
            self._seen.add(server)
            self._call_soon(lambda ledger, now: [RecordServer(server)])
        self._room = statements.room_of(conn)
        self.state = "connected"
        self._claim(time.monotonic())

    def _claim(self, now: float) -> None:
        """Take the limit's lock, or note who has it. No session holds it behind a pooler that keeps none."""
        if self._fault:
            self.state = "connected, through a pooler that does not keep sessions"
            if self._leadership is not None:
                self._leadership.cannot_ask()
        elif self._leadership is not None and self._conn is not None:
            rival = self._leadership.claim(self._conn, now)
            self.state = f"another broker counts to this limit: {rival}" if rival else "connected"

    def _defaults(self) -> dict[str, Any]:
        given = parse_dsn(self._dsn or "")
        wanted = {"fallback_application_name": "sharedpool broker", "connect_timeout": "10"}
        settings = {name: value for name, value in wanted.items() if name not in given}
        if (
            self._leadership is not None
        ):  # by it other brokers see who has the lock, whatever the DSN says
            settings["application_name"] = self._leadership.application_name
        return settings

    def _lose(self, error: Exception) -> None:
        self._lost = _text(error)  # a warning is worth only what becomes of the next one
        logger.debug("control connection lost: %s", self._lost)
        self._drop("connecting")

    def _rest(self) -> None:
        self._drop("at rest: nobody uses the broker")
        if self._leadership is not None:
            self._leadership.resign()

    def _drop(self, state: str) -> None:
        if self._conn is not None:
            self._conn.close()
        self._conn = None
        if self._dsn is not None:
            self.state = state

    def _work(self, now: float) -> None:
        assert self._conn is not None
        if self._leadership is not None and self._leadership.claim_at <= now:
            self._claim(now)
        while self._surveys:
            self._survey(self._surveys[0])
            del self._surveys[0]
        self._fencing.work(self._conn, self._boot_us, now)

    def _restarted_since(self, backend: Backend) -> bool:
        """We saw that server ourselves, by this route, and now another incarnation answers there."""
        return (
            backend.boot_us != self._boot_us
            and ServerIncarnation(self._route, backend.boot_us) in self._seen
        )

    def _free(self, token: Token) -> None:
        self._call_soon(lambda ledger, now: ledger.backend_gone(token, now))


_WAY_OUT = "start the broker again with --dsn, or without its .journal file while no broker and no worker runs"
_NO_CONTROL = f"there is no control connection to confirm that its backend is gone: {_WAY_OUT}"


def _text(error: Exception) -> str:
    """Return what went wrong, in a line; a server in another language is not even readable to psycopg2."""
    if isinstance(error, UnicodeDecodeError):
        return error.object.decode("utf-8", "replace").strip()
    return str(error).strip() or type(error).__name__
