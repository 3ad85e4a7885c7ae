"""The sessions by which a broker shares limits with other hosts: one per database, in one thread.

A limit is shared in its pool's database, or in another one that its first host has named: then one
session serves the pools of many databases. The row in the pool's own database says which it is.

The ledger orders syncs, and this thread carries them out, one after the other. It also listens:
another broker that lacks slots, or has given some back, wakes this one by NOTIFY.

A lost session is reported at once, even if nothing is to be done: the other hosts may take this one
for gone from then on.
"""

from __future__ import annotations

import logging
import math
import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import psycopg2
from psycopg2.extensions import connection, make_dsn, parse_dsn

from sharedpool.broker.core.commands import LeaveShare, SyncShare
from sharedpool.broker.core.host_presence import SESSION_NAME, Presence
from sharedpool.broker.core.ledger import LedgerCall
from sharedpool.broker.core.share_records import scope_name
from sharedpool.broker.core.share_sync import OLD_S, look_every_s
from sharedpool.broker.core.share_terms import Failed, ShareKey, SyncFailure, SyncResult, Wakeup
from sharedpool.broker.postgres import share_table
from sharedpool.broker.postgres.control_connection import error_text
from sharedpool.broker.postgres.share_schema import CannotShare, Registration, open_table
from sharedpool.broker.postgres.share_table import SharedElsewhere
from sharedpool.postgres.libpq import socket_of_failed

logger = logging.getLogger("sharedpool.broker")

# Classes of SQLSTATEs with which a sync is not possible at all: no right to the tables, none or
# others of that name, a feature that the server does not have, a transaction that may not write.
_NOT_POSSIBLE = ("0A", "25", "3F", "42")


class _Place(NamedTuple):
    """Where hosts share a limit: in which database, and by which name."""

    database: str
    scope: str


def _place(key: ShareKey, home: str) -> _Place:
    """Return where a limit is shared whose hosts meet in the database `home`; empty: in its own."""
    if home in ("", key.database):
        return _Place(*key)
    # With the length, as both names may contain anything: no other limit gets this one.
    return _Place(home, scope_name("in", f"{len(key.database)} {key.database} {key.scope}"))


class _Session:
    """One database's session, and what this broker knows of the other hosts by it."""

    def __init__(self, conn: connection, registration: Registration) -> None:
        self.conn = conn
        self.registration = registration
        self.presence = Presence()
        self.looked_at = float("-inf")
        self.results: dict[ShareKey, SyncResult] = {}  # of the last sync of each limit

    def look(self, key: ShareKey) -> Presence:
        """See who is on the server, if that is not known from a moment ago; return what is known.

        Blocks for a round trip. Raise psycopg2's errors.
        """
        now, result = time.monotonic(), self.results.get(key)
        age_s, again_s = now - self.looked_at, math.inf if result is None else result.again_s
        if age_s > look_every_s(result) or age_s >= again_s:
            share_table.look(self.conn, self.presence, now)
            self.looked_at = now
        elif age_s > OLD_S:
            return Presence()  # the list says nothing of hosts that came since
        return self.presence


class ShareSessions:
    """The thread and its queue. `call_soon(call)` has the loop call the ledger, in this thread.

    No method blocks, except `stop`.
    """

    def __init__(
        self,
        dsn: str,
        instance: str,
        host: str,
        ttl_s: float,
        call_soon: Callable[[LedgerCall], None],
    ) -> None:
        self._dsn = dsn
        self._instance = instance
        self._host = host
        self._ttl_s = ttl_s
        self._call_soon = call_soon
        self._sessions: dict[str, _Session] = {}  # by database
        self._places: dict[ShareKey, _Place] = {}  # of the limits in use
        self._reached = Failed.UNREACHABLE  # how the last connect has failed
        self._said: set[tuple[ShareKey, str]] = set()  # which limits are shared elsewhere
        self._trying = ""  # the database of the session that was wanted last
        self._kept: frozenset[ShareKey] = frozenset()  # shares that outlive this broker
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="sharedpool-shares", daemon=True)

    def start(self) -> None:
        """Wait for orders in the background."""
        self._thread.start()

    def stop(self, in_use: Collection[ShareKey]) -> None:
        """End the thread, and wait at most a second for that; give back shares not `in_use`.

        Connections outlive the broker: a successor counts them, or the other hosts see them.
        """
        self._kept = frozenset(in_use)
        self._order(None)
        self._thread.join(1.0)
        if not self._thread.is_alive():
            self.close()

    def close(self) -> None:
        """Close what the thread is woken by: it has ended, or was never started."""
        self._wake_in.close()
        self._wake_out.close()

    def sync(self, order: SyncShare) -> None:
        """Look at the shares of a limit, and change this host's; the ledger is told the outcome."""
        self._order(partial(self._sync, order))

    def leave(self, order: LeaveShare) -> None:
        """Give a share back."""
        self._order(partial(self._leave, order.key))

    def _order(self, order: Callable[[], None] | None) -> None:
        self._orders.put(order)
        try:
            self._wake_out.send(b"\0")
        except BlockingIOError:
            pass  # the thread is awake anyway

    # --- the thread

    def _run(self) -> None:
        while True:
            self._wait()
            try:
                while (order := self._orders.get_nowait()) is not None:
                    order()
            except queue.Empty:
                continue
            break
        for session in list(self._sessions.values()):
            for key in session.results.keys() - self._kept:
                self._leave(key)
        for session in self._sessions.values():
            session.conn.close()

    def _wait(self) -> None:
        """Wait for an order, or for something to arrive in a session."""
        poller = select.poll()
        poller.register(self._wake_in, select.POLLIN)
        databases = {session.conn.fileno(): name for name, session in self._sessions.items()}
        for fd in databases:
            poller.register(fd, select.POLLIN)
        for fd, _ in poller.poll():
            if fd in databases:
                self._listen(databases[fd])
            else:
                self._wake_in.recv(4096)

    def _listen(self, database: str) -> None:
        """Tell the ledger of other brokers' wake-ups, or that the session has ended."""
        session = self._sessions[database]
        try:
            for scope, wakeup in share_table.woken(session.conn, self._instance):
                for key, place in list(self._places.items()):
                    if place == (database, scope):
                        self._call_soon(_woken(key, wakeup))
                        # While the workers are asked what is idle, which the next sync waits for.
                        session.look(key)
        except psycopg2.Error as error:
            self._lose(database, error)
        except Exception:  # any: without this thread nothing more would be granted
            logger.exception("wake-ups in database %r", database)

    def _session(self, database: str) -> _Session:
        """Return the session of a database, opened if there is none. Raise psycopg2's errors."""
        self._trying, session = database, self._sessions.get(database)
        if session is None:
            conn = self._connect(database)
            try:
                registration = open_table(conn, self._instance, self._host, self._ttl_s)
            except BaseException:
                conn.close()
                raise
            session = self._sessions[database] = _Session(conn, registration)
        return session

    def _connect(self, database: str) -> connection:
        """Connect. Blocks for up to `connect_timeout`. Raise psycopg2's errors."""
        wanted = {"application_name": SESSION_NAME + self._instance}
        if database:
            wanted["dbname"] = database
        if "connect_timeout" not in parse_dsn(self._dsn):
            wanted["connect_timeout"] = "5"
        conn = connection.__new__(connection)
        try:
            conn.__init__(make_dsn(self._dsn, **wanted))  # type: ignore[misc]
        except (psycopg2.OperationalError, UnicodeDecodeError):
            # libpq keeps the socket on which it was refused, but none that was never answered.
            answered = (socket_of_failed(conn) or -1) >= 0
            self._reached = Failed.REFUSED if answered else Failed.UNREACHABLE
            raise
        self._reached = Failed.LOST
        return conn

    def _find_place(self, order: SyncShare) -> _Place:
        """Return where the hosts of a limit share it. Raise `CannotShare`, or psycopg2's errors.

        The limit's own database tells that, so that hosts whose settings differ do not count apart.
        """
        key, wanted = order.key, order.home
        if wanted in ("", key.database):
            return _place(key, "")
        home, why = None, "they have agreed on that"
        try:
            home = share_table.agreed_home(self._session(key.database).conn, key.scope)
            # This host uses the database before it tells the others. It agrees on none that it
            # cannot use, and does not count alone: hosts without the setting share here.
            if home is None and (trouble := self._trouble_with(wanted)):
                home, why = "", trouble
            elif home is None:
                conn = self._session(key.database).conn
                home = share_table.agree_on_home(conn, key.scope, order.max_conn, wanted)
        finally:
            self._close_unused(key.database)
            if home != wanted:
                self._close_unused(wanted)
        if home != wanted and (key, home) not in self._said:
            self._said.add((key, home))
            text = "pool %r: its hosts share its limit in database %r, not in %r as asked for: %s"
            logger.warning(text, order.pool, home or key.database, wanted, why)
        return _place(key, home)

    def _trouble_with(self, database: str) -> str:
        """Return why a database cannot be used to share limits; empty if it can."""
        try:
            self._session(database)
        except (psycopg2.Error, CannotShare, UnicodeDecodeError) as error:
            return error_text(error)
        return ""

    def _close_unused(self, database: str) -> None:
        """Close a session in which nothing is shared: nobody is kept from dropping the database."""
        session = self._sessions.get(database)
        if session is not None and not session.results:
            del self._sessions[database]
            session.conn.close()

    def _sync(self, order: SyncShare) -> None:
        key, began = order.key, time.monotonic()
        try:
            place = self._places.get(key) or self._find_place(order)
            self._places[key] = place
            session = self._session(place.database)
            presence = session.look(key)
            decision = share_table.sync(
                session.conn, session.registration, order, presence, place.scope
            )
            result = decision.result
            session.results[key] = result
            if decision.silent:
                share_table.end_silent(session.conn, presence, place.scope, decision.silent)
        except SharedElsewhere as elsewhere:
            session.results.pop(key, None)
            self._close_unused(place.database)
            self._places[key] = _place(key, elsewhere.home)
            if place == _place(key, "") != self._places[key]:
                self._sync(order)
            else:  # somebody has written nonsense
                del self._places[key]
                text = f"database {place.database!r} says that it is shared in {elsewhere.home!r}"
                self._fail(key, SyncFailure(Failed.UNSHARED, text), order.serial)
        except CannotShare as error:
            self._fail_order(order, Failed.UNSHARED, str(error))
        except psycopg2.Error as error:
            self._fail_by(order, error)
        except UnicodeDecodeError as error:  # an error's text in another encoding
            self._fail_order(order, Failed.REFUSED, error_text(error))
        except Exception as error:  # any: without this thread nothing more would be granted
            logger.exception("the shares of %r", key.scope)
            self._fail(key, SyncFailure(Failed.LOST, error_text(error)), order.serial)
        else:
            self._call_soon(
                lambda ledger, now: ledger.sharing.synced(key, order.serial, result, began, now)
            )

    def _fail_by(self, order: SyncShare, error: psycopg2.Error) -> None:
        session = self._sessions.get(self._trying)
        if session is None:
            how = self._reached
        elif session.conn.closed:
            self._lose(self._trying, error)
            how = Failed.LOST
        else:
            how = Failed.LOST
        if how is Failed.LOST and (error.pgcode or "")[:2] in _NOT_POSSIBLE:
            how = Failed.UNSHARED
        # Also after the loss of the session: if this was the limit's first sync, it has not been
        # told of that.
        self._fail_order(order, how, error_text(error))

    def _fail_order(self, order: SyncShare, how: Failed, why: str) -> None:
        """Report that a sync has failed.

        Where hosts are known to have agreed on another database, one that it refuses may not count
        to the limit alone.
        """
        key = order.key
        if self._places.get(key, key) != key and how in (Failed.UNSHARED, Failed.REFUSED):
            how = Failed.UNREACHABLE
        self._fail(key, SyncFailure(how, why), order.serial)

    def _lose(self, database: str, error: Exception) -> None:
        session = self._sessions.pop(database)
        session.conn.close()
        for key in session.results:
            self._fail(key, SyncFailure(Failed.LOST, error_text(error)))

    def _fail(self, key: ShareKey, failure: SyncFailure, serial: int = 0) -> None:
        self._call_soon(lambda ledger, now: ledger.sharing.failed(key, failure, now, serial))

    def _leave(self, key: ShareKey) -> None:
        place = self._places.pop(key, None)
        if place is None:
            return
        session = self._sessions.get(place.database)
        left = None if session is None else session.results.pop(key, None)
        others = [] if left is None else [host.instance for host in left.others]
        for _ in range(1 if session is None else 2):  # it may have been lost unnoticed
            try:
                session = self._session(place.database)
                share_table.leave(session.conn, session.registration, place.scope, others)
                break
            except (psycopg2.Error, CannotShare, UnicodeDecodeError) as error:
                logger.info("the share of %r is not given back: %s", key.scope, error_text(error))
                session = self._sessions.get(place.database)
                if session is not None and session.conn.closed:
                    self._lose(place.database, error)
        self._close_unused(place.database)


def _woken(key: ShareKey, wakeup: Wakeup) -> LedgerCall:
    return lambda ledger, now: ledger.sharing.woken(key, wakeup, now)
