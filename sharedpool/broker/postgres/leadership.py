"""The lock that keeps two brokers from counting to one limit that they cannot share.

Usually brokers share a limit by a table in the database (`share_table.py`). Where that is not
allowed, or the server takes no writes, one of them counts to it and the others wait.

Another environment, a removed runtime directory or another host hides a broker's lock file, but the
server is the same for both. So a broker holds a session advisory lock there, on its control
connection. The key is its *scope*: what other brokers must not count to at the same time.

1. The lock is taken in exclusive mode, which proves that nobody else holds it.
2. It is then kept in shared mode, so that a new control connection can join before the old one is
   closed. At no moment could another broker take it.
3. Such a lock belongs to a database, and two brokers may be in different ones (`database.py`). All
   are listed in `pg_locks`, so a broker looks again once it has the lock, and steps back if it is
   not alone.

A holder is known by its application_name, which carries the address's instance. A holder of our own
instance is our former connection, or a dead predecessor's that the server has not noticed: we hold
the address's file lock.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable

from psycopg2.extensions import connection

from sharedpool.broker.core.ledger import LedgerCall
from sharedpool.digests import digest_of

logger = logging.getLogger("sharedpool.broker")

# The first of the lock's two keys, which tells it from an application's own locks.
_NAMESPACE = int.from_bytes(b"shpl", "big")
_RETRY_S = 1.0

_TRY_SQL = "SELECT pg_try_advisory_lock(%s, %s)"
_SHARE_SQL = "SELECT pg_try_advisory_lock_shared(%s, %s)"
_UNLOCK_SQL = "SELECT pg_advisory_unlock(%s, %s)"
_UNSHARE_SQL = "SELECT pg_advisory_unlock_shared(%s, %s)"
_HOLDERS_SQL = """
SELECT lock.pid, coalesce(application_name, ''), coalesce(host(client_addr), 'this host')
FROM pg_locks AS lock LEFT JOIN pg_stat_activity USING (pid)
WHERE locktype = 'advisory' AND granted AND lock.pid <> pg_backend_pid()
  AND classid = %s AND objid = %s AND objsubid = 2
"""


class Leadership:
    """The lock of one scope, used in the control connection's thread.

    `call_soon(call)` has the loop call the ledger. `claimed`: the lock is wanted. `claim_at` is
    when `claim` is to be called again on the same connection.
    """

    def __init__(
        self,
        scope: str,
        instance: str,
        call_soon: Callable[[LedgerCall], None],
    ) -> None:
        self.application_name = f"sharedpool broker {instance}"
        digest = digest_of(scope.encode("utf-8", "surrogateescape"), 4)
        self._keys = (_NAMESPACE, int.from_bytes(digest, "big", signed=True))
        self._call_soon = call_soon
        self._rival = ""
        self._decided = False
        self.claimed = False
        self.claim_at = math.inf

    def claim(self, conn: connection, now: float) -> str:
        """Take the lock, or keep it on a new connection; return the other holders, if any.

        The ledger is told if that has changed. Raise psycopg2's errors.
        """
        rival = self._take(conn)
        # Two brokers that have both stepped back must not try again at the same time.
        self.claim_at = now + _RETRY_S * random.uniform(0.7, 1.3) if rival else math.inf
        if rival and rival != self._rival:
            text = (
                "another broker counts to this limit: %s; granting nothing until it ends (do the"
                " two have different XDG_RUNTIME_DIR, TMPDIR or lock files? Give all workers one"
                " broker=, or each group its own name=)"
            )
            logger.error(text, rival)
            self._call_soon(
                lambda ledger, now: ledger.takeover.outranked(
                    now, f"another broker counts to this limit: {rival}"
                )
            )
        elif self._rival and not rival:
            logger.warning("the other broker has ended: this one counts to the limit from now on")
            self._call_soon(lambda ledger, now: ledger.takeover.leads(now, after_another=True))
        elif not self._decided:
            self._call_soon(lambda ledger, now: ledger.takeover.leads(now, after_another=False))
        self._rival, self._decided = rival, True
        return rival

    def resign(self) -> None:
        """Record that the connection with the lock was closed: `claim` decides anew."""
        self._decided, self.claim_at = False, math.inf

    def cannot_ask(self) -> None:
        """Let the ledger begin without the lock: no other broker can reach the server either."""
        if self.claimed and not self._decided:
            self._decided = True
            self._call_soon(lambda ledger, now: ledger.takeover.leads(now, after_another=False))

    def _take(self, conn: connection) -> str:
        """Take the lock; return the other brokers that hold it, empty if there are none."""
        with conn.cursor() as cursor:

            def lock(query: str) -> bool:
                cursor.execute(query, self._keys)
                row = cursor.fetchone()
                return row is not None and bool(row[0])

            def others() -> str:
                # pg_locks shows keys as oid, without a sign.
                cursor.execute(_HOLDERS_SQL, [key % 2**32 for key in self._keys])
                rows = [row for row in cursor.fetchall() if row[1] != self.application_name]
                return ", ".join(
                    f"backend {pid} ({name or 'no name'}, from {address})"
                    for pid, name, address in rows
                )

            if rival := others():
                return rival
            if lock(_TRY_SQL):
                lock(_SHARE_SQL)
                lock(_UNLOCK_SQL)
            elif not lock(_SHARE_SQL):
                return self._rival or "one that has just come"
            if rival := others():  # it came between the two queries
                lock(_UNSHARE_SQL)
            return rival
