"""Receive a live connection from another process, the slow path.

The steps are in `worker/connection/handover.py`; `mover.py` is the fast path for the usual case.
"""

from __future__ import annotations

import math
import time
import weakref
from functools import partial

import psycopg2
from msgspec import structs

from sharedpool.descriptors.available import is_shortage
from sharedpool.descriptors.owned import Identity, Owned, identity
from sharedpool.errors import SharedPoolError
from sharedpool.wire.desk import Moved
from sharedpool.worker.connection.closing import cut
from sharedpool.worker.connection.handover import PATIENT_S, adopt, reads_dates, works
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.reset import parameters_after
from sharedpool.worker.connection.state import peer_has_closed
from sharedpool.worker.core.lease import Waiter
from sharedpool.worker.local_state import LocalState
from sharedpool.worker.logs import logger

# How many self-tests may fail before one has passed. A slow server may spoil one.
_TRIALS = 3


class Receiver:
    """Receives connections, and tests the technique until it has worked once."""

    def __init__(self, local: LocalState) -> None:
        self._local = local
        self.works = False  # a received connection has passed the self-test
        self._trials = _TRIALS  # failures that are left
        # Sockets in threads' hands, whose reset may not be over. A forked child closes them.
        self.arriving: set[tuple[int, Identity]] = set()

    def receive(self, moved: Moved, sock: Owned, limit_s: float) -> Waiter | None:
        """Receive a connection, for the thread that asked, another that waits, or to lie idle.

        Return the waiter to wake, if any. A connection that cannot be used is closed, and the
        broker told. Blocks until the reset is over, at most `limit_s` seconds.
        """
        cache = self._local.cache
        arriving = sock.fileno(), identity(sock.fileno())
        self.arriving.add(arriving)
        # The broker may ask for this lease while its reset is awaited.
        cache.arriving[moved.token] = moved, weakref.ref(sock)
        try:
            conn = self._adopt(moved, sock, limit_s)
            if conn is None or not self._passes_test(conn, moved):
                return None
            return self._file(conn, moved)
        finally:
            # The socket is closed by now, or its lease is in the cache.
            self.arriving.discard(arriving)
            cache.arriving.pop(moved.token, None)

    def _adopt(self, moved: Moved, sock: Owned, limit_s: float) -> PooledConnection | None:
        """Return a connection object for the session; None if the session was refused."""
        local, live = self._local, moved.live
        # Building the first object may run a user's code, which must not run in the link's thread.
        if not local.shells.are_known and local.link is not None and local.link.is_own_thread:
            sock.close()
            local.refuse(moved)
            return None
        try:
            parameters = parameters_after(sock, live.parameters, limit_s)
            if parameters is None or not reads_dates(parameters):
                sock.close()
                local.refuse(moved)
                return None
            if parameters != live.parameters:
                live = structs.replace(live, parameters=parameters)
            return adopt(local.shells.take(live, len(local.cache.leases) + 1), sock, live)
        except BaseException as error:
            sock.close()  # unless the shell has it
            local.refuse(moved)
            if isinstance(error, SharedPoolError) or is_shortage(error):
                text = "pool %r: a connection from another process is closed: %s"
                logger.info(text, local.config.name, error)
            elif isinstance(error, psycopg2.Error | OSError):
                self._disable_handover(str(error))
            else:
                raise
            return None

    def _passes_test(self, conn: PooledConnection, moved: Moved) -> bool:
        """Return True if a received connection works; else it is cut and refused.

        Connections are tested until one has worked. The broker may ask for a `trial` besides: a
        test of whether queries can be cancelled.
        """
        fit = False
        try:
            trial = moved.passed is not None and moved.passed.trial
            fit = (self.works and not trial) or self._test(conn, moved, trial=trial)
        finally:
            if not fit:
                cut([conn], limit_s=0)
                self._local.refuse(moved)
        return fit

    def _test(self, conn: PooledConnection, moved: Moved, *, trial: bool) -> bool:
        tests_cancel = trial and self._may_test_cancel(moved.request)
        if self.works and not tests_cancel:
            return True
        cancel = partial(self._local.cancel_query, moved.token, trial=True)
        fit = works(conn, cancel if tests_cancel else None)
        self.works = self.works or fit
        if not fit and not peer_has_closed(conn):
            self._trials -= 1
            if not self._trials:
                self._disable_handover(
                    "connections from other processes, or their cancels, do not work here"
                )
        return fit

    def _may_test_cancel(self, request: int) -> bool:
        """Return True if the waiter of a request has the time for a cancel.

        The link's thread sends the cancel, so it cannot wait for one.
        """
        link, waiter = self._local.link, self._local.cache.waiting.get(request)
        if link is None or link.is_own_thread or waiter is None or waiter.until is None:
            return False
        return waiter.until - time.monotonic() >= PATIENT_S

    def _file(self, conn: PooledConnection, moved: Moved) -> Waiter | None:
        """File a received connection in the cache; return the waiter to wake, if any."""
        local, left_ms = self._local, moved.live.left_ms
        conn.sharedpool_local, conn.sharedpool_movable = local, True
        now = time.monotonic()
        retire_at = math.inf if left_ms is None else now + left_ms / 1000
        try:
            with local.lock:
                waiter = local.messages.received(moved, conn, retire_at, now)
        except SharedPoolError as error:
            logger.info("pool %r: %s", local.config.name, error)
            cut([conn], limit_s=0)
            local.refuse(moved)
            return None
        local.adopted += 1
        if waiter is None:
            local.wake_link()
        return waiter

    def _disable_handover(self, why: str) -> None:
        """Take no more part in the hand-over."""
        local = self._local
        if local.handover_enabled:
            text = (
                "pool %r: no hand-over in this process (%s):"
                " connections are closed and opened instead"
            )
            logger.warning(text, local.config.name, " ".join(why.split()))
        local.handover_enabled = local.hands_over = False
