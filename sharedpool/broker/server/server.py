"""The broker's loop: messages and process ends in, the ledger decides, its commands are carried out.

One thread owns the ROUTER socket, the desk, the journal and the ledger. What other threads have to say (the control
connection, `stop`) comes through a queue and a wake-up socket.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from sharedpool.broker.core.commands import (
    Admit,
    CancelBackend,
    CloseLane,
    Command,
    Dismiss,
    Erase,
    Fence,
    Forget,
    GiveInLane,
    HaltMoves,
    InviteToLane,
    JoinQueue,
    Log,
    MarkJournalComplete,
    OpenLane,
    PassOn,
    Record,
    RecordServer,
    Send,
    StartMoves,
    SurveyServer,
    TransferCustody,
    VerifyServer,
    Watch,
)
from sharedpool.broker.core.ledger import Ledger, LedgerCall
from sharedpool.broker.core.sessions import version_mismatch_text
from sharedpool.broker.postgres.control import Control
from sharedpool.broker.postgres.leadership import Leadership
from sharedpool.broker.server import desk as desks
from sharedpool.broker.server.address_files import AddressFiles
from sharedpool.broker.server.admin_requests import AdminRequests
from sharedpool.broker.server.custody import Custody
from sharedpool.broker.server.drop_log import DropLog
from sharedpool.broker.server.journal import Journal
from sharedpool.broker.server.lanes import Lanes
from sharedpool.broker.server.processes import (
    Peer,
    Watched,
    WatchedProcess,
    process,
    raise_descriptor_limit,
)
from sharedpool.broker.server.router_socket import Incoming, RouterSocket
from sharedpool.broker.server.systemd import notify
from sharedpool.broker.settings import BrokerSettings
from sharedpool.discovery import address as addresses
from sharedpool.discovery.lock_file import BrokerLock
from sharedpool.discovery.pid_namespace import pid_namespace, pid_namespace_id
from sharedpool.discovery.scope import scope_of
from sharedpool.errors import ConfigError, ProtocolError, SharedPoolError
from sharedpool.postgres.conninfo import ConnInfo
from sharedpool.wire.admin import Order
from sharedpool.wire.codec import decode_to_broker, encode, hello_version
from sharedpool.wire.messages import PROTOCOL_VERSION, Hello, Reject, ToWorker
from sharedpool.wire.reports import Report, Status, ToOperator

if TYPE_CHECKING:
    from sharedpool.broker.metrics.service import MetricsService

logger = logging.getLogger("sharedpool.broker")

# Messages taken in one go before timers and process ends get their turn.
_BATCH = 500
# Messages whose answers are sent together, after one write to the journal: while there are more of them than time.
_AT_ONCE = 16
# A loop that was away for so long did not run (SIGSTOP, a suspended machine): silence in that time is no sign.
_AWAY_S = 1.0
# Reports say of these samples that they are 10 s apart.
_SAMPLE_EVERY_S = 10.0
_SHOWN = 200  # characters of what is wrong with garbage
# Sooner than a worker that does not want to wait gives a broker up.
_CHECK_FILES_EVERY_S = 2.0


class Server:
    """One broker. `bind`, then `run` until `drain` or `stop` is called (from any thread or signal handler)."""

    def __init__(
        self, settings: BrokerSettings, reread: Callable[[], BrokerSettings] | None = None
    ) -> None:
        """`reread` returns the settings as they are to be from a `reload` on, or raises `ConfigError`."""
        self.settings = settings
        self._reread = reread
        self._reload_asked = False
        self._lock: BrokerLock | None = None
        self._router = RouterSocket(settings.address, settings.listener)
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._calls: deque[LedgerCall] = deque()
        self._stopping = self._drain_asked = False
        self._drained_by: float | None = None
        self._was_used = self._resting = False
        self._drop_log = DropLog()
        self._watched = Watched(self._selector)
        self._desk: desks.Desk | None = None
        self._metrics: MetricsService | None = None
        self._started = self._sample_at = self._check_files_at = self._awake_at = time.monotonic()
        self._host, self._pid_namespace = socket.gethostname(), pid_namespace_id()

    def bind(self) -> None:
        """Take the address. Raise `AlreadyRunning` when another broker has it, `SharedPoolError` when it cannot be."""
        settings = self.settings
        try:
            self._lock = BrokerLock(addresses.lock_path(settings.address))
        except OSError as error:
            raise SharedPoolError(f"cannot lock {error.filename}: {error.strerror}") from error
        try:
            self._journal = Journal(addresses.journal_path(settings.address))
        except OSError as error:
            self._lock.release()
            raise SharedPoolError(f"cannot write {error.filename}: {error.strerror}") from error
        self._lock.outgrow(max((entry.token.epoch for entry in self._journal.entries), default=0))
        self._open_desk(addresses.desk_path(settings.address))
        self._ledger = Ledger(
            self._lock.epoch,
            max_conn=settings.max_conn,
            ttl_s=settings.ttl_s,
            max_checkout_s=settings.max_checkout_s,
            has_control_connection=settings.dsn is not None,
            journal_complete=self._journal.intact,
            random=random.random,
            instance=self._lock.instance,
            desk="" if self._desk is None else str(self._desk.path),
            # Without a control connection nobody could cancel a query of a connection that has moved.
            handover=self._desk is not None and settings.dsn is not None,
            by_database=settings.automatic,
            groups=settings.groups,
            limits=settings.limits,
            server=_server_of(settings.dsn),
            expiration_s=math.inf if settings.expiration_s is None else settings.expiration_s,
        )
        scope = settings.scope or ("" if settings.one_off else scope_of(settings.address))
        self._leadership = (
            Leadership(scope, self._lock.instance, self._call_soon)
            if scope and settings.dsn
            else None
        )
        self._control = Control(
            settings.dsn,
            settings.max_conn,
            self._lock.instance,
            self._call_soon,
            self._journal.servers,
            self._leadership,
            maintenance=settings.automatic,
        )
        self._admin_requests = AdminRequests(
            self._ledger, self._control, self._execute, self._report
        )
        self._custody = Custody(
            self._desk, self._ledger, self._control, self._execute, self._calls.append
        )
        self._lanes = self._custody.lanes = Lanes(
            self._desk, self._ledger, self._selector, self._execute, self._calls.append
        )
        self._unsent: list[tuple[bytes, ToWorker | ToOperator]] = []
        self._deeds: dict[type, Callable[[Any], None]] = {
            Send: self._send,
            Record: self._record,
            Erase: self._erase,
            PassOn: self._pass_on,
            TransferCustody: lambda command: self._custody.transfer(command.token, command.heir),
            OpenLane: self._lanes.open,
            Admit: lambda command: self._journal.admit(command.member),
            Dismiss: lambda command: self._journal.dismiss(command.session),
            InviteToLane: self._let_in,
            GiveInLane: self._to_lane,
            JoinQueue: self._lanes.join_queue,
            StartMoves: self._lanes.start_moves,
            HaltMoves: self._lanes.halt_moves,
            CloseLane: self._lanes.close_lane,
            CancelBackend: self._control.cancel_backend,
            MarkJournalComplete: lambda _: self._journal.mark_complete(),
            RecordServer: lambda command: self._journal.record_server(command.server),
            Fence: self._custody.end_backend,
            SurveyServer: self._control.survey,
            VerifyServer: self._control.verify_server,
            Watch: self._watch,
            Forget: self._forget,
            Log: lambda log: logger.log(
                log.level, "%s", log.text, extra={"sharedpool": log.fields}
            ),
        }
        self._files = AddressFiles(
            settings.address, self._lock, self._journal, self._router, self._desk
        )
        # A crashed broker leaves its socket, should somebody have deleted the rest.
        self._follows = not self._lock.first or self._router.left_behind
        self._open_metrics()
        try:
            self._router.bind()
        except SharedPoolError:
            self._unlock()
            raise

    def _open_desk(self, path: Path | None) -> None:
        """Open the desk where there can be one; without it workers see their backends' ends by themselves."""
        if not desks.SUPPORTED or path is None:
            return
        try:
            self._desk = desks.Desk(path)
        except OSError as error:
            logger.warning(
                "no desk at %s (%s): a killed worker's slots come back later", path, error
            )

    def _open_metrics(self) -> None:
        if not self.settings.metrics:
            return
        from sharedpool.broker.metrics.service import MetricsService

        try:
            self._metrics = MetricsService(self.settings.metrics, self._call_soon, self._report)
        except SharedPoolError:
            self._unlock()
            raise

    def _unlock(self) -> None:
        assert self._lock is not None
        if self._metrics is not None:
            self._metrics.stop()
        if self._desk is not None:
            self._desk.unlink()
            self._desk.close()
        self._journal.close(for_good=self._lock.first and not self._journal.entries)
        self._lock.release()

    def run(self) -> None:
        """Serve until stopped, or until nobody has used the broker for `linger_s`."""
        self._selector.register(self._router, selectors.EVENT_READ, self._router.on_readable)
        self._selector.register(self._wake_in, selectors.EVENT_READ, None)
        if self._desk is not None:
            self._selector.register(self._desk.lines, selectors.EVENT_READ, self._desk.receive)
            self._selector.register(
                self._desk.custody, selectors.EVENT_READ, self._desk.check_custody
            )
        assert self._lock is not None, "bind() first"
        raise_descriptor_limit()
        self._announce()
        self._control.start()
        self._take_over()
        if self._metrics is not None:
            self._metrics.start()
        notify(self.settings.notify, "READY=1")
        unused_since = self._awake_at = time.monotonic()
        try:
            while not self._stopping:
                if self._router.readable:
                    self._read_messages()
                more = self._router.readable
                now = time.monotonic()
                if now - self._awake_at > _AWAY_S:
                    self._ledger.process_was_suspended(now)
                while self._calls and not more:  # last words before a death
                    self._execute(self._calls.popleft()(self._ledger, now))
                self._execute(self._ledger.tick(now))
                if self._reload_asked:
                    self._reload(now)
                self._admin_requests.answer(now)
                if self._is_drained(now):
                    break
                if now >= self._sample_at:
                    self._sample_at, self._was_used = now + _SAMPLE_EVERY_S, True
                    self._ledger.sample()
                used = bool(self._ledger.leases or self._ledger.sessions)
                if self.settings.automatic:
                    self._rest(now, used=used)
                if now >= self._check_files_at:
                    self._check_files_at = now + _CHECK_FILES_EVERY_S
                    if not self._files.check(wanted=used or self.settings.linger_s is None):
                        break
                if used or self.settings.linger_s is None:
                    unused_since = now
                elif now - unused_since >= self.settings.linger_s:
                    logger.info("unused for %.0f s: leaving", self.settings.linger_s)
                    break
                timeout_s = 0.0 if more else self._timeout_s(now, unused_since)
                self._awake_at = time.monotonic() + timeout_s
                self._wait(timeout_s)
        finally:
            self._close()

    def _rest(self, now: float, *, used: bool) -> None:
        """Keep the control connection in nobody's way while nobody uses the broker.

        Whoever comes then is granted nothing before the limit's lock was claimed again.
        """
        self._was_used = self._was_used or used
        if used and self._resting:
            self._resting = False
            self._control.need(True)
        elif self._was_used and not (used or self._resting) and self._ledger.state == "serving":
            self._resting = True
            if self._leadership is not None:
                self._execute(self._ledger.outranked(now, self._missing_answers()))
            self._control.need(False)

    def stop(self) -> None:
        """Make `run` return soon. Safe in a signal handler and from any thread."""
        self._stopping = True
        self._wake()

    def reload(self) -> None:
        """Have the settings read again soon. Safe in a signal handler and from any thread."""
        self._reload_asked = True
        self._wake()

    def _reload(self, now: float) -> None:
        self._reload_asked = False
        if self._reread is None:
            logger.warning("there is no configuration file to read again")
            return
        try:
            new = self._reread()
        except ConfigError as error:
            for line in str(error).splitlines():
                logger.error("not reloaded: %s", line)
            return
        old, live = (
            self.settings,
            replace(self.settings, max_conn=new.max_conn, groups=new.groups, limits=new.limits),
        )
        self.settings = live
        self._execute(self._ledger.configure(new.max_conn, new.groups, new.limits, now))
        changed, waiting = _different(old, live), _different(live, new)
        logger.info(
            "reloaded: %s", "new " + ", ".join(changed) if changed else "nothing has changed"
        )
        if waiting:
            logger.warning("only a restart changes %s", ", ".join(waiting))

    def drain(self) -> None:
        """Make `run` return when all leases are back, or after `drain_timeout_s`; at once when called again.

        Safe in a signal handler and from any thread.
        """
        if self._drain_asked:
            self._stopping = True
        self._drain_asked = True
        self._wake()

    def _is_drained(self, now: float) -> bool:
        if not self._drain_asked:
            return False
        if self._drained_by is None:
            self._drained_by = now + self.settings.drain_timeout_s
            text = "draining %d leases, for at most %.1f s; a second signal ends it at once"
            logger.info(text, self._ledger.leases, self.settings.drain_timeout_s)
            notify(self.settings.notify, "STOPPING=1")
            self._execute(self._ledger.drain(now))
        if not self._ledger.leases:
            return True
        if now >= self._drained_by:
            logger.warning(
                "%d leases were not brought back: their connections live on", self._ledger.leases
            )
            return True
        return False

    def _take_over(self) -> None:
        """Begin where a former broker ended."""
        assert self._lock is not None
        now = time.monotonic()
        # Without a control connection there is nobody to confirm the end of what the dead have left: it stays counted.
        self._execute(self._ledger.restore(self._journal.entries, now, self._journal.members))
        if self._leadership is not None:  # until the control connection has been tried
            self._execute(self._ledger.outranked(now, self._missing_answers()))
        if self._follows and not self._journal.intact:
            self._execute(self._ledger.begin_grace_period(self._ledger.grace_s, now))
        elif self._leadership is None:
            self._journal.mark_complete()

    def _missing_answers(self) -> str:
        server = ConnInfo(self.settings.dsn or "").identity()
        return f"PostgreSQL has not answered its first connect to {server}"

    def stop_when_closed(self, fd: int) -> None:
        """Stop when the other end of this pipe is closed: its owner is gone. Call before `run`."""
        self._selector.register(fd, selectors.EVENT_READ, self.stop)

    # --- input

    def _read_messages(self) -> None:
        for number, incoming in enumerate(self._router.read(_BATCH), 1):
            self._handle(incoming)
            if number % _AT_ONCE == 0:
                self._deliver()
        self._deliver()

    def _handle(self, incoming: Incoming) -> None:
        session, body, frame = incoming
        try:
            message = decode_to_broker(body)
        except ProtocolError as error:
            if (version := hello_version(body)) not in (None, PROTOCOL_VERSION):
                self._unsent.append((session, Reject(version_mismatch_text(version), fatal=True)))
            else:
                name = session.hex()[:12]
                self._drop_log.dropped(
                    "dropped a message from %s: %s", name, str(error)[:_SHOWN], session=name
                )
            return
        now = time.monotonic()
        if isinstance(message, Status):
            self._admin_requests.ask(session, message, now)
        elif isinstance(message, Order):
            near = self._router.is_local or self._router.sender(frame).loopback
            self._admin_requests.order(session, message, now, near=near)
        elif isinstance(message, Hello):
            self._register(session, message, self._router.sender(frame), now)
        else:
            self._carry_out(self._ledger.handle(session, message, now))

    def _register(self, session: bytes, hello: Hello, peer: Peer, now: float) -> None:
        # By tcp only a process of this very host, by loopback, can be found by the pid it claims; in another PID
        # namespace (a pod, a container on the host's network) that is somebody else's, or nobody's.
        if hello.host == self._host:
            hello = structs.replace(hello, host="")  # in texts only other hosts are named
        near = peer.loopback and not hello.host and hello.pid_namespace == self._pid_namespace
        pid = peer.pid or (hello.pid if near else 0)
        if pid:
            hello = structs.replace(
                hello, pid=pid
            )  # a container's first process is 1 to itself, and so is any other's
        elif not hello.host and hello.pid_namespace != self._pid_namespace:
            hello = structs.replace(hello, host=pid_namespace(hello.pid_namespace))
        self._carry_out(self._ledger.handle(session, hello, now, process(pid) if pid else None))

    def _wait(self, timeout: float | None) -> None:
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._wake_in:
                with contextlib.suppress(BlockingIOError):
                    self._wake_in.recv(4096)
            elif isinstance(key.data, WatchedProcess):
                for session in list(key.data.sessions):
                    self._died(session)
            elif key.data is not None:
                key.data()

    def _timeout_s(self, now: float, unused_since: float) -> float:
        if self._router.poll() or self._calls:
            return 0.0
        deadlines = [
            self._sample_at,
            self._check_files_at,
            *([] if self._drained_by is None else [self._drained_by]),
        ]
        if (deadline := self._admin_requests.next_deadline()) is not None:
            deadlines.append(deadline)
        if (deadline := self._ledger.next_deadline()) is not None:
            deadlines.append(deadline)
        if self.settings.linger_s is not None and not (
            self._ledger.leases or self._ledger.sessions
        ):
            deadlines.append(unused_since + self.settings.linger_s)
        return max(0.0, min(deadlines) - now)

    def _died(self, session: bytes) -> None:
        self._watched.forget(session)
        # Last words first: a RELEASE that is already here is better evidence than a death.
        self._calls.append(lambda ledger, now: ledger.session_died(session, now))

    def _call_soon(self, call: LedgerCall) -> None:
        self._calls.append(call)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it is awake already
            self._wake_out.send(b"\0")

    # --- output

    def _execute(self, commands: list[Command]) -> None:
        self._carry_out(commands)
        self._deliver()

    def _carry_out(self, commands: list[Command]) -> None:
        """Do what was decided, but for what is to be sent and written: `_deliver` does that."""
        for command in commands:
            self._deeds[type(command)](command)

    def _deliver(self) -> None:
        """Write what was decided, then tell of it: a grant that is not in the journal must not leave."""
        self._journal.flush()
        if self._unsent:
            for session, message in self._unsent:
                self._router.send(session, encode(message))
            self._unsent.clear()

    def _send(self, send: Send) -> None:
        self._unsent.append((send.session, send.message))

    def _record(self, record: Record) -> None:
        self._journal.record(record.entry)
        if record.entry.backend is not None:
            self._control.note_server(record.entry.backend.boot_us)

    def _pass_on(self, command: PassOn) -> None:
        self._deliver()
        self._lanes.pass_on(command)

    def _erase(self, erase: Erase) -> None:
        self._journal.erase(erase.token)
        self._custody.erase(erase.token)

    def _let_in(self, command: InviteToLane) -> None:
        self._deliver()
        self._lanes.invite(command)

    def _to_lane(self, command: GiveInLane) -> None:
        self._deliver()
        self._lanes.give(command)

    def _forget(self, command: Forget) -> None:
        self._watched.forget(command.session)
        self._lanes.session_ended(command.session)

    def _watch(self, command: Watch) -> None:
        if not self._watched.watch(command.session, command.process):
            self._died(command.session)

    # --- words

    def _announce(self) -> None:
        settings = self.settings
        limit = (
            f"{settings.max_conn} connections over all pools"
            if settings.max_conn
            else "each pool's own max_conn"
        )
        epoch = self._ledger.epoch
        text = "broker %d at %s enforces %s (epoch %d)"
        logger.info(
            text,
            os.getpid(),
            settings.address,
            limit,
            epoch,
            extra={"sharedpool": {"epoch": epoch}},
        )

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
            len(self._custody),
            "serving" if self._resting else self._ledger.state,
        )

    def _close(self) -> None:
        notify(self.settings.notify, "STOPPING=1")
        if self._metrics is not None:
            self._metrics.stop()
        self._control.stop()
        self._watched.close()
        self._router.close()
        assert self._lock is not None
        ours = self._lock.is_ours()
        if ours:
            self._router.unlink()  # before the lock is let go: afterwards the path may be the next broker's
        self._lanes.close()
        if self._desk is not None:
            if ours:
                self._desk.unlink()
            self._desk.close()
        self._journal.close(for_good=self.settings.one_off and ours)
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()
        self._lock.release(for_good=self.settings.one_off)
        logger.info("broker %d stopped", os.getpid())


def _server_of(dsn: str | None) -> str:
    """Return what the description of a server (`conninfo.ServerIdentity`) contains that is at the address of `dsn`."""
    if dsn is None:
        return ""
    try:
        identity = ConnInfo(dsn).identity()
    except ConfigError:
        return "\0"  # the connect will say what is wrong
    return f"@{identity.host}:{identity.port}/"


def _different(one: BrokerSettings, other: BrokerSettings) -> list[str]:
    return [
        each.name for each in fields(one) if getattr(one, each.name) != getattr(other, each.name)
    ]
