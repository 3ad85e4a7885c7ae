"""The broker's loop: messages and process ends in, the ledger decides, its commands are carried out.

One thread owns the ROUTER socket and the ledger. Every worker on this host is watched by a pidfd, which becomes
readable the moment the process ends. What other threads have to say (the control connection, `stop`) comes through a
queue and a wake-up socket.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import zmq
from msgspec import structs

from sharedpool.broker.commands import Command, Fence, Forget, Log, Send, Watch
from sharedpool.broker.control import Control
from sharedpool.broker.ledger import Ledger
from sharedpool.broker.lock import BrokerLock
from sharedpool.errors import ProtocolError, SharedPoolError
from sharedpool.wire import address as addresses
from sharedpool.wire.codec import MAX_FRAME_BYTES, decode_to_broker, encode
from sharedpool.wire.messages import PROTOCOL_VERSION, Hello, Report, Status, Token

logger = logging.getLogger("sharedpool.broker")

# Messages taken in one go before timers and process ends get their turn.
_BATCH = 500
# A lock file that somebody deleted locks nobody out any more.
_LOOK_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class BrokerSettings:
    """How one broker runs. Times in seconds; `max_conn` None: each pool's own limit only; `linger_s` None: stay."""

    address: str
    max_conn: int | None = None
    dsn: str | None = field(default=None, repr=False)
    expiration_s: float | None = None
    max_checkout_s: float = 0.0
    ttl_s: float = 15.0
    linger_s: float | None = None
    one_off: bool = False  # nobody will ever listen there again: leave no lock file behind


class Server:
    """One broker. `bind`, then `run` until `stop` is called (from any thread or signal handler)."""

    def __init__(self, settings: BrokerSettings) -> None:
        self.settings = settings
        self._lock: BrokerLock | None = None
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._calls: deque[Callable[[float], list[Command]]] = deque()
        self._stopping = False
        self._pidfds: dict[bytes, int] = {}
        self._peers: dict[bytes, int] = {}
        self._started = self._look_at = time.monotonic()
        self._host = socket.gethostname()

    def bind(self) -> None:
        """Take the address. Raise `AlreadyRunning` when another broker has it, `SharedPoolError` when it cannot be."""
        settings = self.settings
        try:
            self._lock = BrokerLock(addresses.lock_path(settings.address))
        except OSError as error:
            raise SharedPoolError(f"cannot lock {error.filename}: {error.strerror}") from error
        self._ledger = Ledger(
            self._lock.epoch,
            max_conn=settings.max_conn,
            ttl_s=settings.ttl_s,
            max_checkout_s=settings.max_checkout_s,
            **({} if settings.expiration_s is None else {"expiration_s": settings.expiration_s}),
        )
        self._control = Control(settings.dsn, settings.max_conn, self._backend_gone)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an unreachable peer is an error, not silence
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a worker that reconnects replaces its old connection
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        if settings.address.startswith("ipc://"):
            path = Path(settings.address.removeprefix("ipc://"))
            if path.is_symlink() or (path.exists() and not path.is_socket()):
                self._lock.release()
                raise SharedPoolError(f"cannot listen at {settings.address}: there is a file that is no socket")
        self._router.setsockopt(zmq.IPV6, 1)
        mask = os.umask(0o177)  # the socket is this user's alone, wherever it lies
        try:
            self._router.bind(settings.address)
        except zmq.ZMQError as error:
            self._lock.release()
            raise SharedPoolError(f"cannot listen at {settings.address}: {error}") from error
        finally:
            os.umask(mask)

    def run(self) -> None:
        """Serve until stopped, or until nobody has used the broker for `linger_s`."""
        self._selector.register(int(self._router.getsockopt(zmq.FD)), selectors.EVENT_READ, None)
        self._selector.register(self._wake_in, selectors.EVENT_READ, None)
        assert self._lock is not None, "bind() first"
        _raise_descriptor_limit()
        self._announce()
        self._control.start()
        unused_since = self._started
        try:
            while not self._stopping:
                more = self._receive()
                now = time.monotonic()
                while self._calls and not more:  # last words before a death
                    self._execute(self._calls.popleft()(now))
                self._execute(self._ledger.tick(now))
                if now >= self._look_at:
                    self._look_at = now + _LOOK_EVERY_S
                    if not self._lock.is_ours():
                        logger.error("the lock file of %s is gone: leaving it to another", self.settings.address)
                        break
                if self._ledger.sessions or self._ledger.leases:
                    unused_since = now
                elif self.settings.linger_s is not None and now - unused_since >= self.settings.linger_s:
                    logger.info("unused for %.0f s: leaving", self.settings.linger_s)
                    break
                self._wait(0.0 if more else self._timeout_s(now, unused_since))
        finally:
            self._close()

    def stop(self) -> None:
        """Make `run` return soon. Safe in a signal handler and from any thread."""
        self._stopping = True
        self._wake()

    def stop_when_closed(self, fd: int) -> None:
        """Stop when the other end of this pipe is closed: its owner is gone. Call before `run`."""
        self._selector.register(fd, selectors.EVENT_READ, self.stop)

    # --- input

    def _receive(self) -> bool:
        """Take in what has arrived; return whether there may be more."""
        for _ in range(_BATCH):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return False
            self._take_in([frame.bytes for frame in frames], frames[-1])
        return True

    def _take_in(self, frames: list[bytes], last: zmq.Frame) -> None:
        session = frames[0]
        try:
            if len(frames) != 2:
                raise ProtocolError(f"{len(frames)} frames instead of 2")
            message = decode_to_broker(frames[1])
        except ProtocolError as error:
            logger.warning("dropped a message from %s: %s", session.hex()[:12], error)
            return
        now = time.monotonic()
        if isinstance(message, Status):
            self._execute([Send(session, self._report(now))])
            return
        if isinstance(message, Hello):
            peer = _peer(last, ipc=self.settings.address.startswith("ipc://"))
            if peer.uid not in (None, os.getuid(), 0):
                logger.warning("dropped a HELLO from uid %d", peer.uid)
                return
            # By tcp only a process of this very host, by loopback, can be found by the pid it claims.
            if message.host == self._host:
                message = structs.replace(message, host="")  # in texts only other hosts are named
            self._peers[session] = peer.pid or (message.pid if peer.loopback and not message.host else 0)
        self._execute(self._ledger.handle(session, message, now))
        self._peers.pop(session, None)

    def _wait(self, timeout: float | None) -> None:
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._wake_in:
                with contextlib.suppress(BlockingIOError):
                    self._wake_in.recv(4096)
            elif isinstance(key.data, bytes):
                self._died(key.data)
            elif key.data is not None:
                key.data()

    def _timeout_s(self, now: float, unused_since: float) -> float:
        # libzmq's descriptor tells of news only once: what came while we were busy must be looked for.
        if self._calls or int(self._router.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            return 0.0
        deadlines = [self._look_at]
        if (deadline := self._ledger.next_deadline()) is not None:
            deadlines.append(deadline)
        if self.settings.linger_s is not None and not (self._ledger.sessions or self._ledger.leases):
            deadlines.append(unused_since + self.settings.linger_s)
        return max(0.0, min(deadlines) - now)

    def _died(self, session: bytes) -> None:
        self._unwatch(session)
        # Last words first: a RELEASE that is already here is better evidence than a death.
        self._calls.append(lambda now: self._ledger.session_died(session, now))

    def _backend_gone(self, token: Token) -> None:
        self._calls.append(lambda now: self._ledger.fenced(token, now))
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it is awake already
            self._wake_out.send(b"\0")

    # --- output

    def _execute(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Send(session, message):
                    self._send(session, encode(message))
                case Fence():
                    self._control.fence(command)
                case Watch(session):
                    self._watch(session)
                case Forget(session):
                    self._unwatch(session)
                case Log(level, text):
                    logger.log(level, "%s", text)

    def _send(self, session: bytes, frame: bytes) -> None:
        try:
            self._router.send_multipart((session, frame), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # Gone or not reading: the state stands, the session's next RENEW or its death repairs it.
            logger.debug("not sent to %s: %s", session.hex()[:12], error)

    def _watch(self, session: bytes) -> None:
        pid = self._peers.get(session)
        if not pid or not hasattr(os, "pidfd_open"):
            return  # another host or platform: heartbeats alone tell
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._calls.append(lambda now: self._ledger.session_died(session, now))
            return
        except OSError as error:
            logger.warning("cannot watch process %d (%s): only its silence will tell of its death", pid, error)
            return
        self._pidfds[session] = fd
        self._selector.register(fd, selectors.EVENT_READ, session)

    def _unwatch(self, session: bytes) -> None:
        fd = self._pidfds.pop(session, None)
        if fd is not None:
            self._selector.unregister(fd)
            os.close(fd)

    # --- words

    def _announce(self) -> None:
        settings = self.settings
        limit = f"{settings.max_conn} connections over all pools" if settings.max_conn else "each pool's own max_conn"
        logger.info("broker %d at %s enforces %s (epoch %d)", os.getpid(), settings.address, limit, self._ledger.epoch)

    def _report(self, now: float) -> Report:
        pools, sessions = self._ledger.report(now)
        return Report(
            PROTOCOL_VERSION,
            self._ledger.epoch,
            os.getpid(),
            self.settings.address,
            int((now - self._started) * 1000),
            self.settings.max_conn or 0,
            self._ledger.leases,
            self._control.state,
            pools,
            sessions,
        )

    def _close(self) -> None:
        self._control.stop()
        for session in list(self._pidfds):
            self._unwatch(session)
        self._router.close()
        self._context.term()
        assert self._lock is not None
        if self.settings.address.startswith("ipc://") and self._lock.is_ours():
            # Before the lock is let go: afterwards the path may be the next broker's.
            Path(self.settings.address.removeprefix("ipc://")).unlink(missing_ok=True)
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()
        self._lock.release(for_good=self.settings.one_off)
        logger.info("broker %d stopped", os.getpid())


class _Peer(NamedTuple):
    uid: int | None = None
    pid: int | None = None
    loopback: bool = False


def _peer(frame: zmq.Frame, *, ipc: bool) -> _Peer:
    """Return who sent a frame: uid and pid as the kernel vouches for them (ipc on Linux), or how it came (tcp)."""
    try:
        address = str(frame.get("Peer-Address"))
    except zmq.ZMQError:
        return _Peer()
    if not ipc:
        return _Peer(loopback=address.removeprefix("::ffff:").startswith("127.") or address == "::1")
    fields = address.rsplit(":", 3)
    return _Peer(int(fields[1]), int(fields[3])) if len(fields) == 4 else _Peer()


def _raise_descriptor_limit() -> None:
    """Allow as many descriptors as we may have: every worker costs two, and libzmq aborts when there are none left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else max(soft, 65536)
    if soft != wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:
            logger.warning("only %d descriptors, for about %d workers: %s", soft, soft // 2, error)
