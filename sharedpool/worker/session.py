"""One pool's registration with the broker: what the link says and hears on behalf of the local pool.

All of it runs in the link's thread.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import cast

from sharedpool.discovery.pid_namespace import pid_namespace_id
from sharedpool.errors import BrokerUnavailable
from sharedpool.wire.codec import encode
from sharedpool.wire.desk import Joined, LaneInvitation
from sharedpool.wire.messages import (
    PROTOCOL_VERSION,
    Ack,
    Bye,
    Deny,
    Gone,
    Grant,
    Hello,
    Recall,
    ReleaseReason,
    ReportNow,
    Stale,
    ToWorker,
    Welcome,
)
from sharedpool.wire.values import Phase, PoolSpec, Token
from sharedpool.worker import forks, greenlets
from sharedpool.worker.connection.closing import close_confirmed, cut
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.core.lease import Closing, Waiter
from sharedpool.worker.core.lost_leases import lost, unfinished
from sharedpool.worker.local_pool import LocalPool
from sharedpool.worker.logs import logger
from sharedpool.worker.threads import leases_in_hand, thread_names, utf8


class Session:
    """The registration's endpoint: the local pool, as the broker knows them."""

    def __init__(self, local: LocalPool) -> None:
        self._local = local
        self._epoch: int | None = None
        self._over = False
        self._invited_by = 0  # which broker
        self._title = utf8(_program()) or "python"

    def compose_hello(self) -> Hello:
        """Compose the registration."""
        config, now = self._local.config, time.monotonic()
        identity = config.conninfo.identity()
        spec = PoolSpec(
            f"{config.name}@{config.group}" if config.group else config.name,
            config.max_conn,
            int(config.expiration * 1000),
            int((config.max_checkout or 0) * 1000),
            str(identity),
            config.max_waiting or 0,
            config.group,
            config.end_overdue,
            identity.dbname,
        )
        self._note_arrivals()
        with self._local.lock:
            cache = self._local.cache
            leases, seen, first = self._local.messages.register(
                now, thread_names() if cache.leases else {}
            )
        host = socket.gethostname()
        return Hello(
            PROTOCOL_VERSION,
            self._local.pid,
            host,
            self._title,
            spec,
            leases,
            seen,
            pid_namespace_id(),
            first=first,
        )

    def compose_bye(self) -> Bye:
        """Compose the last message."""
        with self._local.lock:
            return self._local.cache.reporter.farewell(self._local.cache.hits)

    def invited(self, invitation: LaneInvitation, fds: list[int]) -> None:
        """Take part in the lane that these descriptors, this pool's now, are of: once it is welcome.

        The WELCOME comes another way, and may be slower where the process has a line to the desk already.
        """
        local, link = self._local, self._local.link
        local.keep_invitation(invitation, fds)
        self._invited_by = 0 if link is None else link.epoch
        if local.registration is not None and local.registration.established:
            self._accept()

    def _accept(self) -> None:
        """Follow an invitation to the lane, if there is one, or decline it: else what is parked waits for us."""
        local, link = self._local, self._local.link
        invitation = local.invitation
        if invitation is None or link is None:
            return
        if self._invited_by != link.epoch:
            # Its broker died before its WELCOME came. In its lane nobody else is, and who waits there asks no broker.
            local.keep_invitation(None, [])
        else:
            takes_part = local.enter_lane()
            link.desk.send(encode(Joined(invitation.session, takes_part)))

    def descriptors_to_watch(self) -> list[int]:
        """Return descriptors where something may come for who waits no more."""
        wait_sockets = self._local.wait_sockets
        return [] if wait_sockets is None else wait_sockets.not_quiet

    def receive_strays(self) -> None:
        """Take in what has come there, and note what has come for those who wait."""
        if (wait_sockets := self._local.wait_sockets) is not None:
            wait_sockets.receive_strays()
        self._note_arrivals()
        if wait_sockets is not None:
            self._local.give_kept()

    def _note_arrivals(self) -> None:
        """Note what has come for those who wait, and was not read yet: it is listed as held."""
        if (wait_sockets := self._local.wait_sockets) is not None:
            self._local.cache.reporter.unread = wait_sockets.unread()
        self._local.cache.reporter.unsure = self._local.unsure

    def beat(self) -> bool:
        """Scavenge and queue a heartbeat. Return whether anything is held or asked for."""
        if (wait_sockets := self._local.wait_sockets) is not None:
            wait_sockets.check_all()
        self.receive_strays()
        self._local.reclaim(0, thorough=False)
        self._local.purge()
        self._find_abandoned()
        self._local.shells.trim(len(self._local.cache.leases))
        now = time.monotonic()
        with self._local.lock:
            held = self._local.cache.leases
            missing = lost(held.values(), set(self._local.cache.idle), now, leases_in_hand)
            interrupted = unfinished(held.values(), now)
            for lease in missing:
                if lease.conn is None:
                    self._local.cache.closed(lease, ReleaseReason.CLOSED, gone=lease.ref is None)
            self._local.cache.outbox.append(
                self._local.cache.reporter.heartbeat(now, thread_names(), self._local.cache.hits)
            )
            busy = bool(self._local.cache.leases or self._local.cache.waiting)
        self._deposit_all()
        for lease in missing:
            logger.warning(
                "pool %r: the connection of lease %s was lost unreturned",
                self._local.config.name,
                lease.token,
            )
            if lease.conn is not None:
                self._local.discard(lease, cast(PooledConnection, lease.conn), ReleaseReason.CLOSED)
        self._local.close(interrupted)
        return busy

    def _find_abandoned(self) -> None:
        """Give up what was taken for a checkout that an interrupt has ended, its clean-up too."""
        now = time.monotonic()
        with self._local.lock:
            abandoned = [
                waiter for waiter in self._local.cache.waiting.values() if waiter.abandoned
            ]
            served = [self._local.cache.give_up(waiter, now) for waiter in abandoned]
        for waiter in served:
            if waiter is not None:
                waiter.wake()

    def receive(self, message: ToWorker) -> None:
        """Act on a message from the broker."""
        if isinstance(message, Recall):
            self.receive_strays()
            self._local.reclaim(0, thorough=False)  # what its user has dropped may serve another
        now = time.monotonic()
        waiter: Waiter | None = None
        closing: list[Closing] = []
        with self._local.lock:
            match message:
                case Welcome():
                    closing = self._local.messages.welcomed(
                        message.epoch, message.generation, now, message.served
                    )
                case Stale():
                    closing = self._local.cache.renew_generation(message.generation, now)
                case Ack():
                    self._local.cache.reporter.acknowledged(message.gone)
                    closing = self._local.cache.renew_generation(message.generation, now)
                case Grant():
                    waiter = self._local.messages.granted(message, now)
                case Deny():
                    waiter = self._local.cache.waiters.denied(message)
                case ReportNow():
                    self._local.cache.outbox.append(
                        self._local.cache.reporter.renewal(now, thread_names())
                    )
                case Recall():
                    closing = self._local.messages.recalled(message, now, thread_names())
        if waiter is not None:
            waiter.wake()
        if closing:
            self._local.wake_link()
            self._local.close(closing)
        if isinstance(message, Welcome):
            self._welcomed(message)
        elif isinstance(message, Ack):
            self._local.limit = message.max_conn or self._local.limit
            self._revoke(message.revoked)
        elif isinstance(message, Gone):
            self._drop_ended(message.tokens)

    def _welcomed(self, welcome: Welcome) -> None:
        name, asked = self._local.config.name, self._local.config.max_conn
        if self._epoch is None and welcome.max_conn != asked:
            text = "pool %r: max_conn=%d was asked for, %d is enforced (set by the pool's first user or the launcher)"
            logger.warning(text, name, asked, welcome.max_conn)
        if self._epoch not in (None, welcome.epoch):
            self._local.leave_lane(former_brokers=True)
            logger.info("pool %r: registered with a new broker (epoch %d)", name, welcome.epoch)
        self._epoch = welcome.epoch
        self._local.limit = welcome.max_conn
        self._local.cache.expires_after(
            min(self._local.config.expiration, welcome.expiration_ms / 1000)
        )
        self._local.cache.connects_within_s = welcome.ttl_ms / 1000
        self._local.tag = welcome.tag
        self._revoke(welcome.revoked)
        link = self._local.link
        hands_over = (
            welcome.handover
            and self._local.handover_enabled
            and link is not None
            and link.desk.line is not None
        )
        hands_over = self._local.hands_over = hands_over and greenlets.may_connect_to_itself()
        time_slice = self._local.cache.time_slice
        time_slice.slice_s, time_slice.hands_over = self._local.config.time_slice, hands_over
        with self._local.lock:
            self._local.cache.timings.registered()
            for lease in self._local.cache.leases.values():
                lease.deposited = False
            self._local.cache.waiters.registered(welcome.served, time.monotonic())
        self._deposit_all()
        self._accept()

    def _deposit_all(self) -> None:
        """Hand in what is not at the desk: after a restart of the broker, or when the line was full."""
        with self._local.lock:
            held = [
                (lease, conn)
                for lease in self._local.cache.leases.values()
                if not lease.deposited
                and (conn := lease.conn or (lease.ref() if lease.ref else None)) is not None
            ]
        for lease, conn in held:
            self._local.deposit(lease, cast(PooledConnection, conn))

    def _drop_ended(self, tokens: list[Token]) -> None:
        """Drop leases whose backends the broker has seen to end: what is idle will not be lent out."""
        for token in tokens:
            with self._local.lock:
                lease = self._local.cache.ended(token)
                if lease is not None and lease.phase is Phase.IDLE:
                    self._local.cache.report_failover_sign(lease, "")
            if lease is not None:
                logger.info(
                    "pool %r: the backend of lease %s has ended", self._local.config.name, token
                )
                if lease.conn is not None:
                    close_confirmed([cast(PooledConnection, lease.conn)])
                    self._local.discarded += 1

    def _revoke(self, tokens: list[Token]) -> None:
        """Drop leases that the broker has taken away: their backends are gone or going."""
        for token in tokens:
            with self._local.lock:
                lease = self._local.cache.ended(token)
            if lease is not None:
                logger.warning(
                    "pool %r: the broker has taken lease %s away", self._local.config.name, token
                )
                conn = lease.conn or (lease.ref() if lease.ref else None)
                if conn is not None:
                    cut([cast(PooledConnection, conn)], limit_s=0)

    @property
    def ending(self) -> bool:
        """Whether the registration is to end once nothing is held."""
        local = self._local
        return local.disposed or local.retired or local.transient or local.before_fork

    def done(self) -> bool:
        """Say whether the pool is over and nothing is held or asked for: then this registration is not its any more."""
        with self._local.lock:
            cache = self._local.cache
            self._over = self._over or (self.ending and not cache.leases and not cache.waiting)
            if self._over:
                self._detach()
                # What was said until now is this registration's to send; what comes after it, the next one's.
                cache.leave_outbox()
            return self._over

    def registration_ended(self) -> None:
        """Note that the registration has ended; a pool that goes on makes another when it needs one."""
        if self._over:
            self._local.keep_invitation(None, [])
            self._local.leave_lane()
        with self._local.lock:
            self._detach()
            if self._over and self._local.registration is None:
                forks.remove_local_pool(self._local)

    def _detach(self) -> None:
        registration = self._local.registration
        if registration is not None and registration.endpoint is self:
            self._local.link = self._local.registration = None

    def unreachable(self, error: Exception) -> None:
        """Tell the waiting threads that the broker refuses, or cannot be had."""
        if not isinstance(error, BrokerUnavailable):
            error = BrokerUnavailable(f"pool {self._local.config.name!r}: {error}")
        with self._local.lock:
            waiters = self._local.cache.waiters.fail(error)
        for waiter in waiters:
            waiter.wake()


def _program() -> str:
    """Return what was started: a script's name, or that of the package that `python -m` runs; "" without either."""
    script = sys.argv[0] if sys.argv else ""
    folder, name = os.path.split(script)
    if name == "__main__.py":
        name = os.path.basename(folder or os.getcwd())
    return "" if script in ("-c", "-m", "-") else name
