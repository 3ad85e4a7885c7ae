"""The two public pools: `get_conn` and `put_conn`.

A checkout that finds an idle connection touches nothing but this process's memory: the fast paths
are here. All other checkouts go to `checkout.py`, all other checkins to `local_pool.py`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable, Iterator
from threading import get_ident
from time import monotonic
from typing import Any, NoReturn, cast

import psycopg2
from psycopg2 import extensions

from sharedpool.errors import PoolClosed, PoolError, SharedPoolError
from sharedpool.wire.messages import ReleaseReason
from sharedpool.wire.values import Phase
from sharedpool.worker import claims, forks, keys
from sharedpool.worker.checkout import checkout, lend_wrapped
from sharedpool.worker.connection.closed_flag import OPEN, SHUT
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.state import CHECK_AFTER_S
from sharedpool.worker.connection.wrapper import as_user_sees, note_wrapper
from sharedpool.worker.core.cache import Cache
from sharedpool.worker.core.lease import Lease
from sharedpool.worker.disposal import dispose
from sharedpool.worker.local_pool import LocalPool
from sharedpool.worker.location import BrokerLocation
from sharedpool.worker.mover import Mover
from sharedpool.worker.session import Session
from sharedpool.worker.settings import PoolConfig
from sharedpool.worker.stats import PoolStats, stats_of

IN_USE, IDLE, STATUS_READY = Phase.IN_USE, Phase.IDLE, extensions.STATUS_READY


class Pool:
    """Base class of both pools. Use `config_pool` to make one."""

    _one_thread = False
    # The fast path's flag, `ForkSafeFlag.page`, and its cache. Shut and None before
    # `_allow_fast_path`.
    _fast_path: Any = b"\0"
    _cache: Cache | None = None

    def __init__(self, config: PoolConfig, broker: BrokerLocation) -> None:
        self.config = config
        self.name = config.name
        self._broker = broker
        self._local = self._start()
        forks.register(self)

    def _start(self) -> LocalPool:
        self._thread: int | None = None  # the one thread that a SimpleConnectionPool belongs to
        self._cache = None
        local = LocalPool(self.config, self._broker, Session, Mover)
        if not self._one_thread:
            self._allow_fast_path(local)
        return local

    def _allow_fast_path(self, local: LocalPool) -> None:
        """Open the fast path, unless a callback or a setting needs every checkout."""
        config = self.config
        called = config.check or config.user_reset
        recorded = config.debug_checkouts or config.disable_pooling or local.transient
        if not (called or recorded or local.disposed or local.retired):
            local.fast_path.set()
            self._fast_path, self._cache = local.fast_path.page, local.cache

    def start_afresh(self) -> None:
        """Forget the parent's connections, in a forked child (called by `forks`)."""
        parents, self._local = self._local, self._start()
        if parents.disposed:
            self._local.fast_path.clear()
            self._local.disposed = True
        if parents.retired:
            self._local.retire()

    # --- checkout

    def get_conn(self, key: Hashable = None, timeout: float | None = None) -> extensions.connection:
        """Check out a connection.

        `key`: the same key gives the same connection until it is returned. `timeout`: seconds to
        wait, first come first served over all processes. None is the pool's own, 0 means no wait.
        An idle connection of this process costs no message. Otherwise this blocks for a lease and
        perhaps a connect.

        Raise `PoolExhausted` (with `timeout=0`), `PoolTimeout`, `BrokerUnavailable`, `PoolClosed`,
        or an exception of `psycopg2.connect` or of a callback.
        """
        # The fast path, for most calls. It needs no lock, because each step is one of the
        # interpreter's: see `worker/core/cache.py`.
        # 1. The flag is open: this is no forked child, the pool is not disposed of, and no callback
        #    has to run.
        # 2. There is an idle connection. Popped, its lease is this thread's alone.
        # 3. It was idle for a moment only, so its socket need not be looked at, and it is ready.
        # The connection is the caller's once `lease.conn` is None. An interrupt before that loses a
        # lease with its connection, which the link finds; after that, the object's finalizer runs.
        thread = get_ident()
        if self._fast_path[0] and key is None and (self._thread is None or self._thread == thread):
            lease: Any
            cache: Any = self._cache
            try:
                lease = cache.idle.pop()
            except IndexError:
                began = monotonic()  # the wait in the lane counts, even if it was in vain
                if (
                    cache.moving_flag[0]
                    and (came := self._local.membership.take(timeout, began)) is not None
                ):
                    return came
                return self._check_out(self._local, None, timeout, began)
            now = monotonic()
            lease.idle_s = gap_s = now - lease.since
            lease.phase, lease.since, lease.thread = IN_USE, now, thread
            conn: Any = lease.conn
            if (
                gap_s <= CHECK_AFTER_S
                and now < lease.fast_checkout_until
                and conn.status == STATUS_READY
                and not conn.get_transaction_status()  # no late statement of its last user
            ):
                conn.sharedpool_closed_flag = OPEN
                conn.sharedpool_lent = lease
                lease.conn = None
                cache.hits += 1
                return conn  # type: ignore[no-any-return] # `cast` is a call
            if (wrapper := lend_wrapped(lease, conn, now)) is not None:
                cache.hits += 1
                return wrapper
            return self._check_out(self._local, lease, timeout, now)
        return self._get_slowly(key, timeout)

    def _get_slowly(self, key: Hashable, timeout: float | None) -> extensions.connection:
        local = self._check_caller()
        if key is not None and (lent := keys.lent(local, key)) is not None:
            return as_user_sees(lent)
        now = monotonic()
        conn = self._check_out(local, local.cache.take(now), timeout, now)
        if key is not None and (other := keys.record(local, key, conn)) is not None:
            self.put_conn(conn)  # another thread was faster with the same key
            return as_user_sees(other)
        return conn

    def connect(self, *, timeout: float | None = None) -> extensions.connection:
        """Check out a connection whose `close()` checks it in: for code that wants to connect.

        After `close()` keep no reference to it: the next user may have it. Blocks and raises as
        `get_conn` does.
        """
        conn = self.get_conn(timeout=timeout)
        lease: Lease = cast(Any, conn).sharedpool_lease
        lease.at_close, lease.fast_checkin = self._put_closed, False
        return conn

    def _put_closed(self, conn: extensions.connection) -> None:
        with contextlib.suppress(PoolClosed):  # then it was closed, as its user asked
            self.put_conn(conn)

    def _check_out(
        self, local: LocalPool, lease: Lease | None, timeout: float | None, now: float
    ) -> extensions.connection:
        return checkout(local, lease, self.config.timeout if timeout is None else timeout, now)

    def _own_local(self) -> LocalPool:
        """Return this process's local pool, also after a fork that Python did not see (uWSGI)."""
        if self._local.pid != os.getpid():
            forks.reset_after_fork()
            if self._local.pid != os.getpid():
                self.start_afresh()
        elif self._local.transient and not self._local.link and not forks.is_before_uwsgis_forks():
            self.start_afresh()  # the application is loaded, and this very process serves it
        return self._local

    def _check_caller(self) -> LocalPool:
        if self._own_local().disposed:
            raise PoolClosed(
                f"pool {self.name!r} is disposed: release_all() was called; configure a new one"
            )
        if self._one_thread:
            me = get_ident()
            if self._thread is None:
                self._thread = me
                self._allow_fast_path(self._local)
            elif self._thread != me:
                raise SharedPoolError(
                    f"pool {self.name!r} is a SimpleConnectionPool and belongs to one thread:"
                    " for several threads use config_pool(pool_manager=ThreadedConnectionPool)"
                )
        return self._local

    # --- checkin

    def put_conn(
        self,
        conn: extensions.connection,
        key: Hashable = None,
        close: bool = False,
        fail_silently: bool = False,
    ) -> None:
        """Check in a connection.

        Roll back an open transaction and run `reset`. Then cache the connection, hand it to a
        waiting thread or process, or close it: if it is broken or too old, or with `close`. Also
        close the connections that were idle longer than `expiration`. Blocks for the rollback and
        for closes, not for the broker.

        Raise `PoolError` for a connection that is not checked out of this pool, and `PoolClosed` if
        the pool is disposed of (the connection is closed all the same); `fail_silently` swallows
        both. An exception of `reset` is raised here.
        """
        # The fast path, as in `get_conn`, but its flag is read only before others get a connection:
        # a disposed pool has taken the lease off, one with a callback has no `_cache`, and a child
        # of a fork unseen lays it idle in a copy of its parent's cache, from which nobody takes.
        # 1. The connection is this pool's, was out for a moment only, and is clean.
        # 2. `del` takes the lease off it. Of two threads that put it back one gets an error.
        # 3. It is laid idle.
        # 4. Only then is it looked whether anybody wants it, in this process or in the lane. A
        #    waiter that comes earlier is seen here, and one that comes later sees the idle
        #    connection.
        if key is None and not close and (self._thread is None or self._thread == get_ident()):
            cache: Any = self._cache
            user_s: Any = conn
            try:
                lease: Any = user_s.sharedpool_lent
                pooled = lease.ref()  # may be in a wrapper; None while it is being collected
                laid = (
                    lease.cache is cache
                    and lease.fast_checkin
                    and (now := monotonic()) - (since := lease.since) <= CHECK_AFTER_S
                    and not pooled.get_transaction_status()  # idle
                    and pooled.status == STATUS_READY
                )
                if laid:
                    del pooled.sharedpool_lent
                    pooled.sharedpool_closed_flag = SHUT
                    if pooled is not conn:
                        note_wrapper(pooled, conn)
                    lease.conn, lease.phase, lease.since = pooled, IDLE, now
                    cache.idle.append(lease)
                    if not (
                        cache.returns_due
                        or cache.waiting
                        or cache.moving_flag[0]
                        or now >= cache.next_scavenge_at
                    ):
                        return
            except AttributeError:
                laid = False  # not checked out, or no pool's at all: `_claim` raises
            if laid and (local := self._own_local()).cache is cache:  # else it is the parent's
                local.after_fast_checkin(lease, now, since if pooled is conn else None)
                return
        local = self._own_local()
        if local.lock._is_owned() or claims.is_being_collected(conn):  # type: ignore[attr-defined]
            self.put_conn_later(conn)  # this is a finalizer, and may have interrupted this thread
            return
        try:
            pooled, lease = self._claim(conn, key)
        except PoolError:
            if not fail_silently:
                raise
            return
        local.check_in(lease, pooled, ReleaseReason.CLOSED if close else None)

    def _claim(self, conn: extensions.connection, key: Hashable) -> tuple[PooledConnection, Lease]:
        """Take a connection for a checkin; raise `PoolError` if it cannot be checked in."""
        pooled = claims.own(self._local, conn)
        claims.refuse_late(self._local, pooled)
        if self._one_thread:
            self._check_caller()
        lease = claims.take(self._local, pooled, key)
        note_wrapper(pooled, conn)
        return pooled, lease

    @contextlib.contextmanager
    def connection(
        self, key: Hashable = None, *, timeout: float | None = None
    ) -> Iterator[extensions.connection]:
        """Lend a connection for a block: commit, or roll back on an exception, and check it in.

        Arguments and exceptions are those of `get_conn`.
        """
        conn = self.get_conn(key, timeout=timeout)
        owner = cast(PooledConnection, conn).sharedpool_pid
        try:
            yield conn
            if owner != os.getpid():
                text = "pool %r: the connection belongs to process %d, which opened it"
                raise psycopg2.InterfaceError(text % (self.name, owner))
            conn.commit()
        except BaseException as error:
            self.notice(conn, error)
            # A forked child leaves its parent's transaction alone.
            if not conn.closed and owner == os.getpid():
                with contextlib.suppress(psycopg2.Error):  # the caller's own error says more
                    conn.rollback()
            raise
        finally:
            # A child that was forked inside the block leaves it too, with its parent's connection.
            self.put_conn(conn, fail_silently=owner != os.getpid())

    def notice(self, conn: extensions.connection, error: BaseException) -> None:
        """Report the error of a statement: it may be a sign of a failover. Does not block.

        `connection()` and `PgSimple` call this themselves.
        """
        self._own_local().notice(cast(PooledConnection, conn), error)

    def put_conn_later(self, conn: extensions.connection) -> None:
        """Check in a connection from a finalizer: the link's thread does it. No lock, no I/O."""
        claims.defer(conn)

    # psycopg2.pool's names for the same calls.
    getconn = get_conn
    putconn = put_conn

    def closeall(self) -> None:
        """Close all connections: psycopg2.pool's name for `release_all`."""
        self.release_all()

    # --- scavenging and the end

    def purge_expired_connections(self) -> int:
        """Close the connections that were idle too long or have lived too long; return how many.

        Every `put_conn` does this too, and the broker sees to it in processes that rest.
        """
        return self._own_local().purge()

    def close_idle(self) -> int:
        """Close the idle connections of this process; return how many."""
        return self._own_local().close_idle()

    @property
    def disposed(self) -> bool:
        """Whether `release_all` was called."""
        return self._local.disposed

    def release_all(self) -> None:
        """Close every connection of this process, those in use included, and end the pool.

        Waiting threads get `PoolClosed`, and so does a second call. Blocks until the backends are
        gone, at most some seconds.
        """
        dispose(self._own_local())
        forks.forget(self)

    def retire(self) -> None:
        """Keep nothing idle from now on: a newer pool of this process has the same name."""
        self._own_local().retire()

    @property
    def max_conn(self) -> int:
        """The limit over all processes; the requested one until the broker has named its own."""
        return self._local.limit

    @property
    def expiration(self) -> float:
        """Seconds after which an idle connection is closed. The broker may have shortened them."""
        return self._local.cache.expiration_s

    def stats(self) -> PoolStats:
        """Return a snapshot of this process's part of the pool. Takes the lock for a moment."""
        return stats_of(self._own_local())

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"pool {self.name!r} cannot be pickled for another process: call config_pool() there"
            " too, in a module that both import, and use get_pool()"
        )

    def __repr__(self) -> str:
        if self.disposed:
            return f"<{type(self).__name__} {self.name!r} disposed>"
        stats = self.stats()
        return (
            f"<{type(self).__name__} {self.name!r}: {stats.in_use} in use and {stats.idle} idle"
            f" in this process, limit {stats.max_conn} over all>"
        )


class SimpleConnectionPool(Pool):
    """A shared pool for one thread of one process; another thread's call raises `PoolError`."""

    _one_thread = True


class ThreadedConnectionPool(Pool):
    """A shared pool for all threads of a process."""
