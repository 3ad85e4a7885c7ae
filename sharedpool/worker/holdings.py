"""All that one process holds of a pool: cache, lock, line to the broker, and the I/O for what the cache decides.

A forked child gets new holdings; the parent's stay the parent's. The lock is held for bookkeeping only, never across
I/O or a user's callback.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import cast

import psycopg2
from psycopg2.extensions import TRANSACTION_STATUS_IDLE

from sharedpool.errors import BrokerUnavailable
from sharedpool.wire.messages import (
    PROTOCOL_VERSION,
    Ack,
    Bye,
    Deny,
    Gone,
    Grant,
    Hello,
    Phase,
    PoolSpec,
    Recall,
    ReleaseReason,
    Stale,
    Token,
    ToWorker,
    Welcome,
)
from sharedpool.worker import forks
from sharedpool.worker.cache import Cache
from sharedpool.worker.connection import (
    PooledConnection,
    clean,
    close_confirmed,
    cut,
    dead_end,
    disown,
    turned_read_only,
)
from sharedpool.worker.desk import Desk
from sharedpool.worker.lease import CLOSING_LIMIT_S, Closing, Lease, Ticket
from sharedpool.worker.link import Link
from sharedpool.worker.settings import Callback, PoolConfig

logger = logging.getLogger("sharedpool.worker")

READ_ONLY = "25006"
# SQLSTATEs by which a server says that it is read-only, goes down, or has just come up.
FAILOVER = frozenset({READ_ONLY, "57P01", "57P02", "57P03"})
BROKEN = 2  # psycopg2's `closed` of a connection that an error ended


class Holdings:
    """One process's part of a pool. Methods under "the link's thread" are called by the link."""

    def __init__(self, config: PoolConfig, address: str, start_broker: Callable[[str], None] | None) -> None:
        self.config = config
        self.pid = os.getpid()
        self.lock = threading.RLock()  # only so that a finalizer can tell that its own thread holds it
        self.cache = Cache(config.expiration)
        self.cache.keep_idle = self.cache.hand_on = not config.disable_pooling
        self.keys: dict[Hashable, Lease] = {}
        self.orphans: deque[PooledConnection] = deque()
        self.limit = config.max_conn
        self.disposed = self.retired = False
        self.hits = self.connects = self.handed_on = self.discarded = self.errors = 0
        self.released: dict[ReleaseReason, int] = dict.fromkeys(ReleaseReason, 0)
        self.link: Link | None = None
        self.desk = Desk()
        self.tag = f"sharedpool {config.name}"  # until the broker has said its own
        self._reclaiming = threading.RLock()  # held across I/O; a user's reset() may come back to it
        self._dead_end = dead_end()
        self._address = address
        self._start_broker = start_broker
        self._epoch: int | None = None
        self._title = _utf8(os.path.basename(sys.argv[0]) if sys.argv else "") or "python"

    # --- I/O for the cache's decisions

    def take_back(self, lease: Lease, conn: PooledConnection, verdict: ReleaseReason | None) -> None:
        """Check a connection in: clean it, reset it, then cache, hand on or close it; scavenge.

        Raise what `reset` raised, after everything is in order.
        """
        error: BaseException | None = None
        if verdict is None:
            try:
                if not clean(conn):
                    verdict = ReleaseReason.BROKEN
                    if conn.closed == BROKEN:
                        self.trouble(lease, "")
                elif conn.sharedpool_erred and turned_read_only(conn):
                    verdict = ReleaseReason.STALE
                    self.trouble(lease, READ_ONLY)
                elif self.config.reset:
                    self.config.reset(conn)
                    verdict = None if is_clean(self.config.name, "reset", conn) else ReleaseReason.BROKEN
            except BaseException as caught:
                verdict, error = ReleaseReason.BROKEN, caught
        now = time.monotonic()
        closing: list[Closing] = []
        with self.lock:
            if lease.key is not None:
                if self.keys.get(lease.key) is lease:
                    del self.keys[lease.key]
                lease.key = None
            outcome = self.cache.checkin(lease, conn, now, verdict)
            if self.cache.idle:
                closing = self.cache.expire(now)
        if outcome is not None:
            if isinstance(outcome, Closing):
                closing.append(outcome)
                self.discarded += outcome.reason is ReleaseReason.BROKEN
            else:
                outcome.wake()
            self.signal()
        if closing:
            self.close(closing)
        if error is not None:
            raise error

    def call_back(self, callback: Callback, lease: Lease, conn: PooledConnection, name: str) -> None:
        """Run a user's callback; one that raises, or leaves a transaction open, costs the connection."""
        try:
            callback(conn)
            is_clean(self.config.name, name, conn)
        except BaseException:
            self.discarded += 1
            self.discard(lease, conn, ReleaseReason.BROKEN)
            raise

    def discard(self, lease: Lease, conn: PooledConnection, reason: ReleaseReason) -> None:
        """Close one connection and give its lease back."""
        with self.lock:
            closing = self.cache.close(lease, conn, reason, time.monotonic())
        self.close([closing])

    def close(self, closing: Iterable[Closing]) -> None:
        """Close connections, see them gone, give their leases back."""
        decided = [(each, cast(PooledConnection, each.lease.conn)) for each in closing]
        if not decided:
            return
        try:
            close_confirmed([conn for _, conn in decided])
        except BaseException:
            for each, _ in decided:  # interrupted: the link finishes it at its next heartbeat
                each.lease.since -= CLOSING_LIMIT_S
            raise
        with self.lock:
            for each, conn in decided:
                self.cache.closed(each.lease, each.reason, gone=conn.sharedpool_gone)
                self.released[each.reason] += 1
        self.signal()

    def give_back(self, lease: Lease, reason: ReleaseReason, *, gone: bool = True, error: str = "") -> None:
        """Give back a lease that has no connection here; `gone` False when one may be left on the server.

        `error`: why it could not be opened, if that concerns every worker.
        """
        with self.lock:
            self.cache.closed(lease, reason, gone=gone, error=error)
        self.signal()

    def deposit(self, lease: Lease, conn: PooledConnection) -> None:
        """Hand in a duplicate of a connection's socket at the broker's desk, if that was not done."""
        if not lease.deposited and self.link is not None:
            lease.deposited = self.desk.deposit(self.link.identity, lease.token, conn)

    def trouble(self, lease: Lease, code: str) -> None:
        """Tell the broker that a connection saw the server fail over (SQLSTATE `code`), or was found dead ("")."""
        with self.lock:
            self.cache.trouble(lease, code)
        self.signal()

    def notice(self, conn: PooledConnection, error: BaseException) -> None:
        """Look whether what a user's statement raised tells that the server fails over."""
        code, lease = getattr(error, "pgcode", None), conn.sharedpool_lease
        if code in FAILOVER and lease is not None:
            self.trouble(lease, code)

    def reclaim(self, limit_s: float = -1, *, thorough: bool = True) -> None:
        """Check in what its users dropped without a `put_conn`.

        When this returns, no other thread is at it either, unless `limit_s` seconds were too short for that. Not
        `thorough`: run no user's code and no rollback (the link must keep its heartbeat), close what would need them.
        """
        if not self._reclaiming.acquire(timeout=limit_s):
            return
        try:
            while self.orphans:
                conn = self.orphans.popleft()
                lease = conn.__dict__.pop("sharedpool_lease", None)
                if lease is None:
                    continue
                keep = not self.disposed and not conn.sharedpool_finalized and (thorough or self._rests(conn))
                try:
                    self.take_back(lease, conn, None if keep else ReleaseReason.CLOSED)
                except Exception:
                    logger.exception("pool %r: reset() failed for a connection its user dropped", self.config.name)
        finally:
            self._reclaiming.release()

    def _rests(self, conn: PooledConnection) -> bool:
        return self.config.reset is None and conn.get_transaction_status() == TRANSACTION_STATUS_IDLE

    def purge(self) -> int:
        """Close what has been idle or has lived too long; return how many."""
        with self.lock:
            closing = self.cache.expire(time.monotonic())
        self.close(closing)
        return len(closing)

    def retire(self) -> None:
        """Keep nothing idle from now on; the link ends with the last lease."""
        with self.lock:
            self.retired = True
            self.cache.keep_idle = False
            closing = self.cache.drain(time.monotonic())
        self.close(closing)
        self.signal()

    def signal(self) -> None:
        """Have the link send what is in the outbox."""
        if self.link is not None:
            self.link.wake()

    def ensure_link(self) -> Link:
        """Return the link, started. The lock is held; starting a thread is all this does."""
        if self.link is None:
            start, address = self._start_broker, self._address
            self.link = Link(self, address, self.cache.out, None if start is None else lambda: start(address))
            forks.hold(self)
            forks.release_at_child_exit()
        if not self.link.running:  # an interrupt may have come between the two
            self.link.start()
        return self.link

    def disown(self) -> None:
        """In a forked child: make every inherited connection harmless. Takes no lock: its holder is not here."""
        for lease in list(self.cache.leases.values()):
            conn = lease.conn or (lease.ref() if lease.ref else None)
            if conn is not None:
                disown(cast(PooledConnection, conn), self._dead_end)
        self.desk.close()
        if self.link is not None:
            self.link.disown()

    # --- the link's thread

    def hello(self) -> Hello:
        """Compose the registration."""
        config, now = self.config, time.monotonic()
        spec = PoolSpec(
            config.name,
            config.max_conn,
            int(config.expiration * 1000),
            int((config.max_checkout or 0) * 1000),
            str(config.conninfo.identity()),
            config.max_waiting or 0,
        )
        with self.lock:
            leases, seen = self.cache.register(now, thread_names())
        return Hello(PROTOCOL_VERSION, self.pid, socket.gethostname(), self._title, spec, leases, seen)

    def bye(self) -> Bye:
        """Compose the last message."""
        with self.lock:
            return self.cache.farewell()

    def beat(self) -> None:
        """Scavenge and queue a heartbeat."""
        self.reclaim(0, thorough=False)
        self.purge()
        now = time.monotonic()
        with self.lock:
            lost = self.cache.lost(now)
            unfinished = self.cache.unfinished(now)
            for lease in lost:
                if lease.conn is None:
                    self.cache.closed(lease, ReleaseReason.CLOSED, gone=lease.ref is None)
            self.cache.out.append(self.cache.renewal(now, thread_names()))
        self._deposit_all()
        for lease in lost:
            logger.warning("pool %r: the connection of lease %s was lost unreturned", self.config.name, lease.token)
            if lease.conn is not None:
                self.discard(lease, cast(PooledConnection, lease.conn), ReleaseReason.CLOSED)
        self.close(unfinished)

    def receive(self, message: ToWorker) -> None:
        """Act on a message from the broker."""
        if isinstance(message, Recall):
            self.reclaim(0, thorough=False)  # what its user has dropped may serve another
        now = time.monotonic()
        ticket: Ticket | None = None
        closing: list[Closing] = []
        with self.lock:
            match message:
                case Welcome():
                    closing = self.cache.welcomed(message.epoch, message.generation, now)
                case Stale():
                    closing = self.cache.renew_generation(message.generation, now)
                case Ack():
                    self.cache.acknowledged(message.gone)
                    closing = self.cache.renew_generation(message.generation, now)
                case Grant():
                    ticket = self.cache.granted(message, now)
                case Deny():
                    ticket = self.cache.denied(message)
                case Recall():
                    closing = self.cache.recalled(message, now, thread_names())
        if ticket is not None:
            ticket.wake()
        if closing:
            self.signal()
            self.close(closing)
        if isinstance(message, Welcome):
            self._welcomed(message)
        elif isinstance(message, Ack):
            self._revoke(message.revoked)
        elif isinstance(message, Gone):
            self._ended(message.tokens)

    def _welcomed(self, welcome: Welcome) -> None:
        name, asked = self.config.name, self.config.max_conn
        if self._epoch is None and welcome.max_conn != asked:
            text = "pool %r: max_conn=%d was asked for, %d is enforced (set by the pool's first user or the launcher)"
            logger.warning(text, name, asked, welcome.max_conn)
        if self._epoch not in (None, welcome.epoch):
            logger.info("pool %r: registered with a new broker (epoch %d)", name, welcome.epoch)
        self._epoch = welcome.epoch
        self.limit = welcome.max_conn
        self.cache.expiration_s = min(self.config.expiration, welcome.expiration_ms / 1000)
        self.tag = welcome.tag
        self._revoke(welcome.revoked)
        self.desk.open(welcome.desk)
        with self.lock:
            for lease in self.cache.leases.values():
                lease.deposited = False
        self._deposit_all()

    def _deposit_all(self) -> None:
        """Hand in what is not at the desk: after a restart of the broker, or when the line was full."""
        with self.lock:
            held = [
                (lease, conn)
                for lease in self.cache.leases.values()
                if not lease.deposited and (conn := lease.conn or (lease.ref() if lease.ref else None)) is not None
            ]
        for lease, conn in held:
            self.deposit(lease, cast(PooledConnection, conn))

    def _ended(self, tokens: list[Token]) -> None:
        """Drop leases whose backends the broker has seen to end: what is idle will not be lent out."""
        for token in tokens:
            with self.lock:
                lease = self.cache.ended(token)
                if lease is not None and lease.phase is Phase.IDLE:
                    self.cache.trouble(lease, "")
            if lease is not None:
                logger.info("pool %r: the backend of lease %s has ended", self.config.name, token)
                if lease.conn is not None:
                    close_confirmed([cast(PooledConnection, lease.conn)])
                    self.discarded += 1

    def _revoke(self, tokens: list[Token]) -> None:
        """Drop leases that the broker has taken away: their backends are gone or going."""
        for token in tokens:
            with self.lock:
                lease = self.cache.forget(token)
            if lease is not None:
                logger.warning("pool %r: the broker has taken lease %s away", self.config.name, token)
                conn = lease.conn or (lease.ref() if lease.ref else None)
                if conn is not None:
                    cut([cast(PooledConnection, conn)], limit_s=0)

    @property
    def line(self) -> socket.socket | None:
        """The line to the desk."""
        return self.desk.line

    def done(self) -> bool:
        """Say whether the pool is over and nothing is held or asked for: then this link is not its link any more."""
        with self.lock:
            over = (self.disposed or self.retired) and not self.cache.leases and not self.cache.waiting
            if over:
                self.link = None
            return over

    def ended(self) -> None:
        """Note that the link's thread ends."""
        self.desk.close()
        if self.link is None:
            forks.let_go(self)

    def unreachable(self, error: Exception) -> None:
        """Tell the waiting threads that the broker refuses, or cannot be had."""
        if not isinstance(error, BrokerUnavailable):
            error = BrokerUnavailable(f"pool {self.config.name!r}: {error}")
        with self.lock:
            tickets = self.cache.fail(error)
        for ticket in tickets:
            ticket.wake()


def is_clean(pool: str, callback: str, conn: PooledConnection) -> bool:
    """Say whether a callback left the connection open; raise when it left a transaction open on it."""
    if conn.closed:
        return False
    if conn.get_transaction_status() != TRANSACTION_STATUS_IDLE:
        raise psycopg2.ProgrammingError(
            f"pool {pool!r}: {callback}() left a transaction open on the connection: commit or roll back in it"
        )
    return True


def thread_names() -> dict[int, str]:
    """Return the names of this process's threads by identifier."""
    return {thread.ident: _utf8(thread.name) for thread in threading.enumerate() if thread.ident is not None}


def _utf8(text: str) -> str:
    """Return `text` as it can go on the wire: file names need not be UTF-8."""
    return text.encode("utf-8", "replace").decode()
