"""The two public pools: `get_conn` and `put_conn`.

A checkout that finds an idle connection touches nothing but this process's memory; `checkout.py` has the rest.
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
from sharedpool.worker import forks
from sharedpool.worker.checkout import checkout
from sharedpool.worker.connection.closed_flag import OPEN, SHUT
from sharedpool.worker.connection.closing import close_confirmed, cut
from sharedpool.worker.connection.connection import take_lease
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.state import CHECK_AFTER_S
from sharedpool.worker.connection.wrapper import as_user_sees, note_wrapper, unwrap
from sharedpool.worker.core.cache import Cache
from sharedpool.worker.core.lease import Lease
from sharedpool.worker.local_pool import LocalPool
from sharedpool.worker.location import BrokerLocation
from sharedpool.worker.mover import Mover
from sharedpool.worker.session import Session
from sharedpool.worker.settings import PoolConfig
from sharedpool.worker.stats import PoolStats, stats_of
from sharedpool.worker.waiting import ANSWER_LIMIT_S

IN_USE, IDLE = Phase.IN_USE, Phase.IDLE
STATUS_READY = extensions.STATUS_READY


class Pool:
    """What both pools are. Use `config_pool` to make one."""

    _one_thread = False
    # The fast path's: see `get_conn`. Shut, until there are local pool for which it may be open.
    _fast_path: Any = b"\0"
    _cache: Cache

    def __init__(self, config: PoolConfig, broker: BrokerLocation) -> None:
        self.config = config
        self.name = config.name
        self._broker = broker
        self._thread: int | None = None
        self._local = self._new_local()
        if not self._one_thread:
            self._allow_fast_path(self._local)
        forks.register(self)

    def _new_local(self) -> LocalPool:
        return LocalPool(self.config, self._broker, Session, Mover)

    def _allow_fast_path(self, local: LocalPool) -> None:
        """Allow the fast path, if nothing of the user's has to be called on it, and nothing noted."""
        config = self.config
        noted = config.debug_checkouts or config.disable_pooling or local.transient
        if not (config.check or config.user_reset or noted or local.disposed or local.retired):
            local.fast_path.set()
            self._fast_path, self._cache = local.fast_path.page, local.cache

    def start_afresh(self) -> None:
        """Forget, in a forked child, what the parent held (called by `forks`)."""
        parents, self._local = self._local, self._new_local()
        self._thread = None
        self._local.disposed = parents.disposed
        if parents.retired:
            self._local.retire()
        if not self._one_thread:
            self._allow_fast_path(self._local)

    # --- checkout

    def get_conn(self, key: Hashable = None, timeout: float | None = None) -> extensions.connection:
        """Check a connection out.

        `key`: the same key gives the same connection until it is returned. `timeout`: seconds to wait, first come
        first served over all processes; None is the pool's own `timeout`, 0 means not to wait. A connection that lies
        idle in this process costs no message and no query; else this blocks for a lease and a connect.

        Raise `PoolExhausted` (no wait asked for), `PoolTimeout`, `BrokerUnavailable`, `PoolClosed`, or what
        `psycopg2.connect` or a callback raised.
        """
        # The fast path, for most calls: an idle connection, and nothing to look after. Each step is safe without the
        # lock (`worker/core/cache.py`); the flag is shut in a forked child, after `release_all` and where a callback
        # must run.
        thread = get_ident()
        if self._fast_path[0] and key is None and (self._thread is None or self._thread == thread):
            lease: Any
            cache = self._cache
            try:
                lease = cache.idle.pop()
            except IndexError:
                began = (
                    monotonic()
                )  # a wait in the lane that was in vain is part of the caller's time
                if (
                    cache.moving[0]
                    and (came := self._local.take_in_lane(timeout, began)) is not None
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
                and not conn.get_transaction_status()  # idle: no statement that was under way has gone on since
            ):
                conn.sharedpool_closed_flag = OPEN
                conn.sharedpool_lent = lease
                lease.conn = None  # from here on the caller's reference is the only one
                cache.hits += 1
                return conn  # type: ignore[no-any-return] # `cast` is a call
            if (user_s := self._lend_wrapper(lease, conn, now)) is not None:
                return user_s
            return self._check_out(self._local, lease, timeout, now)
        local = self._check_caller()
        if key is not None and (lent := self._by_key(key)) is not None:
            return as_user_sees(lent)
        now = monotonic()
        conn = self._check_out(local, local.cache.take(now), timeout, now)
        return conn if key is None else self._keep_key(key, conn)

    def _lend_wrapper(
        self, lease: Lease, conn: PooledConnection, now: float
    ) -> extensions.connection | None:
        """Lend a wrapped connection the fast path: return what its user gets, or None when it must go the long one."""
        user_s = conn.sharedpool_wrapper
        if (
            user_s is None
            or lease.needs_configure
            or lease.idle_s > CHECK_AFTER_S
            or now >= lease.retire_at
        ):
            return None
        if conn.status != STATUS_READY or conn.get_transaction_status():
            return None
        conn.sharedpool_wrapper = (
            None  # it refers to the connection, which is to go with it when it is dropped
        )
        conn.sharedpool_closed_flag = OPEN
        conn.sharedpool_lent = lease
        lease.conn = None
        self._cache.hits += 1
        return cast(extensions.connection, user_s)

    def connect(self, *, timeout: float | None = None) -> extensions.connection:
        """Check out a connection whose `close()` checks it in: for what wants a function that connects.

        After that `close()` it is closed to its user, and then the next one's: keep no reference to it. Blocks and
        raises as `get_conn` does.
        """
        conn = self.get_conn(timeout=timeout)
        lease: Lease = cast(Any, conn).sharedpool_lease
        lease.at_close, lease.fast_checkin = self._put_closed, False
        return conn

    def _put_closed(self, conn: extensions.connection) -> None:
        with contextlib.suppress(PoolClosed):  # it is closed, as was wanted
            self.put_conn(conn)

    def _check_out(
        self, local: LocalPool, lease: Lease | None, timeout: float | None, now: float
    ) -> extensions.connection:
        return checkout(local, lease, self.config.timeout if timeout is None else timeout, now)

    def _own_local(self) -> LocalPool:
        """Return this process's local pool. A child whose fork Python did not see (uWSGI) must not touch its
        parent's.
        """
        if self._local.pid != os.getpid():
            forks.reset_after_fork()
            if self._local.pid != os.getpid():
                self.start_afresh()
        elif self._local.transient and not self._local.link and not forks.is_before_uwsgis_forks():
            self.start_afresh()  # the application is loaded, and served by this very process
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
                    f"pool {self.name!r} is a SimpleConnectionPool and belongs to one thread: for more, use"
                    " config_pool(pool_manager=ThreadedConnectionPool)"
                )
        return self._local

    def _by_key(self, key: Hashable) -> PooledConnection | None:
        self._local.reclaim(ANSWER_LIMIT_S)  # one that was dropped is not to be met again
        with self._local.lock:
            return self._keyed(key)

    def _keyed(self, key: Hashable) -> PooledConnection | None:
        """Return the connection that is checked out under `key`. The lock must be held."""
        lease = self._local.keys.get(key)
        conn = cast(
            "PooledConnection | None",
            lease.ref() if lease is not None and lease.ref is not None else None,
        )
        if conn is None or conn.sharedpool_finalized or conn.sharedpool_lease is not lease:
            return None
        return conn

    def _keep_key(self, key: Hashable, conn: extensions.connection) -> extensions.connection:
        lease: Lease = cast(Any, conn).sharedpool_lease
        with self._local.lock:
            other = self._keyed(key)
            if other is None:
                self._local.keys[key] = lease
                lease.key, lease.fast_checkin = key, False
                return conn
        self.put_conn(conn)  # another thread was faster with the same key
        return as_user_sees(other)

    # --- checkin

    def put_conn(
        self,
        conn: extensions.connection,
        key: Hashable = None,
        close: bool = False,
        fail_silently: bool = False,
    ) -> None:
        """Check a connection in.

        Roll back what is open, run `reset`, then cache it, hand it to a waiting thread, or close it and give its lease
        back when the broker has asked for one, when it is broken or too old, or with `close`. Then close what has been
        idle longer than `expiration`. Blocks for the rollback and for closes, not for the broker.

        Raise `PoolError` for a connection that is not checked out of this pool, `PoolClosed` when the pool is disposed
        of (the connection is closed all the same); `fail_silently` swallows both. What `reset` raised is raised here.
        """
        # The fast path, as in `get_conn`: it is clean. Whether somebody wants it is looked at when it lies there.
        if (
            self._fast_path[0]
            and key is None
            and not close
            and (self._thread is None or self._thread == get_ident())
        ):
            cache = self._cache
            user_s: Any = conn
            try:
                lease: Any = user_s.sharedpool_lent
                pooled = lease.ref()  # in a wrapper, if it has one; None when it is being collected
                laid = (
                    lease.cache is cache
                    and lease.fast_checkin
                    and (now := monotonic()) - lease.since <= CHECK_AFTER_S
                    and not pooled.get_transaction_status()  # idle
                    and pooled.status == STATUS_READY
                )
                if laid:
                    del (
                        pooled.sharedpool_lent
                    )  # in one step: of two threads that put it only one gets on
                    pooled.sharedpool_closed_flag = SHUT
                    if pooled is not conn:
                        note_wrapper(pooled, conn)
                    elif (
                        cache.moving[0]
                        and not cache.returns_due
                        and self._local.give_in_lane(lease, user_s, now)
                    ):
                        return
                    lease.conn, lease.phase, lease.since = pooled, IDLE, now
                    cache.idle.append(lease)
                    if not (
                        cache.returns_due
                        or cache.waiting
                        or cache.moving[0]
                        or now >= cache.next_scavenge_at
                    ):
                        return
            except AttributeError:
                laid = False  # not checked out, or no pool's at all: said below
            if laid:
                self._local.after_fast_checkin(lease, now)
                return
        if self._own_local().lock._is_owned() or _is_being_collected(conn):  # type: ignore[attr-defined]
            self.put_conn_later(
                conn
            )  # called by a finalizer, perhaps while this very thread was at the books
            return
        try:
            pooled, lease = self._claim(conn, key)
        except PoolError:
            if not fail_silently:
                raise
            return
        self._local.check_in(lease, pooled, ReleaseReason.CLOSED if close else None)

    def _claim(self, conn: extensions.connection, key: Hashable) -> tuple[PooledConnection, Lease]:
        """Take a checked-out connection's lease off it, so that no second checkin finds one; else say why not."""
        pooled = unwrap(conn)
        local = None if pooled is None else pooled.sharedpool_local
        if pooled is None or local is not self._local:
            if local is not None and local.pid != os.getpid():
                raise SharedPoolError(
                    f"pool {self.name!r}: this connection belongs to process {local.pid}, which opened it"
                )
            raise SharedPoolError(
                f"pool {self.name!r}: put_conn() of a connection that it did not lend out: {conn!r}"
            )
        if local.disposed:
            if (late := take_lease(pooled)) is None:
                close_confirmed([pooled])
            else:
                local.discard(late, pooled, ReleaseReason.CLOSED)
            raise PoolClosed(f"pool {self.name!r} is disposed: the connection was closed")
        if self._one_thread:
            self._check_caller()
        lease = cast("Lease | None", pooled.sharedpool_lease)
        if lease is not None and key is not None and lease.key != key:
            raise SharedPoolError(
                f"pool {self.name!r}: the connection was checked out with key {lease.key!r}, not {key!r}"
            )
        if lease is None or take_lease(pooled) is None:
            raise SharedPoolError(f"pool {self.name!r}: this connection was already put back")
        note_wrapper(pooled, conn)
        return pooled, lease

    @contextlib.contextmanager
    def connection(
        self, key: Hashable = None, *, timeout: float | None = None
    ) -> Iterator[extensions.connection]:
        """Lend a connection for a block: commit on success, roll back on any exception, return it always.

        Takes and raises what `get_conn` does.
        """
        conn = self.get_conn(key, timeout=timeout)
        try:
            yield conn
            if (owner := cast(PooledConnection, conn).sharedpool_pid) != os.getpid():
                raise psycopg2.InterfaceError(
                    f"pool {self.name!r}: the connection belongs to process {owner}, which opened it"
                )
            conn.commit()
        except BaseException as error:
            self.notice(conn, error)
            # A child leaves its parent's transaction alone.
            if not conn.closed and cast(PooledConnection, conn).sharedpool_pid == os.getpid():
                with contextlib.suppress(psycopg2.Error):  # the caller's own error says more
                    conn.rollback()
            raise
        finally:
            # A child that was forked inside the block unwinds it too: the connection is not its to return.
            self.put_conn(
                conn, fail_silently=cast(PooledConnection, conn).sharedpool_pid != os.getpid()
            )

    def notice(self, conn: extensions.connection, error: BaseException) -> None:
        """Look whether an error of a statement tells that the server fails over: then every process replaces its
        connections. `connection()` and `PgSimple` call this by themselves. Does not block.
        """
        self._own_local().notice(cast(PooledConnection, conn), error)

    def put_conn_later(self, conn: extensions.connection) -> None:
        """Check a connection in from a finalizer: takes no lock and does no I/O; the link's thread does the rest."""
        pooled = unwrap(conn)
        if pooled is None or pooled.sharedpool_lease is None or _is_being_collected(pooled):
            return  # collected in the same cycle: its own finalizer brings it back
        if pooled.sharedpool_pid == os.getpid() and pooled.sharedpool_local is not None:
            pooled.sharedpool_closed_flag = SHUT
            pooled.sharedpool_local.orphans.append(pooled)
            pooled.sharedpool_local.wake_link()

    # psycopg2.pool's names for the same calls.
    getconn = get_conn
    putconn = put_conn

    def closeall(self) -> None:
        """Close all connections: `release_all` under psycopg2.pool's name."""
        self.release_all()

    # --- scavenging and the end

    def purge_expired_connections(self) -> int:
        """Close what has been idle longer than `expiration`, or has outlived `max_lifetime`; return how many.

        Every `put_conn` does this too, and the broker sees to it in a process that never calls the pool again.
        """
        return self._own_local().purge()

    def close_idle(self) -> int:
        """Close all that lies idle in this process and return its leases; return how many. What is in use stays."""
        local = self._own_local()
        with local.lock:
            closing = local.cache.take_all_idle(monotonic())
        local.close(closing)
        return len(closing)

    @property
    def disposed(self) -> bool:
        """Whether `release_all` was called."""
        return self._local.disposed

    def release_all(self) -> None:
        """Close every connection of this process, those in use included, return all leases, and end the pool.

        Waiting threads get `PoolClosed`. Blocks until the backends are gone, at most some seconds. Raise `PoolClosed`
        when it was called before.
        """
        local = self._own_local()
        with local.lock:
            if local.disposed:
                raise PoolClosed(f"pool {self.name!r} is already disposed")
            local.fast_path.clear()
            local.disposed = True
            local.cache.stop_keeping()  # a checkin that is under way closes too
            link, registration = local.link, local.registration
            waiters = local.cache.waiters.fail(
                PoolClosed(f"pool {self.name!r} was disposed of while waiting")
            )
            closing = local.cache.take_all_idle(monotonic())
            in_use = [lease for lease in local.cache.leases.values() if lease.phase is Phase.IN_USE]
        for waiter in waiters:
            waiter.wake()
        if (wait_sockets := local.wait_sockets) is not None:
            wait_sockets.wake_all()
        local.reclaim(ANSWER_LIMIT_S)
        local.close(closing)
        self._cut(in_use)
        if link is not None and registration is not None:
            link.leave(registration)
        forks.forget(self)

    def _cut(self, leases: list[Lease]) -> None:
        """End what is checked out: in order where it is this thread's, else by its socket: its thread may be in it."""
        cutting: list[tuple[Lease, PooledConnection]] = []
        for lease in leases:
            conn = cast("PooledConnection | None", lease.ref() if lease.ref else None)
            if conn is None or take_lease(conn) is None:
                continue  # another thread is returning it
            mine = lease.thread == get_ident()
            if conn.closed or (
                mine and conn.get_transaction_status() != extensions.TRANSACTION_STATUS_ACTIVE
            ):
                self._local.discard(lease, conn, ReleaseReason.CLOSED)
            else:
                cutting.append((lease, conn))
        cut(conn for _, conn in cutting)
        for lease, conn in cutting:
            self._local.give_back(lease, ReleaseReason.CLOSED, gone=conn.sharedpool_gone)

    def retire(self) -> None:
        """Keep nothing idle from now on: a newer pool has taken this one's name in this process."""
        self._own_local().retire()

    # --- what the pool says of itself

    @property
    def max_conn(self) -> int:
        """The limit over all processes: what the broker enforces, once it has said so; until then what was asked."""
        return self._local.limit

    @property
    def expiration(self) -> float:
        """Seconds after which an idle connection is closed: what was asked, or the broker's own if that is shorter."""
        return self._local.cache.expiration_s

    def stats(self) -> PoolStats:
        """Return a snapshot of this process's part of the pool. Takes the lock for a moment."""
        return stats_of(self._own_local())

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"pool {self.name!r} cannot be pickled for another process: call config_pool() there too, as a module does"
            " that both import, and use get_pool()"
        )

    def __repr__(self) -> str:
        if self.disposed:
            return f"<{type(self).__name__} {self.name!r} disposed>"
        stats = self.stats()
        return (
            f"<{type(self).__name__} {self.name!r}: {stats.in_use} in use and {stats.idle} idle in this process,"
            f" limit {stats.max_conn} over all>"
        )


def _is_being_collected(conn: extensions.connection) -> bool:
    """Say whether the collector, having cleared all weak references to it, is about to run `conn`'s own finalizer."""
    lease = cast("Lease | None", getattr(conn, "sharedpool_lease", None))
    return lease is not None and lease.ref is not None and lease.ref() is None


class SimpleConnectionPool(Pool):
    """A shared pool for one thread of one process; another thread's call raises `PoolError`."""

    _one_thread = True


class ThreadedConnectionPool(Pool):
    """A shared pool for all threads of a process."""
