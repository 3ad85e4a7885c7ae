"""One pool's registration with the broker: what the link sends and receives for the local pool.

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
from sharedpool.worker.core.dropped_leases import dropped, unfinished
from sharedpool.worker.core.lease import Closing, Waiter
from sharedpool.worker.local_pool import LocalPool
from sharedpool.worker.logs import logger
from sharedpool.worker.threads import leases_in_hand, thread_names, utf8


class Session:
    """The endpoint of a registration: the local pool as the broker knows it."""

    def __init__(self, local: LocalPool) -> None:
        self._local = local
        self._epoch: int | None = None  # of the broker that has sent the last WELCOME
        self._over = False  # the pool has ended and holds nothing
        self._invited_by = 0  # the epoch of the broker that has sent the invitation
        self._title = utf8(_program()) or "python"

    def compose_hello(self) -> Hello:
        """Compose the HELLO."""
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
            config.shares_database,
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
        """Compose the BYE."""
        with self._local.lock:
            return self._local.cache.reporter.farewell(self._local.cache.hits)

    def invited(self, invitation: LaneInvitation, fds: list[int]) -> None:
        """Keep an invitation to the pool's lane, with its descriptors, until the broker's WELCOME.

        The WELCOME comes by another socket. If the process has a line to the desk already, the
        invitation may be faster.
        """
        local, link = self._local, self._local.link
        local.membership.keep_invitation(invitation, fds)
        self._invited_by = 0 if link is None else link.epoch
        if local.registration is not None and local.registration.established:
            self._accept()

    def _accept(self) -> None:
        """Answer an invitation to the lane, if there is one.

        To decline is an answer too: the broker keeps connections for the lane's members.
        """
        local, link = self._local, self._local.link
        invitation = local.membership.invitation
        if invitation is None or link is None:
            return
        if self._invited_by != link.epoch:
            # The broker died before its WELCOME came. Its lane has no other members, and threads
            # that wait there would ask no broker.
            local.membership.keep_invitation(None, [])
        else:
            takes_part = local.membership.enter()
            link.desk.send(encode(Joined(invitation.session, takes_part)))

    def descriptors_to_watch(self) -> list[int]:
        """Return descriptors at which a connection may arrive for a thread that no longer waits."""
        wait_sockets = self._local.membership.wait_sockets
        return [] if wait_sockets is None else wait_sockets.not_quiet

    def receive_strays(self) -> None:
        """Receive connections for threads that no longer wait, and list the unread ones."""
        if (wait_sockets := self._local.membership.wait_sockets) is not None:
            wait_sockets.receive_strays()
        self._note_arrivals()
        if wait_sockets is not None:
            self._local.give_kept()

    def _note_arrivals(self) -> None:
        """List connections that have arrived and are unread: to the broker they are held here."""
        reporter = self._local.cache.reporter
        if (wait_sockets := self._local.membership.wait_sockets) is not None:
            reporter.unread = wait_sockets.unread()
        reporter.unsure = self._local.membership.unsure

    def beat(self) -> bool:
        """Queue a heartbeat, and see to what no thread will.

        Close expired connections, and find dropped ones. Return True if anything is held or wanted.
        """
        if (wait_sockets := self._local.membership.wait_sockets) is not None:
            wait_sockets.check_all()
        self.receive_strays()
        self._local.reclaim(0, thorough=False)
        self._local.purge()
        self._find_abandoned()
        self._local.shells.trim(len(self._local.cache.leases))
        now = time.monotonic()
        with self._local.lock:
            held = self._local.cache.leases
            missing = dropped(held.values(), set(self._local.cache.idle), now, leases_in_hand)
            interrupted = unfinished(held.values(), now)
            for lease in missing:
                if lease.conn is None:
                    # Not proved to be gone: its thread may have been interrupted in a connect.
                    self._local.cache.closed(lease, ReleaseReason.CLOSED, gone=False)
            self._local.cache.outbox.append(
                self._local.cache.reporter.heartbeat(now, thread_names(), self._local.cache.hits)
            )
            busy = bool(self._local.cache.leases or self._local.cache.waiting)
        self._deposit_all()
        for lease in missing:
            logger.warning(
                "pool %r: the connection of lease %s was dropped without a put_conn()",
                self._local.config.name,
                lease.token,
            )
            if lease.conn is not None:
                self._local.discard(lease, cast(PooledConnection, lease.conn), ReleaseReason.CLOSED)
        self._local.close(interrupted)
        return busy

    def _find_abandoned(self) -> None:
        """Withdraw the waiters of checkouts whose clean-up was interrupted as well."""
        with self._local.lock:
            waiters = self._local.cache.waiters
            for waiter in [x for x in self._local.cache.waiting.values() if x.abandoned]:
                waiters.withdraw(waiter)

    def receive(self, message: ToWorker) -> None:
        """Handle a message from the broker."""
        local = self._local
        if isinstance(message, Recall):
            self.receive_strays()
            local.reclaim(0, thorough=False)  # a connection that its user has dropped may serve
        with local.lock:
            waiter, closing = self._apply(message, time.monotonic())
        if waiter is not None:
            waiter.wake()
        if closing:
            local.wake_link()
            local.close(closing)
        match message:
            case Welcome():
                self._welcomed(message)
            case Ack():
                local.limit = message.max_conn or local.limit
                self._revoke(message.revoked)
            case Gone():
                self._drop_ended(message.tokens)

    def _apply(self, message: ToWorker, now: float) -> tuple[Waiter | None, list[Closing]]:
        """Have the cache handle a message; return a waiter to wake and leases to close.

        The lock must be held.
        """
        cache, messages = self._local.cache, self._local.messages
        match message:
            case Welcome(epoch=epoch, generation=generation, served=served):
                return None, messages.welcomed(epoch, generation, now, served)
            case Stale():
                return None, messages.renew_generation(message.generation, now)
            case Ack():
                cache.reporter.acknowledged(message.gone)
                return None, messages.renew_generation(message.generation, now)
            case Grant():
                return messages.granted(message, now), []
            case Deny():
                return cache.waiters.denied(message), []
            case ReportNow():
                cache.outbox.append(cache.reporter.renewal(now, thread_names()))
            case Recall():
                return None, messages.recalled(message, now, thread_names())
        return None, []

    def _welcomed(self, welcome: Welcome) -> None:
        local, cache = self._local, self._local.cache
        name, asked = local.config.name, local.config.max_conn
        if self._epoch is None and welcome.max_conn != asked:
            text = (
                "pool %r: max_conn=%d was asked for, %d is enforced"
                " (set by the pool's first user or the launcher)"
            )
            logger.warning(text, name, asked, welcome.max_conn)
        if self._epoch not in (None, welcome.epoch):
            local.membership.leave(to_new_broker=True)
            logger.info("pool %r: registered with a new broker (epoch %d)", name, welcome.epoch)
        self._epoch = welcome.epoch
        local.limit, local.tag = welcome.max_conn, welcome.tag
        local.hands_over = welcome.handover and self._can_hand_over()
        cache.set_terms(
            min(local.config.expiration, welcome.expiration_ms / 1000),
            welcome.ttl_ms / 1000,
            hands_over=local.hands_over,
        )
        self._revoke(welcome.revoked)
        with local.lock:
            cache.timings.registered()
            for lease in cache.leases.values():
                lease.deposited = False
            cache.waiters.registered(welcome.served, time.monotonic())
        self._deposit_all()
        self._accept()

    def _can_hand_over(self) -> bool:
        local, link = self._local, self._local.link
        has_line = link is not None and link.desk.line is not None
        return local.handover_enabled and has_line and greenlets.may_connect_to_itself()

    def _deposit_all(self) -> None:
        """Deposit the sockets that the desk lacks: after a new broker's WELCOME, or a full line."""
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
        """Drop leases whose backends the broker has seen to end."""
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
        """Drop leases that the broker has taken away, and cut their connections."""
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
        """Whether the registration ends once nothing is held."""
        local = self._local
        return local.disposed or local.retired or local.transient or local.before_fork

    def done(self) -> bool:
        """Return True if the pool has ended and holds nothing: the registration ends, too."""
        with self._local.lock:
            cache = self._local.cache
            self._over = self._over or (self.ending and not cache.leases and not cache.waiting)
            if self._over:
                self._local.detach(self)
                # This registration sends the messages so far, the next one those that follow.
                cache.leave_outbox()
            return self._over

    def registration_ended(self) -> None:
        """Handle the registration's end. A pool that goes on makes another when it needs one."""
        if self._over:
            self._local.membership.keep_invitation(None, [])
            self._local.membership.leave()
        with self._local.lock:
            self._local.detach(self)
            if self._over and self._local.registration is None:
                forks.remove_local_pool(self._local)

    def unreachable(self, error: Exception) -> None:
        """Fail the waiting threads: the broker refuses this pool, or cannot be started."""
        if not isinstance(error, BrokerUnavailable):
            error = BrokerUnavailable(f"pool {self._local.config.name!r}: {error}")
        with self._local.lock:
            waiters = self._local.cache.waiters.fail(error)
        for waiter in waiters:
            waiter.wake()


def _program() -> str:
    """Return the name of the script, or of the package that `python -m` runs; "" without either."""
    script = sys.argv[0] if sys.argv else ""
    folder, name = os.path.split(script)
    if name == "__main__.py":
        name = os.path.basename(folder or os.getcwd())
    return "" if script in ("-c", "-m", "-") else name
