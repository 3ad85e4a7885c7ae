"""The broker's loop: read messages and process ends, let the ledger decide, carry out its commands.

One thread owns the ROUTER socket, the desk, the journal and the ledger. Other threads (the control
connection, the metrics, a signal handler) hand it calls of the ledger through a queue and wake it
by a socket.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from sharedpool.broker.core.ledger import LedgerCall
from sharedpool.broker.server.address_files import AddressFiles
from sharedpool.broker.server.admin_requests import AdminRequests
from sharedpool.broker.server.executor import Executor
from sharedpool.broker.server.inbox import Inbox
from sharedpool.broker.server.processes import WatchedProcess, raise_descriptor_limit
from sharedpool.broker.server.router_socket import RouterSocket
from sharedpool.broker.server.startup import claim_address, make_control, make_ledger, make_shares
from sharedpool.broker.server.systemd import notify
from sharedpool.broker.settings import BrokerSettings
from sharedpool.errors import ConfigError, SharedPoolError
from sharedpool.postgres.conninfo import ConnInfo
from sharedpool.wire.messages import PROTOCOL_VERSION
from sharedpool.wire.reports import Report

if TYPE_CHECKING:
    from sharedpool.broker.metrics.service import MetricsService

logger = logging.getLogger("sharedpool.broker")

# A loop that is late by this much did not run (SIGSTOP, a suspended machine): sessions that were
# silent meanwhile are not blamed for it.
_SUSPENDED_S = 1.0
# A loop that is late by this much may have been taken for gone by other hosts: less than
# `host_presence.GONE_S`.
_PAUSED_S = 0.5
# `PoolReport.history` has one sample per ten seconds.
_SAMPLE_EVERY_S = 10.0
# Less than the time after which a worker that does not want to wait gives up.
_CHECK_FILES_EVERY_S = 2.0


class Server:
    """One broker. It has its address once it is made; `run` serves until `drain` or `stop`.

    `stop`, `drain` and `reload` are safe in a signal handler and from any thread.
    """

    def __init__(
        self, settings: BrokerSettings, reread: Callable[[], BrokerSettings] | None = None
    ) -> None:
        """Take the address; `reread` returns the settings for a reload, or raises `ConfigError`.

        Raise `AlreadyRunning` when another broker has the address, `SharedPoolError` when it cannot
        be taken.
        """
        self.settings = settings
        self._reread = reread
        self._reload_asked = self._stopping = self._drain_asked = False
        self._drain_until: float | None = None
        self._was_used = self._resting = False
        self._started = self._sample_at = self._check_files_at = time.monotonic()
        self._unused_since = self._awake_at = self._started

        self._claim = claim_address(settings.address)
        self._router = RouterSocket(settings.address, settings.listener)
        # A crashed broker leaves its socket, even where the other files were deleted.
        self._follows = not self._claim.lock.first or self._router.left_behind

        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._calls: deque[LedgerCall] = deque()
        self._journal = self._claim.journal
        self._ledger = make_ledger(settings, self._claim)
        self._control = make_control(settings, self._claim, self._call_soon)
        self._shares = make_shares(settings, self._claim, self._call_soon)
        self._executor = Executor(
            self._ledger,
            self._router,
            self._journal,
            self._control,
            self._shares,
            self._claim.desk,
            self._selector,
            self._calls.append,
        )
        self._execute = self._executor.execute
        self._admin_requests = AdminRequests(
            self._ledger, self._control, self._execute, self._report
        )
        self._inbox = Inbox(self._router, self._ledger, self._executor, self._admin_requests)
        self._files = AddressFiles(
            settings.address, self._claim.lock, self._journal, self._router, self._claim.desk
        )
        self._metrics: MetricsService | None = None
        try:
            self._metrics = self._make_metrics()
            self._router.bind()
        except SharedPoolError:
            if self._metrics is not None:
                self._metrics.stop()
            if self._shares is not None:
                self._shares.close()
            self._claim.abandon()
            raise

    def _make_metrics(self) -> MetricsService | None:
        if not self.settings.metrics:
            return None
        from sharedpool.broker.metrics.service import MetricsService

        return MetricsService(self.settings.metrics, self._call_soon, self._report)

    # --- the loop

    def run(self) -> None:
        """Serve until `drain` or `stop` is called, or the settings' linger time is over."""
        self._begin()
        try:
            while not self._stopping:
                self._notice_suspension(time.monotonic())
                more = self._inbox.read()
                now = time.monotonic()
                self._run_due(now, more=more)
                if self._is_drained(now):
                    break
                self._sample(now)
                in_use = bool(self._ledger.leases or self._ledger.sessions)
                self._rest(now, in_use=in_use)
                if not self._has_address(now, in_use=in_use):
                    break
                if self._has_lingered(now, in_use=in_use):
                    break
                self._wait(0.0 if more else self._timeout_s(now))
        finally:
            self._close()

    def _begin(self) -> None:
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        self._selector.register(self._router, selectors.EVENT_READ, self._router.on_readable)
        self._executor.custody.watch(self._selector)
        raise_descriptor_limit()
        self._announce()
        self._control.start()
        if self._shares is not None:
            self._shares.start()
        self._take_over()
        if self._metrics is not None:
            self._metrics.start()
        notify(self.settings.notify, "READY=1")
        self._unused_since = self._awake_at = time.monotonic()

    def _take_over(self) -> None:
        """Begin where a former broker ended."""
        now, takeover = time.monotonic(), self._ledger.takeover
        waits = self._follows and not self._journal.intact
        if waits:  # before anything else: this host's shares may count more than the journal has
            self._execute(takeover.begin_grace_period(takeover.grace_s, now))
        # Without a control connection the end of a dead worker's backend cannot be confirmed: the
        # leases in the journal stay counted.
        self._execute(takeover.restore(self._journal.entries, now, self._journal.members))
        if not waits:
            self._journal.mark_complete()

    def _no_answer_yet(self) -> str:
        server = ConnInfo(self.settings.dsn or "").identity()
        return f"PostgreSQL has not answered its first connect to {server}"

    def _notice_suspension(self, now: float) -> None:
        """Open nothing after a pause until the other hosts' shares were looked at again."""
        if now - self._awake_at > _PAUSED_S:
            self._ledger.sharing.trust.suspended(now)

    def _run_due(self, now: float, *, more: bool) -> None:
        """Run what is due: queued calls, timers, a reload, reports. `more`: messages are left."""
        if now - self._awake_at > _SUSPENDED_S:
            self._ledger.process_was_suspended(now)
        # Messages first: a worker's last RELEASE is better evidence than its death.
        while self._calls and not more:
            self._execute(self._calls.popleft()(self._ledger, now))
        self._execute(self._ledger.tick(now))
        if self._reload_asked:
            self._reload(now)
        self._admin_requests.answer(now)

    def _sample(self, now: float) -> None:
        if now >= self._sample_at:
            self._sample_at = now + _SAMPLE_EVERY_S
            self._was_used = True  # a broker that nobody ever comes to rests after a while, too
            self._ledger.sample()

    def _rest(self, now: float, *, in_use: bool) -> None:
        """Close an automatic broker's control connection while nobody uses the broker.

        Where limits cannot be shared, a worker that comes then is granted nothing until their lock
        is claimed again.
        """
        if not self.settings.automatic:
            return
        self._was_used = self._was_used or in_use
        if in_use and self._resting:
            self._resting = False
            self._control.need(True)
        elif self._was_used and not (in_use or self._resting) and self._ledger.state == "serving":
            self._resting = True
            if self._control.has_leadership:  # the lock is given up with the connection
                self._execute(self._ledger.takeover.outranked(now, self._no_answer_yet()))
            self._control.need(False)

    def _has_address(self, now: float, *, in_use: bool) -> bool:
        """Return False when the address belongs to another broker, or to nobody, by now."""
        if now < self._check_files_at:
            return True
        self._check_files_at = now + _CHECK_FILES_EVERY_S
        return self._files.check(wanted=in_use or self.settings.linger_s is None)

    def _has_lingered(self, now: float, *, in_use: bool) -> bool:
        """Return True when nobody has used the broker for as long as the settings allow."""
        linger_s = self.settings.linger_s
        if in_use or linger_s is None:
            self._unused_since = now
            return False
        if now - self._unused_since < linger_s:
            return False
        logger.info("unused for %.0f s: stopping", linger_s)
        return True

    def _wait(self, timeout_s: float) -> None:
        """Wait for input, and handle all but the messages."""
        self._awake_at = time.monotonic() + timeout_s
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._wake_in:
                with contextlib.suppress(BlockingIOError):
                    self._wake_in.recv(4096)
            elif isinstance(key.data, WatchedProcess):
                for session in list(key.data.sessions):
                    self._executor.session_died(session)
            elif key.data is not None:
                key.data()

    def _timeout_s(self, now: float) -> float:
        if self._router.poll() or self._calls:
            return 0.0
        deadlines = [
            self._sample_at,
            self._check_files_at,
            self._drain_until,
            self._admin_requests.next_deadline(),
            self._ledger.next_deadline(),
        ]
        if self.settings.linger_s is not None and not (
            self._ledger.leases or self._ledger.sessions
        ):
            deadlines.append(self._unused_since + self.settings.linger_s)
        return max(0.0, min(at for at in deadlines if at is not None) - now)

    def _call_soon(self, call: LedgerCall) -> None:
        """Queue a call of the ledger, from any thread."""
        self._calls.append(call)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # the socket is full: the loop is awake anyway
            self._wake_out.send(b"\0")

    # --- stop, drain, reload

    def stop(self) -> None:
        """Make `run` return soon."""
        self._stopping = True
        self._wake()

    def stop_when_closed(self, fd: int) -> None:
        """Stop when the other end of this pipe is closed by its owner's end. Call before `run`."""
        self._selector.register(fd, selectors.EVENT_READ, self.stop)

    def drain(self) -> None:
        """Make `run` return when all leases are back, or after `drain_timeout_s`.

        A second call makes it return at once.
        """
        if self._drain_asked:
            self._stopping = True
        self._drain_asked = True
        self._wake()

    def _is_drained(self, now: float) -> bool:
        if not self._drain_asked:
            return False
        if self._drain_until is None:
            self._drain_until = now + self.settings.drain_timeout_s
            text = (
                "draining %d leases, for at most %.1f s; a second signal stops the broker at once"
            )
            logger.info(text, self._ledger.leases, self.settings.drain_timeout_s)
            notify(self.settings.notify, "STOPPING=1")
            self._execute(self._ledger.drain(now))
        if not self._ledger.leases:
            return True
        if now < self._drain_until:
            return False
        text = "%d leases were not returned in time: their connections stay open"
        logger.warning(text, self._ledger.leases)
        return True

    def reload(self) -> None:
        """Have the settings read again soon."""
        self._reload_asked = True
        self._wake()

    def _reload(self, now: float) -> None:
        self._reload_asked = False
        if self._reread is None:
            logger.warning("not reloaded: the broker was started without a configuration file")
            return
        try:
            new = self._reread()
        except ConfigError as error:
            for line in str(error).splitlines():
                logger.error("not reloaded: %s", line)
            return
        old = self.settings
        self.settings = replace(old, max_conn=new.max_conn, groups=new.groups, limits=new.limits)
        self._execute(self._ledger.configure(new.max_conn, new.groups, new.limits, now))
        changed = _changed_names(old, self.settings)
        logger.info("reloaded: %s", "new " + ", ".join(changed) if changed else "no changes")
        if ignored := _changed_names(self.settings, new):
            logger.warning("only a restart changes %s", ", ".join(ignored))

    # --- reports

    def _announce(self) -> None:
        settings, epoch = self.settings, self._ledger.epoch
        limit = (
            f"{settings.max_conn} connections over all pools"
            if settings.max_conn
            else "each pool's own max_conn"
        )
        text, fields = "broker %d at %s enforces %s (epoch %d)", {"epoch": epoch}
        logger.info(text, os.getpid(), settings.address, limit, epoch, extra={"sharedpool": fields})

    def _report(self, now: float) -> Report:
        pools, sessions = self._ledger.report(now)
        return Report(
            PROTOCOL_VERSION,
            self._ledger.epoch,
            os.getpid(),
            self.settings.address,
            int((now - self._started) * 1000),
            self._ledger.max_conn or 0,
            self._ledger.leases,
            self._control.state,
            pools,
            sessions,
            len(self._executor.custody),
            "serving" if self._resting else self._ledger.state,
            hosts=self._ledger.sharing.reports.report(now),
        )

    def _close(self) -> None:
        notify(self.settings.notify, "STOPPING=1")
        if self._metrics is not None:
            self._metrics.stop()
        self._control.stop()
        if self._shares is not None:
            self._shares.stop(self._ledger.sharing.in_use())
        self._executor.stop_watching()
        self._router.close()
        lock, desk = self._claim.lock, self._claim.desk
        ours = lock.is_ours()
        if ours:  # while it is locked: later the path may be the next broker's
            self._router.unlink()
        self._executor.lanes.close()
        if desk is not None:
            if ours:
                desk.unlink()
            desk.close()
        self._journal.close(for_good=self.settings.one_off and ours)
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()
        lock.release(for_good=self.settings.one_off)
        logger.info("broker %d stopped", os.getpid())


def _changed_names(old: BrokerSettings, new: BrokerSettings) -> list[str]:
    return [each.name for each in fields(old) if getattr(old, each.name) != getattr(new, each.name)]
