"""A checkout that the cache alone cannot serve: wait for a lease, connect, replace what is dead, run `check`.

Every way out, an exception raised in any line included, leaves the lease with exactly one owner: the cache, a waiting
waiter, or a connection object whose loss is noticed.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from typing import cast

import psycopg2
from msgspec import structs
from psycopg2.extensions import connection

from sharedpool.descriptors.available import FOR_A_CONNECTION, require
from sharedpool.errors import PoolClosed, PoolError
from sharedpool.wire.messages import START_UP_LIMIT_S, ReleaseReason
from sharedpool.wire.values import Phase
from sharedpool.worker import error_messages, greenlets
from sharedpool.worker.connection import closed_flag
from sharedpool.worker.connection.closing import abort
from sharedpool.worker.connection.connection import take_lease
from sharedpool.worker.connection.handover import can_move, parameters
from sharedpool.worker.connection.opening import connect, describe, take_duplicate
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.state import (
    CHECK_AFTER_S,
    is_alive,
    is_unused,
    role_of_server,
    settings_of,
)
from sharedpool.worker.connection.wrapper import detach, has_lost_wrapper, is_as_opened, wrap
from sharedpool.worker.core import callsite
from sharedpool.worker.core.lease import Lease, Waiter
from sharedpool.worker.local_pool import LocalPool
from sharedpool.worker.logs import logger
from sharedpool.worker.waiting import ANSWER_LIMIT_S, Wait


class Call:
    """One checkout under way: what it has taken and not given back when it is over is found (`Session.beat`)."""


def checkout(local: LocalPool, lease: Lease | None, wait_s: float, now: float) -> connection:
    """Return a connection that is ready for its user: in the idle `lease`'s slot, or in one that is waited for.

    It is the connection's wrapper, if it has one. Raise what `Pool.get_conn` raises.
    """
    call = Call()
    waiter = Waiter(_wake_nobody, now, call)
    try:
        if not isinstance(wait_s, int | float) or not wait_s >= 0:
            raise ValueError(f"timeout: must be 0 or more seconds, not {wait_s!r}")
        deadline = now + wait_s
        if lease is None:
            lease = _wait(local, waiter, wait_s, deadline)
        lease.waiter = weakref.ref(waiter)  # whose it is until its user has it
        while (
            reason := _reason_to_replace(
                waiter, lease, conn := cast("PooledConnection | None", lease.conn), now
            )
        ) is not None:
            # Never connected again under the old lease: its worker may have been frozen, the broker may have fenced it.
            if conn is None:
                local.give_back(lease, reason)
            else:
                local.discarded += 1
                if reason is ReleaseReason.BROKEN:
                    local.report_failover_sign(lease, "")
                local.discard(lease, conn, reason)
            lease = _wait(local, waiter, wait_s, deadline)
            lease.waiter = weakref.ref(waiter)
        if conn is not None:
            conn.sharedpool_closed_flag = closed_flag.OPEN
        if conn is None:
            conn = _open(local, lease, deadline if wait_s else None)
        elif lease.needs_configure:
            _configure_received(local, lease, conn)
        elif lease is waiter.lease:
            local.handed_on += 1
        else:
            local.hits += 1
        wrapped = conn.sharedpool_wrapper_ref is not None
        if wrapped and has_lost_wrapper(conn):
            wrap(conn, local.config.conninfo)
        if local.config.check:
            local.run_callback(local.config.check, lease, conn, "check")
        if local.disposed:
            raise PoolClosed(f"pool {local.config.name!r} was disposed of meanwhile")
        with local.lock:
            lease.phase = Phase.IN_USE  # one that was handed on was still its giver's
            lease.thread, lease.since = threading.get_ident(), time.monotonic()
            local.cache.timings.checked_out(lease.since - now)
            if local.cache.timings.choose(lease.since) or conn.sharedpool_touched:
                lease.fast_checkin = False
        if local.config.debug_checkouts:
            lease.stack = callsite.capture()
        users = detach(conn) if wrapped or conn.sharedpool_wrapper is not None else conn
        conn.sharedpool_lent = lease
        waiter.lease = None
        lease.conn = None  # from here on the caller's reference is the only one: dropped by an interrupt, it comes back
        return users
    except BaseException:
        local.errors += 1
        _abandon(local, waiter, lease)
        raise


def _wait(local: LocalPool, waiter: Waiter, wait_s: float, deadline: float) -> Lease:
    """Return a lease: an idle one after all, one handed on by another thread or process, or one the broker grants."""
    if logger.is_kept:  # a finalizer, for instance, which runs wherever there is garbage to collect
        raise error_messages.in_the_link(local.config.name)
    if greenlets.is_eventlets():
        raise error_messages.unsupported(local.config.name)
    if local.orphans or local.reclaim_lock.locked:
        local.reclaim(min(wait_s, 1000.0) if wait_s else ANSWER_LIMIT_S)
    local.locate_broker()
    if (lease := Wait(local, waiter, wait_s, deadline).wait()) is not None:
        return lease
    return _outcome(local, waiter, wait_s)


def _outcome(local: LocalPool, waiter: Waiter, wait_s: float) -> Lease:
    """Return the lease that a waiter was settled with, or raise."""
    if waiter.error is not None:
        raise waiter.error
    if waiter.denial is not None:
        raise error_messages.refused(local.config.name, waiter.denial, wait_s)
    if waiter.lease is None:
        raise AssertionError("bug: a ticket was woken without an outcome")
    return waiter.lease


def _open(local: LocalPool, lease: Lease, deadline: float | None) -> PooledConnection:
    """Connect for a lease; without success the lease is given back."""
    config = local.config
    timeout_s = None if deadline is None else max(0.0, deadline - time.monotonic())
    made: list[PooledConnection] = []
    began = time.monotonic()
    try:
        require(FOR_A_CONNECTION, f"pool {config.name!r}: a connection")
        conn = connect(config.conninfo, local.tag, timeout_s, made)
        conn.sharedpool_local = local
        local.deposit(lease, conn)
        backend = describe(conn)
        # A pooler's is not passed on: what makes it clean for others would take its name from it
        # (`broker/postgres/fencing.py`).
        movable = local.handover_enabled and backend.pooled is None and can_move(conn)
        if not movable:
            backend = structs.replace(backend, fixed=True)
        conn.sharedpool_made_with = parameters(conn)
        now = time.monotonic()
        if now > lease.connect_by + START_UP_LIMIT_S:
            raise PoolError(
                f"pool {config.name!r}: connecting took too long: its slot may be in use elsewhere by now"
            )
        # Jitter, so that connections opened together are not renewed together.
        lifetime = config.max_lifetime
        retire_at = now + lifetime * random.uniform(0.9, 1.1) if lifetime else float("inf")
        with local.lock:
            if local.disposed:
                raise PoolClosed(f"pool {config.name!r} was disposed of while connecting")
            local.cache.opened(lease, backend, retire_at, conn, now)
            local.cache.timings.created.add(now - began)
        local.wake_link()
        local.connects += 1
        lease.conn = conn
        lease.allow_fast_checkout(conn.sharedpool_wrapper is None)
        if config.configure:
            local.run_callback(config.configure, lease, conn, "configure")
        _note(conn)
        conn.sharedpool_server = role_of_server(conn)
        conn.sharedpool_movable = lease.movable = movable
        return conn
    except BaseException as error:
        if lease.phase is not Phase.CLOSING:
            reason = (
                ReleaseReason.FAILED if isinstance(error, psycopg2.Error) else ReleaseReason.CLOSED
            )
            if (
                made and made[0].sharedpool_witness >= 0
            ):  # it was open, even if it broke since: see it gone
                local.discard(lease, made[0], reason)
            elif not made or not made[0].dsn:  # interrupted before libpq was called
                local.give_back(lease, reason)
            elif made[0].closed:
                made[0].sharedpool_direct = lease.reached_directly or None  # else nobody knows
                local.not_opened(
                    lease, reason, local.diagnosis.of(made[0], error, deadline, lease.refused_with)
                )
            elif not isinstance(error, OSError):
                local.discard(lease, take_duplicate(made[0]), reason)
            else:
                abort(made[0])
                local.give_back(lease, reason, gone=False, closed=made[0].sharedpool_closed)
        raise


def _configure_received(local: LocalPool, lease: Lease, conn: PooledConnection) -> None:
    """Make a connection that came from another process this pool's own."""
    if not is_as_opened(conn):
        wrap(conn, local.config.conninfo)
    lease.needs_configure = False
    lease.allow_fast_checkout(conn.sharedpool_wrapper is None)
    if local.config.configure:
        local.run_callback(local.config.configure, lease, conn, "configure")
    if local.config.configure or conn.sharedpool_touched:
        _note(conn)


def _note(conn: PooledConnection) -> None:
    """Note what a checkin restores, and what must be the same when it moves."""
    conn.sharedpool_session, conn.sharedpool_touched = settings_of(conn), False
    conn.sharedpool_encoding = conn.get_parameter_status("client_encoding") or ""


def _reason_to_replace(
    waiter: Waiter, lease: Lease, conn: PooledConnection | None, now: float
) -> ReleaseReason | None:
    """Say why an idle connection must not be lent out, or a lease not be connected, if it must not."""
    if conn is None:  # the grant may have been on its way, or this process frozen, for any time
        return ReleaseReason.UNUSED if time.monotonic() > lease.connect_by else None
    if now >= lease.retire_at:
        return ReleaseReason.RETIRED
    if lease.needs_configure and lease is waiter.lease:
        return None  # it has come this moment, and nobody has met its object yet
    if closed_flag.is_closed_for_good(conn) or (
        lease.idle_s > CHECK_AFTER_S and not is_alive(conn)
    ):
        return ReleaseReason.BROKEN
    return (
        None if is_unused(conn) else ReleaseReason.CLOSED
    )  # somebody has gone on with it after its checkin


def _abandon(local: LocalPool, waiter: Waiter, lease: Lease | None) -> None:
    """Leave nothing behind of a checkout that failed or was interrupted."""
    with local.lock:
        other = local.cache.give_up(waiter, time.monotonic())
    if other is not None:
        other.wake()
    local.wake_link()
    if lease is not None and lease.phase is Phase.IN_USE and lease.conn is not None:
        # Open, but never handed out: back it goes.
        conn = cast(PooledConnection, lease.conn)
        take_lease(conn)
        # One that was interrupted before all was noted of it is not to be used.
        local.check_in(lease, conn, None if conn.sharedpool_session else ReleaseReason.CLOSED)
    local.end_link_if_unused()


def _wake_nobody() -> None:
    """Nobody waits on this waiter yet."""
