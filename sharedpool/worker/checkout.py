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
from psycopg2.extensions import connection

from sharedpool.errors import PoolClosed, PoolError
from sharedpool.spare import FOR_A_CONNECTION, make_sure_of
from sharedpool.wire.messages import START_UP_LIMIT_S, Phase, ReleaseReason
from sharedpool.worker import callsite, gate, green, moving, wording
from sharedpool.worker.booth import Booth, Gate
from sharedpool.worker.connection import (
    CHECK_AFTER_S,
    PooledConnection,
    bear_witness,
    connect,
    describe,
    is_alive,
    rests,
    server_of,
    session_of,
)
from sharedpool.worker.ending import abort
from sharedpool.worker.handover import can_move, parameters
from sharedpool.worker.holdings import Holdings
from sharedpool.worker.lease import Lease, Ticket
from sharedpool.worker.link import Link
from sharedpool.worker.logs import logger
from sharedpool.worker.registration import Registration
from sharedpool.worker.session import thread_names
from sharedpool.worker.tickets import wait_ms
from sharedpool.worker.wrapper import is_as_opened, lost, take_off, wrap

# How long a caller who does not want to wait waits for the broker's answer: a running one's, and one that starts.
ANSWER_LIMIT_S = 3.0
START_LIMIT_S = 25.0
CONNECT_LIMIT_S = 5.0
# A refusal by the broker says who holds what; it may come this much after the deadline.
_GRACE_S = 0.06


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
            conn.sharedpool_gate = gate.OPEN
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
        conn.sharedpool_lease = lease
        ticket.lease = None
        lease.conn = None  # from here on the caller's reference is the only one: dropped by an interrupt, it comes back
        return users
    except BaseException:
        holdings.errors += 1
        _abandon(holdings, ticket, lease)
        raise


def _wait(holdings: Holdings, ticket: Ticket, wait_s: float, deadline: float) -> Lease:
    """Return a lease: an idle one after all, one handed on by another thread, or one the broker grants."""
    if logger.is_kept:  # a finalizer, for instance, which runs wherever there is garbage to collect
        raise wording.in_the_link(holdings.config.name)
    if green.is_eventlets():
        raise wording.unsupported(holdings.config.name)
    if holdings.orphans or holdings.reclaiming.busy:
        holdings.reclaim(min(wait_s, 1000.0) if wait_s else ANSWER_LIMIT_S)
    holdings.locate_broker()
    if wait_s and holdings.cache.moving[0]:
        ticket.begin_anew(time.monotonic())
        if (lease := moving.wait(holdings, ticket, deadline)) is not None:
            return lease
        if ticket.settled:
            return _outcome(holdings, ticket, wait_s)
    place = holdings.take_booth(ticket) or Gate()
    asked: Booth | None = None  # where the request was last made, if it was at the desk
    try:
        ticket.wake = place.ring
        ticket.begin_anew(time.monotonic())
        with holdings.lock:
            if holdings.disposed:
                raise PoolClosed(f"pool {holdings.config.name!r} is disposed")
            if (lease := holdings.cache.take(ticket.since)) is not None:
                return lease
            link, registration = holdings.ensure_link()
            at_desk = isinstance(place, Booth) and registration.established
            if not wait_s and any(held.phase is Phase.CLOSING for held in holdings.cache.leases.values()):
                # A slot is on its way back: the broker must know, or it refuses at once.
                holdings.cache.out.append(holdings.cache.renewal(ticket.since, thread_names()))
                at_desk = False
            elif holdings.config.debug_checkouts:
                # A refusal is to name the line, of this process's checkouts too: at the desk a request that does not
                # wait would overtake what tells of them.
                holdings.cache.out.append(holdings.cache.renewal(ticket.since, thread_names()))
                at_desk = at_desk and wait_s > 0
            holdings.cache.tickets.want(ticket, wait_s and max(0.001, deadline - ticket.since), at_desk=at_desk)
            # Laid there without the lock meanwhile.
            if holdings.cache.idle and (lease := holdings.cache.take(ticket.since)) is not None:
                holdings.cache.give_up(ticket, ticket.since)
                return lease
        if not at_desk or holdings.config.debug_checkouts:
            link.wake()
        limit = deadline + _GRACE_S if wait_s else ticket.since + _patience_s(holdings, registration)
        while not ticket.settled:
            left_s = limit - time.monotonic()
            if left_s <= 0:
                raise _unanswered(holdings, ticket, link, registration, wait_s)
            if ticket.to_ask:
                left_s = wait_s and max(0.001, deadline - time.monotonic())
                place, said = _go_to_desk(holdings, ticket, place, registration.identity, left_s)
                asked = place if said and isinstance(place, Booth) else asked
                continue
            _look(holdings, ticket, place, left_s)
    finally:
        if isinstance(place, Booth):
            _leave(holdings, ticket, place, asked=place is asked)
    return _outcome(holdings, ticket, wait_s)


def _outcome(holdings: Holdings, ticket: Ticket, wait_s: float) -> Lease:
    """Return the lease that a ticket was settled with, or raise."""
    if ticket.error is not None:
        raise ticket.error
    if ticket.denial is not None:
        raise wording.refused(holdings.config.name, ticket.denial, wait_s)
    if ticket.lease is None:
        raise AssertionError("bug: a ticket was woken without an outcome")
    return ticket.lease


def _go_to_desk(
    holdings: Holdings, ticket: Ticket, place: Gate | Booth, session: bytes, wait_s: float
) -> tuple[Gate | Booth, bool]:
    """Ask at a line of the desk, where a connection can be passed to this thread; without one by the link.

    Return where to wait, and whether it was said there.
    """
    booth = place if isinstance(place, Booth) and place.open else holdings.take_booth(ticket)
    if booth is not place and isinstance(place, Booth):
        place.home.put(place)  # closed by now
    with holdings.lock:
        if booth is not None:
            ticket.wake = booth.ring
        if ticket.settled or not ticket.to_ask:  # whoever has done that may have rung at the old place
            return booth or place, False
        ticket.to_ask = False
        gone = holdings.cache.gone() if holdings.cache.given_back else []
    if booth is not None and booth.ask(session, ticket.request, wait_ms(wait_s), gone):
        return booth, True
    with holdings.lock:
        holdings.cache.tickets.ask_by_link(ticket)
    holdings.signal()
    return booth or place, False


def _look(holdings: Holdings, ticket: Ticket, place: Gate | Booth, left_s: float) -> None:
    """Wait for news."""
    if isinstance(place, Gate):
        place.wait(left_s)
        return
    was_open = place.open
    if (passed := place.wait(left_s)) is not None:
        other = holdings.receive(*passed, limit_s=left_s)
        place.sure = True  # nothing of what was read can be lost any more
        if other is not None and other is not ticket:
            other.wake()
    elif was_open and not place.open:
        with holdings.lock:
            holdings.cache.tickets.ask_by_link(ticket, again=True)
        holdings.signal()


def _leave(holdings: Holdings, ticket: Ticket, booth: Booth, *, asked: bool) -> None:
    """Give a booth back; where something may still be passed to it, the link reads on."""
    unsettled = asked and not ticket.finished
    if unsettled and booth.sure and booth.withdraw():
        booth.home.watch(booth)
        holdings.signal()
    else:
        # The broker does not read just now: what it may still pass there has to end with the line.
        booth.sure = booth.sure and not unsettled
        booth.home.put(booth)


def _patience_s(holdings: Holdings, registration: Registration) -> float:
    """How long to wait for a broker's answer on behalf of a caller who does not want to wait for a slot."""
    if registration.established:
        return ANSWER_LIMIT_S
    return CONNECT_LIMIT_S if holdings.config.broker else START_LIMIT_S


def _unanswered(holdings: Holdings, ticket: Ticket, link: Link, registration: Registration, wait_s: float) -> PoolError:
    if wait_s and registration.established and link.heard_at >= ticket.since:
        return wording.timed_out(holdings.config.name, holdings.limit, wait_s)
    waited_s = time.monotonic() - ticket.since
    return wording.unanswered(holdings.config.name, link.address, waited_s, registration.trouble)


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
        # A pooler's is not passed on: what makes it clean for others would take its name from it (`broker/fencing.py`).
        conn.sharedpool_movable = lease.movable = holdings.handover and backend.pooled is None and can_move(conn)
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
    if gate.is_over(conn) or (lease.idle_s > CHECK_AFTER_S and not is_alive(conn)):
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
        conn.sharedpool_lease = None
        # One that was interrupted before all was noted of it is not to be used.
        holdings.take_back(lease, conn, None if conn.sharedpool_session else ReleaseReason.CLOSED)
    holdings.rest()


def _nobody() -> None:
    """Nobody waits on this ticket yet."""
