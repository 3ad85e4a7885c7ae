"""The desk: where workers deposit duplicates of their sockets, and hand connections over.

PostgreSQL keeps its end of a connection's socket open until the backend has exited (`socket_close`
in its pqcomm.c). A duplicate in an epoll set, watched for EPOLLRDHUP alone, therefore tells the
broker that a slot is free, without SQL and without the worker's help. It is silent while the worker
uses the connection.

A closed socket proves nothing in two cases: a TCP socket has died only on this side, by a RST or a
time-out (`postgres/peer_closed.py`), or a proxy has closed it (`postgres/route.py`).

The duplicate serves two more purposes. It keeps the connection open when its worker dies, so the
broker must shut it down to end the session. And it is how a connection moves from one worker to
another (`broker/core/handover.py`).
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import stat
import struct
import time
from pathlib import Path
from typing import Protocol

from sharedpool.broker.server.drop_log import DropLog
from sharedpool.broker.server.processes import called
from sharedpool.broker.server.router_socket import refresh_if_ours
from sharedpool.descriptors import passing
from sharedpool.errors import ProtocolError
from sharedpool.postgres.peer_closed import other_side_closed
from sharedpool.wire.codec import decode_to_desk, encode
from sharedpool.wire.desk import (
    PACKET_BYTES,
    Deposit,
    Give,
    Joined,
    LaneInvitation,
    Leave,
    LineOwner,
    Opened,
    ToDesk,
)
from sharedpool.wire.values import Token

logger = logging.getLogger("sharedpool.broker")

SUPPORTED = hasattr(select, "EPOLLRDHUP") and hasattr(socket, "SO_PEERCRED")
_BACKLOG = 4096
# How often all lines are read in one turn of the loop, before timers and ends of processes.
_READS_A_TURN = 8
_WARN_EVERY_S = 10.0  # about workers that find no descriptor free
_UCRED = struct.Struct("3i")  # pid, uid, gid


class DeskHandler(Protocol):
    """The events of the desk (see `custody.Custody`)."""

    def expects(self, session: bytes, token: Token) -> bool:
        """Return True if a session may deposit a socket for this lease."""

    def deposited(self, token: Token) -> None:
        """Handle a socket that has come into custody."""

    def opened(self, opened: Opened) -> None:
        """Handle that a worker names the backend of a new connection."""

    def peer_closed(self, token: Token) -> None:
        """Handle a socket in custody that its other side has closed."""

    def socket_died(self, token: Token) -> None:
        """Handle a socket in custody that has died; its backend may live on."""

    def given(self, give: Give) -> None:
        """Handle a connection that is to be passed on."""

    def joined(self, session: bytes, *, takes_part: bool) -> None:
        """Handle a session's answer to the invitation into its pool's lane."""

    def line_leaving(self, line: int) -> None:
        """Record that a line is about to close although its program goes on."""

    def line_identified(self, program: bytes, line: int) -> None:
        """Record which program a line belongs to."""

    def line_closed(self, line: int) -> None:
        """Handle a closed line."""


class Desk:
    """The listener, the workers' lines to it, and the sockets in custody.

    Lines are named by numbers that are never used twice; their descriptors are.
    """

    def __init__(self, path: Path) -> None:
        """Listen at `path`; the address's lock must be held. Raise OSError if that fails."""
        self.path = path
        self._custody: dict[Token, socket.socket] = {}
        self._tokens: dict[int, Token] = {}  # by descriptor
        self._lines: dict[int, socket.socket] = {}  # by descriptor
        self._numbers: dict[int, int] = {}  # of the lines, by descriptor
        self._numbered: dict[int, socket.socket] = {}  # the lines by number
        self._newest = 0
        self._drop_log = DropLog()
        self._listener = self._listen()
        self._listener_stat = path.stat()
        # Closed for a moment when no descriptor is left: see `_turn_away`.
        self._spare = os.open(os.devnull, os.O_RDONLY)
        self._warned_at = float("-inf")
        self._lines_epoll, self._custody_epoll = select.epoll(), select.epoll()
        self._lines_epoll.register(self._listener, select.EPOLLIN)

    def _listen(self) -> socket.socket:
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_socket()):
            raise FileExistsError(errno.EEXIST, "exists and is not a socket", str(self.path))
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.path.unlink(missing_ok=True)
        mask = os.umask(0o177)  # only this user may connect
        try:
            listener.bind(str(self.path))
        except OSError:
            listener.close()
            raise
        finally:
            os.umask(mask)
        listener.listen(_BACKLOG)
        return listener

    def recreate_if_deleted(self) -> bool:
        """Listen again if the socket's file was deleted, else refresh its time stamps.

        Return True if the file was deleted. Raise OSError if it cannot be made again.
        """
        if refresh_if_ours(self.path, self._listener_stat):
            return False
        fresh = self._listen()
        self._accept()  # workers that connected before the file was deleted
        self._lines_epoll.unregister(self._listener)
        self._listener.close()
        self._listener, self._listener_stat = fresh, self.path.stat()
        self._lines_epoll.register(fresh, select.EPOLLIN)
        return True

    def __len__(self) -> int:
        return len(self._custody)

    @property
    def lines(self) -> select.epoll:
        """Readable when `receive` has something to do."""
        return self._lines_epoll

    @property
    def custody(self) -> select.epoll:
        """Readable when `check_custody` has something to do."""
        return self._custody_epoll

    # --- lines

    def receive(self, handler: DeskHandler) -> None:
        """Accept new lines, and read what has come on the others."""
        for _ in range(_READS_A_TURN):
            ready = self._lines_epoll.poll(0)
            for fd, _ in ready:
                if fd == self._listener.fileno():
                    self._accept()
                elif fd in self._lines:
                    self._read(self._lines[fd], handler)
            if not ready:
                return

    def _accept(self) -> None:
        while True:
            try:
                line, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    if not self._turn_away(error):
                        return
                elif error.errno != errno.ECONNABORTED:
                    logger.warning("the desk cannot accept a worker: %s", error)
                    return
                continue
            line.setblocking(False)
            pid, uid, _ = _UCRED.unpack(
                line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            )
            if uid not in (os.geteuid(), 0):
                self._drop_log.dropped("dropped a line to the desk from uid %d%s", uid, called(pid))
                line.close()
                continue
            self._newest += 1
            self._lines[line.fileno()] = self._numbered[self._newest] = line
            self._numbers[line.fileno()] = self._newest
            self._lines_epoll.register(line, select.EPOLLIN)

    def _turn_away(self, error: OSError) -> bool:
        """Close a line for which no descriptor is left: epoll would offer it again and again.

        The spare descriptor is closed to accept the line, and opened again. Return False if
        libzmq's thread has taken it in between.
        """
        now = time.monotonic()
        if now - self._warned_at >= _WARN_EVERY_S:
            self._warned_at = now
            text = "the desk turns workers away (%s): raise the limit of open files (`ulimit -n`)"
            logger.warning(text, error)
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        try:
            line, _ = self._listener.accept()
            line.close()
            self._spare = os.open(os.devnull, os.O_RDONLY)
        except OSError:
            pass
        return self._spare >= 0

    def _read(self, line: socket.socket, handler: DeskHandler) -> None:
        try:
            packet, fds, whole = passing.receive(line, PACKET_BYTES)
        except BlockingIOError:
            return
        except OSError:
            packet, fds, whole = b"", [], True  # the line is broken: the same as its end
        if not packet and not fds:
            handler.line_closed(self._close_line(line))
            return
        deposited = False
        try:
            message = decode_to_desk(packet)
            expected = int(isinstance(message, Deposit))
            if not whole or len(fds) != expected or not all(map(_is_socket, fds)):
                text = (
                    f"{len(packet)} bytes and {len(fds)} descriptors instead of {expected} sockets"
                )
                raise ProtocolError(text)
            if isinstance(message, Deposit):
                deposited = self._deposit(message, fds[0], handler)
            else:
                self._handle(message, self._numbers[line.fileno()], handler)
        except ProtocolError as error:
            self._drop_log.dropped("dropped a malformed message at the desk: %s", error)
        finally:
            for fd in fds[1:] if deposited else fds:
                os.close(fd)

    @staticmethod
    def _handle(message: ToDesk, number: int, handler: DeskHandler) -> None:
        if isinstance(message, Give):
            handler.given(message)
        elif isinstance(message, Opened):
            handler.opened(message)
        elif isinstance(message, Leave):
            handler.line_leaving(number)
        elif isinstance(message, LineOwner):
            handler.line_identified(message.program, number)
        elif isinstance(message, Joined):
            handler.joined(message.session, takes_part=message.takes_part)

    def _close_line(self, line: socket.socket) -> int:
        """Close a line; return its number."""
        number = self._numbers.pop(line.fileno())
        self._lines_epoll.unregister(line)
        del self._lines[line.fileno()], self._numbered[number]
        line.close()
        return number

    def send_descriptors(self, number: int, message: LaneInvitation, fds: list[int]) -> None:
        """Send descriptors on a line. A worker whose line is full is not let into the lane."""
        if (line := self._numbered.get(number)) is not None:
            try:
                passing.send_with_all(line, encode(message), fds)
            except OSError as error:
                logger.debug("a worker was not let into the lane: %s", error)

    def fileno_of(self, token: Token) -> int:
        """Return the descriptor of a lease's socket, -1 if it is not in custody."""
        held = self._custody.get(token)
        return -1 if held is None else held.fileno()

    def _deposit(self, deposit: Deposit, fd: int, handler: DeskHandler) -> bool:
        """Take a socket into custody; return False if nothing expects it."""
        token = deposit.token
        if token in self._custody or not handler.expects(deposit.session, token):
            return False
        self._custody[token] = socket.socket(fileno=fd)
        self._tokens[fd] = token
        self._custody_epoll.register(fd, select.EPOLLRDHUP)
        handler.deposited(token)
        return True

    # --- custody

    def check_custody(self, handler: DeskHandler) -> None:
        """Find the backends that have ended, and the sockets that are no evidence any more."""
        for fd, _ in self._custody_epoll.poll(0):
            token = self._tokens.get(fd)
            if token is not None:
                peer_closed = other_side_closed(fd)
                self.drop(token)
                if peer_closed:
                    handler.peer_closed(token)
                else:
                    handler.socket_died(token)

    def cut(self, token: Token) -> bool:
        """End the client's side of a connection; return True if its socket is in custody.

        Only the sending half is shut down, so that the socket still shows the backend's exit. An
        idle backend exits at once; one in a query must be terminated (`Control`).
        """
        held = self._custody.get(token)
        if held is None:
            return False
        try:
            held.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the other side has closed it already
        return True

    def transfer(self, token: Token, heir: Token) -> None:
        """Keep a lease's socket for another lease."""
        held = self._custody.pop(token, None)
        if held is not None:
            self._custody[heir] = held
            self._tokens[held.fileno()] = heir

    def drop(self, token: Token) -> None:
        """Close a lease's socket, if it is in custody."""
        held = self._custody.pop(token, None)
        if held is not None:
            self._custody_epoll.unregister(held)
            del self._tokens[held.fileno()]
            held.close()

    def close(self) -> None:
        """Close everything. Connections stay open: the workers have their own descriptors."""
        for token in list(self._custody):
            self.drop(token)
        for line in self._lines.values():
            line.close()
        self._listener.close()
        if self._spare >= 0:
            os.close(self._spare)
        self._lines_epoll.close()
        self._custody_epoll.close()

    def unlink(self) -> None:
        """Remove the path. The address's lock must be held."""
        self.path.unlink(missing_ok=True)


def _is_socket(fd: int) -> bool:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)
