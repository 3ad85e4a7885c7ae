"""A checkout that the cache alone cannot serve: wait for a lease, connect, replace what is dead, run `check`.

Every way out, an exception raised in any line included, leaves the lease with exactly one owner: the cache, a waiting
ticket, or a connection object whose loss is noticed.
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

from sharedpool.descriptors.available import FOR_A_CONNECTION, make_sure_of
from sharedpool.errors import PoolClosed, PoolError
from sharedpool.wire.messages import START_UP_LIMIT_S, Phase, ReleaseReason
from sharedpool.worker import error_messages, greenlets
from sharedpool.worker.connection import closed_flag
from sharedpool.worker.connection.closing import abort
from sharedpool.worker.connection.connection import (
    CHECK_AFTER_S,
    bear_witness,
    connect,
    describe,
    is_alive,
    rests,
    server_of,
    session_of,
    take_lease,
)
from sharedpool.worker.connection.handover import can_move, parameters
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.wrapper import is_as_opened, lost, take_off, wrap
from sharedpool.worker.core import callsite
from sharedpool.worker.core.lease import Lease, Ticket
from sharedpool.worker.local_pool import Holdings
from sharedpool.worker.logs import logger
from sharedpool.worker.waiting import ANSWER_LIMIT_S, Wait


class Call:
    """One checkout under way: what it has taken and not given back when it is over is found (`Session.beat`)."""


def checkout(holdings: Holdings, lease: Lease | None, wait_s: float, now: float) -> connection:
    """Return a connection that is ready for its user: in the idle `lease`'s slot, or in one that is waited for.

    It is the connection's wrapper, if it has one. Raise what `Pool.get_conn` raises.
    """
    call = Call()
    ticket = Ticket(_nobody, now, call)
    try:
        if not isinstance(wait_s, int | float) or not wait_s >= 0:
            raise ValueError(f"timeout: must be 0 or more seconds, not {wait_s!r}")
        deadline = now + wait_s
        if lease is None:
            lease = _wait(holdings, ticket, wait_s, deadline)
        lease.ticket = weakref.ref(ticket)  # whose it is until its user has it
        while (worn := _worn(ticket, lease, conn := cast("PooledConnection | None", lease.conn), now)) is not None:
            # Never connected again under the old lease: its worker may have been frozen, the broker may have fenced it.
            if conn is None:
                holdings.give_back(lease, worn)
            else:
                holdings.discarded += 1
                if worn is ReleaseReason.BROKEN:
                    holdings.trouble(lease, "")
                holdings.discard(lease, conn, worn)
            lease = _wait(holdings, ticket, wait_s, deadline)
            lease.ticket = weakref.ref(ticket)
        if conn is not None:
            conn.sharedpool_gate = closed_flag.OPEN
        if conn is None:
            conn = _open(holdings, lease, deadline if wait_s else None)
        elif lease.fresh:
            _welcome(holdings, lease, conn)
        elif lease is ticket.lease:
            holdings.handed_on += 1
        else:
            holdings.hits += 1
        wrapped = conn.sharedpool_wrapper_ref is not None
        if wrapped and lost(conn):
            wrap(conn, holdings.config.conninfo)
        if holdings.config.check:
            holdings.call_back(holdings.config.check, lease, conn, "check")
        if holdings.disposed:
            raise PoolClosed(f"pool {holdings.config.name!r} was disposed of meanwhile")
        with holdings.lock:
            lease.phase = Phase.IN_USE  # one that was handed on was still its giver's
            lease.thread, lease.since = threading.get_ident(), time.monotonic()
            holdings.cache.times.checked_out(lease.since - now)
            if holdings.cache.times.choose(lease.since) or conn.sharedpool_touched:
                lease.plain = False
        if holdings.config.debug_checkouts:
            lease.stack = callsite.capture()
        users = take_off(conn) if wrapped or conn.sharedpool_wrapper is not None else conn
        conn.sharedpool_lent = lease
        ticket.lease = None
        lease.conn = None  # from here on the caller's reference is the only one: dropped by an interrupt, it comes back
        return users
    except BaseException:
        holdings.errors += 1
        _abandon(holdings, ticket, lease)
        raise


def _wait(holdings: Holdings, ticket: Ticket, wait_s: float, deadline: float) -> Lease:
    """Return a lease: an idle one after all, one handed on by another thread or process, or one the broker grants."""
    if logger.is_kept:  # a finalizer, for instance, which runs wherever there is garbage to collect
        raise error_messages.in_the_link(holdings.config.name)
    if greenlets.is_eventlets():
        raise error_messages.unsupported(holdings.config.name)
    if holdings.orphans or holdings.reclaiming.busy:
        holdings.reclaim(min(wait_s, 1000.0) if wait_s else ANSWER_LIMIT_S)
    holdings.locate_broker()
    if (lease := Wait(holdings, ticket, wait_s, deadline).wait()) is not None:
        return lease
    return _outcome(holdings, ticket, wait_s)


def _outcome(holdings: Holdings, ticket: Ticket, wait_s: float) -> Lease:
    """Return the lease that a ticket was settled with, or raise."""
    if ticket.error is not None:
        raise ticket.error
    if ticket.denial is not None:
        raise error_messages.refused(holdings.config.name, ticket.denial, wait_s)
    if ticket.lease is None:
        raise AssertionError("bug: a ticket was woken without an outcome")
    return ticket.lease


def _open(holdings: Holdings, lease: Lease, deadline: float | None) -> PooledConnection:
    """Connect for a lease; without success the lease is given back."""
    config = holdings.config
    timeout_s = None if deadline is None else max(0.0, deadline - time.monotonic())
    made: list[PooledConnection] = []
    began = time.monotonic()
    try:
        make_sure_of(FOR_A_CONNECTION, f"pool {config.name!r}: a connection")
        conn = connect(config.conninfo, holdings.tag, timeout_s, made)
        conn.sharedpool_holdings = holdings
        holdings.deposit(lease, conn)
        backend = describe(conn)
        # A pooler's is not passed on: what makes it clean for others would take its name from it
        # (`broker/postgres/fencing.py`).
        movable = holdings.handover and backend.pooled is None and can_move(conn)
        if not movable:
            backend = structs.replace(backend, fixed=True)
        conn.sharedpool_made_with = parameters(conn)
        now = time.monotonic()
        if now > lease.connect_by + START_UP_LIMIT_S:
            raise PoolError(f"pool {config.name!r}: connecting took too long: its slot may be in use elsewhere by now")
        # Jitter, so that connections opened together are not renewed together.
        lifetime = config.max_lifetime
        retire_at = now + lifetime * random.uniform(0.9, 1.1) if lifetime else float("inf")
        with holdings.lock:
            if holdings.disposed:
                raise PoolClosed(f"pool {config.name!r} was disposed of while connecting")
            holdings.cache.opened(lease, backend, retire_at, conn, now)
            holdings.cache.times.created.add(now - began)
        holdings.signal()
        holdings.connects += 1
        lease.conn = conn
        lease.lend_as_is(conn.sharedpool_wrapper is None)
        if config.configure:
            holdings.call_back(config.configure, lease, conn, "configure")
        _note(conn)
        conn.sharedpool_server = server_of(conn)
        conn.sharedpool_movable = lease.movable = movable
        return conn
    except BaseException as error:
        if lease.phase is not Phase.CLOSING:
            reason = ReleaseReason.FAILED if isinstance(error, psycopg2.Error) else ReleaseReason.CLOSED
            if made and made[0].sharedpool_witness >= 0:  # it was open, even if it broke since: see it gone
                holdings.discard(lease, made[0], reason)
            elif not made or not made[0].dsn:  # interrupted before libpq was called
                holdings.give_back(lease, reason)
            elif made[0].closed:
                made[0].sharedpool_direct = lease.reached_directly or None  # else nobody knows
                holdings.not_opened(lease, reason, holdings.diagnosis.of(made[0], error, deadline, lease.refused_with))
            elif not isinstance(error, OSError):
                holdings.discard(lease, bear_witness(made[0]), reason)
            else:
                abort(made[0])
                holdings.give_back(lease, reason, gone=False, closed=made[0].sharedpool_closed)
        raise


def _welcome(holdings: Holdings, lease: Lease, conn: PooledConnection) -> None:
    """Make a connection that came from another process this pool's own."""
    if not is_as_opened(conn):
        wrap(conn, holdings.config.conninfo)
    lease.fresh = False
    lease.lend_as_is(conn.sharedpool_wrapper is None)
    if holdings.config.configure:
        holdings.call_back(holdings.config.configure, lease, conn, "configure")
    if holdings.config.configure or conn.sharedpool_touched:
        _note(conn)


def _note(conn: PooledConnection) -> None:
    """Note what a checkin restores, and what must be the same when it moves."""
    conn.sharedpool_session, conn.sharedpool_touched = session_of(conn), False
    conn.sharedpool_encoding = conn.get_parameter_status("client_encoding") or ""


def _worn(ticket: Ticket, lease: Lease, conn: PooledConnection | None, now: float) -> ReleaseReason | None:
    """Say why an idle connection must not be lent out, or a lease not be connected, if it must not."""
    if conn is None:  # the grant may have been on its way, or this process frozen, for any time
        return ReleaseReason.UNUSED if time.monotonic() > lease.connect_by else None
    if now >= lease.retire_at:
        return ReleaseReason.RETIRED
    if lease.fresh and lease is ticket.lease:
        return None  # it has come this moment, and nobody has met its object yet
    if closed_flag.is_over(conn) or (lease.idle_s > CHECK_AFTER_S and not is_alive(conn)):
        return ReleaseReason.BROKEN
    return None if rests(conn) else ReleaseReason.CLOSED  # somebody has gone on with it after its checkin


def _abandon(holdings: Holdings, ticket: Ticket, lease: Lease | None) -> None:
    """Leave nothing behind of a checkout that failed or was interrupted."""
    with holdings.lock:
        other = holdings.cache.give_up(ticket, time.monotonic())
    if other is not None:
        other.wake()
    holdings.signal()
    if lease is not None and lease.phase is Phase.IN_USE and lease.conn is not None:
        # Open, but never handed out: back it goes.
        conn = cast(PooledConnection, lease.conn)
        take_lease(conn)
        # One that was interrupted before all was noted of it is not to be used.
        holdings.take_back(lease, conn, None if conn.sharedpool_session else ReleaseReason.CLOSED)
    holdings.rest()


def _nobody() -> None:
    """Nobody waits on this ticket yet."""
