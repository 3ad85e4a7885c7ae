"""One pool's registration with the broker: what the link says and hears on behalf of the holdings.

All of it runs in the link's thread.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import cast

from sharedpool.discovery.pid_namespace import place
from sharedpool.errors import BrokerUnavailable
from sharedpool.wire.codec import encode
from sharedpool.wire.desk import Joined, LetIn
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
    Tell,
    Token,
    ToWorker,
    Welcome,
)
from sharedpool.worker import forks, greenlets
from sharedpool.worker.connection.closing import close_confirmed, cut
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.core.lease import Closing, Ticket
from sharedpool.worker.core.lease_reports import lost, unfinished
from sharedpool.worker.local_pool import Holdings
from sharedpool.worker.logs import logger
from sharedpool.worker.threads import leases_in_hand, thread_names, utf8


class Session:
    """The registration's endpoint: the holdings, as the broker knows them."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._epoch: int | None = None
        self._over = False
        self._invited_by = 0  # which broker
        self._title = utf8(_program()) or "python"

    def hello(self) -> Hello:
        """Compose the registration."""
        config, now = self._holdings.config, time.monotonic()
        identity = config.conninfo.identity()
        spec = PoolSpec(
            f"{config.name}@{config.group}" if config.group else config.name,
            config.max_conn,
            int(config.expiration * 1000),
            int((config.max_checkout or 0) * 1000),
            str(identity),
            config.max_waiting or 0,
            config.group,
            config.ends_overdue,
            identity.dbname,
        )
        self._note_arrivals()
        with self._holdings.lock:
            cache = self._holdings.cache
            leases, seen, first = cache.register(now, thread_names() if cache.leases else {})
        host = socket.gethostname()
        return Hello(PROTOCOL_VERSION, self._holdings.pid, host, self._title, spec, leases, seen, place(), first=first)

    def bye(self) -> Bye:
        """Compose the last message."""
        with self._holdings.lock:
            return self._holdings.cache.farewell()

    def let_in(self, invitation: LetIn, fds: list[int]) -> None:
        """Take part in the lane that these descriptors, this pool's now, are of: once it is welcome.

        The WELCOME comes another way, and may be slower where the process has a line to the desk already.
        """
        holdings, link = self._holdings, self._holdings.link
        holdings.keep_invitation(invitation, fds)
        self._invited_by = 0 if link is None else link.epoch
        if holdings.registration is not None and holdings.registration.established:
            self._accept()

    def _accept(self) -> None:
        """Follow an invitation to the lane, if there is one, or decline it: else what is parked waits for us."""
        holdings, link = self._holdings, self._holdings.link
        invitation = holdings.invitation
        if invitation is None or link is None:
            return
        if self._invited_by != link.epoch:
            # Its broker died before its WELCOME came. In its lane nobody else is, and who waits there asks no broker.
            holdings.keep_invitation(None, [])
        else:
            takes_part = holdings.enter_lane()
            link.desk.say(encode(Joined(invitation.session, takes_part)))

    def watched(self) -> list[int]:
        """Return descriptors where something may come for who waits no more."""
        seats = self._holdings.seats
        return [] if seats is None else seats.unsettled

    def look(self) -> None:
        """Take in what has come there, and note what has come for those who wait."""
        if (seats := self._holdings.seats) is not None:
            seats.look()
        self._note_arrivals()
        if seats is not None:
            self._holdings.give_kept()

    def _note_arrivals(self) -> None:
        """Note what has come for those who wait, and was not read yet: it is listed as held."""
        if (seats := self._holdings.seats) is not None:
            self._holdings.cache.unread = seats.arriving()
        self._holdings.cache.unsure = self._holdings.unsure

    def beat(self) -> bool:
        """Scavenge and queue a heartbeat. Return whether anything is held or asked for."""
        if (seats := self._holdings.seats) is not None:
            seats.beat()
        self.look()
        self._holdings.reclaim(0, thorough=False)
        self._holdings.purge()
        self._find_abandoned()
        self._holdings.shells.trim(len(self._holdings.cache.leases))
        now = time.monotonic()
        with self._holdings.lock:
            held = self._holdings.cache.leases
            missing = lost(held.values(), set(self._holdings.cache.idle), now, leases_in_hand)
            interrupted = unfinished(held.values(), now)
            for lease in missing:
                if lease.conn is None:
                    self._holdings.cache.closed(lease, ReleaseReason.CLOSED, gone=lease.ref is None)
            self._holdings.cache.out.append(self._holdings.cache.heartbeat(now, thread_names()))
            busy = bool(self._holdings.cache.leases or self._holdings.cache.waiting)
        self._deposit_all()
        for lease in missing:
            logger.warning(
                "pool %r: the connection of lease %s was lost unreturned", self._holdings.config.name, lease.token
            )
            if lease.conn is not None:
                self._holdings.discard(lease, cast(PooledConnection, lease.conn), ReleaseReason.CLOSED)
        self._holdings.close(interrupted)
        return busy

    def _find_abandoned(self) -> None:
        """Give up what was taken for a checkout that an interrupt has ended, its clean-up too."""
        now = time.monotonic()
        with self._holdings.lock:
            abandoned = [ticket for ticket in self._holdings.cache.waiting.values() if ticket.abandoned]
            served = [self._holdings.cache.give_up(ticket, now) for ticket in abandoned]
        for ticket in served:
            if ticket is not None:
                ticket.wake()

    def receive(self, message: ToWorker) -> None:
        """Act on a message from the broker."""
        if isinstance(message, Recall):
            self.look()
            self._holdings.reclaim(0, thorough=False)  # what its user has dropped may serve another
        now = time.monotonic()
        ticket: Ticket | None = None
        closing: list[Closing] = []
        with self._holdings.lock:
            match message:
                case Welcome():
                    closing = self._holdings.cache.welcomed(message.epoch, message.generation, now, message.served)
                case Stale():
                    closing = self._holdings.cache.renew_generation(message.generation, now)
                case Ack():
                    self._holdings.cache.acknowledged(message.gone)
                    closing = self._holdings.cache.renew_generation(message.generation, now)
                case Grant():
                    ticket = self._holdings.cache.granted(message, now)
                case Deny():
                    ticket = self._holdings.cache.tickets.denied(message)
                case Tell():
                    self._holdings.cache.out.append(self._holdings.cache.renewal(now, thread_names()))
                case Recall():
                    closing = self._holdings.cache.recalled(message, now, thread_names())
        if ticket is not None:
            ticket.wake()
        if closing:
            self._holdings.signal()
            self._holdings.close(closing)
        if isinstance(message, Welcome):
            self._welcomed(message)
        elif isinstance(message, Ack):
            self._holdings.limit = message.max_conn or self._holdings.limit
            self._revoke(message.revoked)
        elif isinstance(message, Gone):
            self._ended(message.tokens)

    def _welcomed(self, welcome: Welcome) -> None:
        name, asked = self._holdings.config.name, self._holdings.config.max_conn
        if self._epoch is None and welcome.max_conn != asked:
            text = "pool %r: max_conn=%d was asked for, %d is enforced (set by the pool's first user or the launcher)"
            logger.warning(text, name, asked, welcome.max_conn)
        if self._epoch not in (None, welcome.epoch):
            self._holdings.leave_lane(former_brokers=True)
            logger.info("pool %r: registered with a new broker (epoch %d)", name, welcome.epoch)
        self._epoch = welcome.epoch
        self._holdings.limit = welcome.max_conn
        self._holdings.cache.expires_after(min(self._holdings.config.expiration, welcome.expiration_ms / 1000))
        self._holdings.cache.connects_within_s = welcome.ttl_ms / 1000
        self._holdings.tag = welcome.tag
        self._revoke(welcome.revoked)
        link = self._holdings.link
        hands_over = welcome.handover and self._holdings.handover and link is not None and link.desk.line is not None
        hands_over = self._holdings.hands_over = hands_over and greenlets.may_connect_to_itself()
        slices = self._holdings.cache.slices
        slices.slice_s, slices.hands_over = self._holdings.config.slice, hands_over
        with self._holdings.lock:
            self._holdings.cache.times.registered()
            for lease in self._holdings.cache.leases.values():
                lease.deposited = False
            self._holdings.cache.tickets.registered(welcome.served, time.monotonic())
        self._deposit_all()
        self._accept()

    def _deposit_all(self) -> None:
        """Hand in what is not at the desk: after a restart of the broker, or when the line was full."""
        with self._holdings.lock:
            held = [
                (lease, conn)
                for lease in self._holdings.cache.leases.values()
                if not lease.deposited and (conn := lease.conn or (lease.ref() if lease.ref else None)) is not None
            ]
        for lease, conn in held:
            self._holdings.deposit(lease, cast(PooledConnection, conn))

    def _ended(self, tokens: list[Token]) -> None:
        """Drop leases whose backends the broker has seen to end: what is idle will not be lent out."""
        for token in tokens:
            with self._holdings.lock:
                lease = self._holdings.cache.ended(token)
                if lease is not None and lease.phase is Phase.IDLE:
                    self._holdings.cache.trouble(lease, "")
            if lease is not None:
                logger.info("pool %r: the backend of lease %s has ended", self._holdings.config.name, token)
                if lease.conn is not None:
                    close_confirmed([cast(PooledConnection, lease.conn)])
                    self._holdings.discarded += 1

    def _revoke(self, tokens: list[Token]) -> None:
        """Drop leases that the broker has taken away: their backends are gone or going."""
        for token in tokens:
            with self._holdings.lock:
                lease = self._holdings.cache.ended(token)
            if lease is not None:
                logger.warning("pool %r: the broker has taken lease %s away", self._holdings.config.name, token)
                conn = lease.conn or (lease.ref() if lease.ref else None)
                if conn is not None:
                    cut([cast(PooledConnection, conn)], limit_s=0)

    @property
    def ending(self) -> bool:
        """Whether the registration is to end once nothing is held."""
        holdings = self._holdings
        return holdings.disposed or holdings.retired or holdings.transient or holdings.before_fork

    def done(self) -> bool:
        """Say whether the pool is over and nothing is held or asked for: then this registration is not its any more."""
        with self._holdings.lock:
            cache = self._holdings.cache
            self._over = self._over or (self.ending and not cache.leases and not cache.waiting)
            if self._over:
                self._let_go()
                # What was said until now is this registration's to send; what comes after it, the next one's.
                cache.leave_outbox()
            return self._over

    def ended(self) -> None:
        """Note that the registration has ended; a pool that goes on makes another when it needs one."""
        if self._over:
            self._holdings.keep_invitation(None, [])
            self._holdings.leave_lane()
        with self._holdings.lock:
            self._let_go()
            if self._over and self._holdings.registration is None:
                forks.let_go(self._holdings)

    def _let_go(self) -> None:
        registration = self._holdings.registration
        if registration is not None and registration.endpoint is self:
            self._holdings.link = self._holdings.registration = None

    def unreachable(self, error: Exception) -> None:
        """Tell the waiting threads that the broker refuses, or cannot be had."""
        if not isinstance(error, BrokerUnavailable):
            error = BrokerUnavailable(f"pool {self._holdings.config.name!r}: {error}")
        with self._holdings.lock:
            tickets = self._holdings.cache.tickets.fail(error)
        for ticket in tickets:
            ticket.wake()


def _program() -> str:
    """Return what was started: a script's name, or that of the package that `python -m` runs; "" without either."""
    script = sys.argv[0] if sys.argv else ""
    folder, name = os.path.split(script)
    if name == "__main__.py":
        name = os.path.basename(folder or os.getcwd())
    return "" if script in ("-c", "-m", "-") else name
