"""The control connection's thread: fence backends, survey the server, cancel queries.

A thread of its own, so that a slow server never stops the grants. The loop queues its orders here,
and this thread queues what it finds out as calls of the ledger.

Which backends are to be ended, and what proves that they have, is in `fencing.py`. A *survey* looks
for backends that no worker has reported (see `broker/core/quarantine.py`).
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial

from sharedpool.broker.core.commands import (
    CancelBackend,
    Fence,
    QueryActivity,
    Send,
    ServerIncarnation,
    SurveyResult,
    SurveyServer,
    VerifyServer,
)
from sharedpool.broker.core.ledger import LedgerCall
from sharedpool.broker.postgres import statements
from sharedpool.broker.postgres.control_connection import ControlConnection, error_text
from sharedpool.broker.postgres.fencing import Fencing
from sharedpool.broker.postgres.leadership import Leadership
from sharedpool.wire.application_name import pattern_of
from sharedpool.wire.reports import Activity
from sharedpool.wire.values import Backend, Token

logger = logging.getLogger("sharedpool.broker")

_FIRST_RECONNECT_S, _LAST_RECONNECT_S = 0.1, 1.0
_SAY_AGAIN_S = 60.0  # after which the same failure is worth another line in the log
_WAY_OUT = (
    "start the broker again with --dsn, or without its .journal file while no broker and no worker"
    " runs"
)


class _Retry:
    """When the next connect may be tried: after a pause that doubles with each failure."""

    def __init__(self) -> None:
        self._said, self._said_at = "", -math.inf
        self.reset()

    def reset(self) -> None:
        """Allow a connect at once."""
        self.pause_s, self.at = _FIRST_RECONNECT_S, -math.inf

    def failed(self) -> None:
        """Set the time of the next try."""
        self.at = time.monotonic() + self.pause_s
        self.pause_s = min(self.pause_s * 2, _LAST_RECONNECT_S)

    def succeeded(self) -> None:
        """Let the next failure be news, whatever it is."""
        self._said = ""

    def is_news(self, text: str, now: float) -> bool:
        """Return True if a failure is to be told: another one than before, or once a minute."""
        if text == self._said and now - self._said_at < _SAY_AGAIN_S:
            return False
        self._said, self._said_at = text, now
        return True


class Control:
    """The thread and its queue. `dsn` None: there is no control connection.

    `call_soon(call)` has the loop call the ledger; it is called in this thread. The other
    parameters are those of `ControlConnection`. No method blocks, except `stop`.
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
        self.connection = (
            None
            if dsn is None
            else ControlConnection(
                dsn, max_conn, call_soon, seen, leadership, maintenance=maintenance
            )
        )
        self._leadership = leadership
        self._instance = instance
        self._call_soon = call_soon
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._fencing = Fencing(self._report_gone, self._is_server_gone)
        self._surveys: list[SurveyServer] = []
        self._noted_servers: set[int] = set()  # start times of servers that workers have been on
        self._needed = True
        self._hurry = False
        self._retry = _Retry()
        self._thread = threading.Thread(target=self._run, name="sharedpool-control", daemon=True)

    @property
    def exists(self) -> bool:
        """Whether there is a server to ask."""
        return self.connection is not None

    @property
    def has_leadership(self) -> bool:
        """Whether the lock is claimed that keeps other brokers out."""
        return self._leadership is not None and self._leadership.claimed

    @property
    def state(self) -> str:
        """The connection's state, as `sharedpool status` shows it."""
        return "none" if self.connection is None else self.connection.state

    def start(self) -> None:
        """Connect in the background."""
        if self.connection is None:
            text = (
                "no control connection (--dsn): the query of a killed worker is not ended, and its"
                " slot stays counted until the query ends by itself. Where the broker cannot see"
                " that end (on another host, or after a restart of the broker) the slot stays"
                " counted for good. To free it, %s"
            )
            logger.warning(text, _WAY_OUT)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; wait at most a second for a query that is under way."""
        self._inbox.put(None)
        self._thread.join(1.0)

    # --- orders of the loop

    def enqueue_fence(self, fence: Fence, *, after_s: float = 0.0) -> None:
        """End a backend, unless `forget_fence` comes within `after_s`; report when it is gone."""
        self._inbox.put(partial(self._fence, fence, time.monotonic() + after_s))

    def forget_fence(self, token: Token) -> None:
        """Forget a fence: other evidence has come."""
        self._inbox.put(partial(self._fencing.discard, token))

    def need(self, needed: bool) -> None:
        """Be connected, or leave the server and give up the leadership lock while unused."""
        self._inbox.put(partial(self._set_needed, needed))

    def note_server(self, boot_us: int) -> None:
        """Connect soon to the server that was started at `boot_us`: a worker is on it.

        A restart proves that a server's backends are gone only if the broker has seen that server.
        """
        if self.exists and boot_us not in self._noted_servers:
            self._noted_servers.add(boot_us)
            self._inbox.put(partial(self._expect_server, boot_us))

    def claim_leadership(self) -> None:
        """Claim the lock that keeps other brokers out, and keep it on every later connection."""
        self._inbox.put(self._claim_leadership)

    def resign_leadership(self) -> None:
        """Give that lock back."""
        self._inbox.put(self._resign_leadership)

    def survey(self, request: SurveyServer) -> None:
        """List the server's backends, and report them."""
        self._inbox.put(partial(self._surveys.append, request))

    def verify_server(self, request: VerifyServer) -> None:
        """Find out whether the server is still the one it was, and report it."""
        self._inbox.put(partial(self._verify, request))

    def cancel_backend(self, command: CancelBackend) -> None:
        """Cancel what a backend executes, and report the outcome."""
        self._inbox.put(partial(self._cancel, command))

    def query_activity(self, request: QueryActivity) -> None:
        """Send a command what the server says that backends are doing."""
        self._inbox.put(partial(self._query_activity, request))

    # --- the thread

    def _run(self) -> None:
        """Carry out orders until `stop`, with a connection while there can be one."""
        while True:
            self._connect_if_due()
            if not self._receive(self._wait_s()):
                break
            self._reconnect_if_hurried()
            self._work()
        if self.connection is not None:
            self.connection.close("stopped")

    def _connect_if_due(self) -> None:
        connection = self.connection
        if connection is None or connection.conn is not None or not self._needed:
            return
        if time.monotonic() < self._retry.at:
            return
        try:
            connection.open()
        except Exception as error:  # any: without this thread no slot of a dead worker comes back
            connection.close(f"unreachable: {error_text(error)}")
            is_news = self._retry.is_news(error_text(error), time.monotonic())
            text = "control connection: %s; tried again every second"
            logger.log(logging.WARNING if is_news else logging.DEBUG, text, error_text(error))
            self._retry.failed()
            connection.cannot_ask()
        else:
            self._retry.succeeded()

    def _wait_s(self) -> float | None:
        """Return how long the thread may wait for an order; None: as long as it takes."""
        connection = self.connection
        if connection is None:
            return None
        if connection.conn is None:
            return max(0.0, self._retry.at - time.monotonic()) if self._needed else None
        if self._surveys:
            return 0.0
        due = min(self._fencing.due, connection.claim_at)
        return None if due == math.inf else max(0.0, due - time.monotonic())

    def _receive(self, timeout: float | None) -> bool:
        """Carry out orders, waiting up to `timeout` seconds for one; return False at the end."""
        try:
            order = self._inbox.get(timeout=timeout)
            while order is not None:
                order()
                order = self._inbox.get_nowait()
        except queue.Empty:
            return True
        return False

    def _reconnect_if_hurried(self) -> None:
        if self._hurry:
            self._hurry = False
            if self.connection is not None and self.connection.conn is not None:
                self.connection.is_same_server(reconnect=self._needed)
            self._retry.reset()

    def _work(self) -> None:
        """Claim the lock, survey and fence, as far as they are due."""
        connection = self.connection
        if connection is None or connection.conn is None:
            return
        now = time.monotonic()
        try:
            if connection.claim_at <= now:
                connection.claim(now)
            while self._surveys:
                self._survey(connection, self._surveys[0])
                del self._surveys[0]
            self._fencing.work(connection.conn, connection.boot_us, now)
            self._retry.pause_s = _FIRST_RECONNECT_S
        except Exception as error:
            connection.lose(error)
            if time.monotonic() - connection.connected_at > _LAST_RECONNECT_S:
                # It has worked: a proxy may have ended it after a silence, and an order waits.
                self._retry.at = time.monotonic()
            else:
                self._retry.failed()

    # --- orders, in the thread

    def _fence(self, fence: Fence, due: float) -> None:
        self._fencing.add(fence, due)
        if self.connection is None:
            text = (
                "pool %r: lease %s stays counted: there is no control connection to confirm that"
                " its backend is gone: %s"
            )
            fields = {"pool": fence.pool, "lease": str(fence.token), "reason": fence.why}
            logger.warning(text, fence.pool, fence.token, _WAY_OUT, extra={"sharedpool": fields})

    def _set_needed(self, needed: bool) -> None:
        self._needed = self._hurry = needed
        if not needed and self.connection is not None:
            self.connection.rest()

    def _claim_leadership(self) -> None:
        if self._leadership is None:
            self._call_soon(lambda ledger, now: ledger.takeover.leads(now, after_another=False))
            return
        self._leadership.claimed = True
        self._leadership.claim_at = -math.inf
        connection = self.connection
        if connection is not None and connection.conn is None and time.monotonic() < self._retry.at:
            connection.cannot_ask()  # it was tried a moment ago

    def _resign_leadership(self) -> None:
        if self._leadership is not None and self.connection is not None:
            self._leadership.claimed = False
            self._leadership.resign()
            self.connection.close("connecting")  # a new connection has no lock

    def _expect_server(self, boot_us: int) -> None:
        if self.connection is not None and boot_us != self.connection.boot_us:
            self._hurry = True

    def _cancel(self, command: CancelBackend) -> None:
        """Cancel what a backend executes: now or never, as it may do something else later."""
        sent: bool | None = None
        connection = self.connection
        if connection is None or connection.conn is None:
            text = "lease %s: its query is not cancelled: no control connection"
            logger.warning(text, command.token)
        else:
            try:
                sent = statements.cancel(connection.conn, command.backend)
            except Exception as error:
                connection.lose(error)
        if sent is False:
            text = "lease %s: its query is not cancelled: the broker's role may not"
            logger.warning(text, command.token)
        self._call_soon(lambda ledger, now: ledger.control.query_cancelled(command, sent, now))

    def _query_activity(self, request: QueryActivity) -> None:
        """Answer a command, unless it does not wait any more."""
        if time.monotonic() > request.until:
            return
        connection = self.connection
        if connection is None or connection.conn is None:
            activity = Activity([], "no control connection just now")
        else:
            try:
                activity = Activity(
                    statements.activity_of(
                        connection.conn,
                        [each for each in request.backends if each.boot_us == connection.boot_us],
                    )
                )
            except Exception as error:
                activity = Activity([], error_text(error))
                if connection.conn.closed:
                    connection.lose(error)
        self._call_soon(lambda ledger, now: [Send(request.asker, activity)])

    def _verify(self, request: VerifyServer) -> None:
        connection = self.connection
        same = connection is not None and connection.is_same_server(reconnect=self._needed)
        self._call_soon(
            lambda ledger, now: ledger.control.server_verified(
                request.pool, request.generation, same, now
            )
        )

    def _survey(self, connection: ControlConnection, request: SurveyServer) -> None:
        """Look for backends of this broker's pools, and for backends in start-up."""
        if request.barrier:
            connection.pass_barrier()
        assert connection.conn is not None
        starting, found = statements.survey(connection.conn, pattern_of(self._instance))
        tagged, databases = {}, {}
        for pid, start_us, tag, database in found:
            backend = Backend(pid, start_us, connection.boot_us)
            tagged[backend], databases[backend] = tag, database
        survey = SurveyResult(request.serial, starting, tagged, databases)
        self._call_soon(lambda ledger, now: ledger.control.surveyed(survey, now))

    def _is_server_gone(self, backend: Backend) -> bool:
        return self.connection is not None and self.connection.is_server_gone(backend)

    def _report_gone(self, token: Token) -> None:
        self._call_soon(lambda ledger, now: ledger.backend_gone(token, now))
