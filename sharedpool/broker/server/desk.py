"""Custody and hand-over: the broker's duplicates of the workers' sockets, and the desk where they are handed in.

PostgreSQL holds its end of a connection's socket open until the backend has exited (`socket_close` in its pqcomm.c). A
duplicate in an epoll set, watched for EPOLLRDHUP and nothing else, therefore tells the broker that a slot is free, with
no SQL and no word from the worker, and is silent while the worker uses the connection. (A TCP socket that has only died
on this side, by a RST or a time-out, tells nothing: `postgres/peer_closed.py`. Nor does one that a proxy has closed:
`postgres/route.py`.) It is also how a dead worker's session is *cut*: the duplicate keeps the connection open, so the
broker must shut it down; and how a connection moves from one worker to another (`broker/core/handover.py`).
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
from sharedpool.broker.server.router_socket import is_at
from sharedpool.descriptors import passing
from sharedpool.errors import ProtocolError
from sharedpool.postgres.peer_closed import other_side_closed
from sharedpool.wire.codec import decode_to_desk, encode
from sharedpool.wire.desk import PACKET_BYTES, Deposit, Give, LaneInvitation, Leave, LineOwner
from sharedpool.wire.messages import Token

logger = logging.getLogger("sharedpool.broker")

SUPPORTED = hasattr(select, "EPOLLRDHUP") and hasattr(socket, "SO_PEERCRED")
_BACKLOG = 4096
# Looked for what comes meanwhile so often before timers and process ends get their turn.
_ROUNDS = 8
_TELL_EVERY_S = 10.0  # of those who are turned away
_UCRED = struct.Struct("3i")  # pid, uid, gid


class DeskHandler(Protocol):
    """What the desk tells: see `custody.py`."""

    def expects(self, session: bytes, token: Token) -> bool:
        """Say whether a socket may be handed in for a lease."""

    def deposited(self, token: Token) -> None:
        """A lease's socket is in custody."""

    def gone(self, token: Token) -> None:
        """The other side of a socket in custody has closed it."""

    def lost(self, token: Token) -> None:
        """A socket in custody has died; its backend may live on."""

    def given(self, give: Give) -> None:
        """A connection is to be passed on."""

    def joined(self, session: bytes, *, takes_part: bool) -> None:
        """A session uses its pool's lane, or will not."""

    def line_leaving(self, line: int) -> None:
        """This line is to end, and its program goes on."""

    def line_identified(self, program: bytes, line: int) -> None:
        """This line ends with a program, unless it is left before."""

    def line_closed(self, line: int) -> None:
        """A line has ended."""


class Desk:
    """The listener, the workers' lines to it, and what is in custody.

    `handler`, set once it is made, is told all that is said here and what becomes of the sockets. Lines are named by
    numbers never used twice.
    """

    handler: DeskHandler

    def __init__(self, path: Path) -> None:
        """Listen at `path`; the address's lock must be held. Raise OSError when that cannot be."""
        self.path = path
        self._custody: dict[Token, socket.socket] = {}
        self._tokens: dict[int, Token] = {}
        self._lines: dict[int, socket.socket] = {}  # by descriptor
        self._numbers: dict[int, int] = {}  # their numbers, by descriptor
        self._numbered: dict[int, socket.socket] = {}
        self._newest = 0
        self._drop_log = DropLog()
        self._listener = self._listen()
        self._ours = path.stat()
        self._spare = os.open(
            os.devnull, os.O_RDONLY
        )  # for the moment when there are no descriptors left
        self._told_at = float("-inf")
        self._lines_epoll, self._custody_epoll = select.epoll(), select.epoll()
        self._lines_epoll.register(self._listener, select.EPOLLIN)

    def _listen(self) -> socket.socket:
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_socket()):
            raise FileExistsError(errno.EEXIST, "there is a file that is no socket", str(self.path))
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.path.unlink(missing_ok=True)
        mask = os.umask(0o177)  # this user's alone
        try:
            listener.bind(str(self.path))
        except OSError:
            listener.close()
            raise
        finally:
            os.umask(mask)
        listener.listen(_BACKLOG)
        return listener

    def mend(self) -> bool:
        """Listen at the path anew if somebody has deleted it, and keep it young; return whether that was so.

        Raise OSError when it cannot be.
        """
        if is_at(self.path, self._ours):
            return False
        fresh = self._listen()
        self._accept()  # who came before it was deleted
        self._lines_epoll.unregister(self._listener)
        self._listener.close()
        self._listener, self._ours = fresh, self.path.stat()
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

    # --- the desk

    def receive(self) -> None:
        """Take in new lines and what is handed in on the others."""
        for _ in range(_ROUNDS):
            ready = self._lines_epoll.poll(0)
            for fd, _ in ready:
                if fd == self._listener.fileno():
                    self._accept()
                elif fd in self._lines:
                    self._read(self._lines[fd])
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
                    logger.warning("the desk cannot take in a worker: %s", error)
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
        """Close a line for which there is no descriptor, else it would be offered again and again.

        Return False when libzmq's thread has taken even the one that was kept for that.
        """
        now = time.monotonic()
        if now - self._told_at >= _TELL_EVERY_S:
            self._told_at = now
            logger.warning(
                "the desk turns workers away: %s: raise the limit (`ulimit -n`, LimitNOFILE=)",
                error,
            )
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

    def _read(self, line: socket.socket) -> None:
        try:
            packet, fds, whole = passing.receive(line, PACKET_BYTES)
        except BlockingIOError:
            return
        except OSError:
            packet, fds, whole = b"", [], True
        if not packet and not fds:
            self._close_line(line)
            return
        taken = False
        try:
            message = decode_to_desk(packet)
            wanted = int(isinstance(message, Deposit))
            if not whole or len(fds) != wanted or not all(map(_is_socket, fds)):
                raise ProtocolError(
                    f"{len(packet)} bytes and {len(fds)} descriptors instead of {wanted} sockets"
                )
            if isinstance(message, Deposit):
                taken = self._take(message, fds[0])
            elif isinstance(message, Give):
                self.handler.given(message)
            elif isinstance(message, Leave):
                self.handler.line_leaving(self._numbers[line.fileno()])
            elif isinstance(message, LineOwner):
                self.handler.line_identified(message.program, self._numbers[line.fileno()])
            else:
                self.handler.joined(message.session, takes_part=message.takes_part)
        except ProtocolError as error:
            self._drop_log.dropped("dropped what came to the desk: %s", error)
        finally:
            for fd in fds[1:] if taken else fds:
                os.close(fd)

    def _close_line(self, line: socket.socket) -> None:
        number = self._numbers.pop(line.fileno())
        self._lines_epoll.unregister(line)
        del self._lines[line.fileno()], self._numbered[number]
        line.close()
        self.handler.line_closed(number)

    def send_descriptors(self, number: int, message: LaneInvitation, fds: list[int]) -> None:
        """Send descriptors on a line. A worker that does not read just now is not let in."""
        if (line := self._numbered.get(number)) is not None:
            try:
                passing.send_with_all(line, encode(message), fds)
            except OSError as error:
                logger.debug("a worker was not let into the lane: %s", error)

    def fileno_of(self, token: Token) -> int:
        """Return the descriptor of a lease's socket in custody; -1 for none."""
        held = self._custody.get(token)
        return -1 if held is None else held.fileno()

    def _take(self, deposit: Deposit, fd: int) -> bool:
        if deposit.token in self._custody or not self.handler.expects(
            deposit.session, deposit.token
        ):
            return False
        held = socket.socket(fileno=fd)
        self._custody[deposit.token] = held
        self._tokens[fd] = deposit.token
        self._custody_epoll.register(fd, select.EPOLLRDHUP)
        self.handler.deposited(deposit.token)
        return True

    # --- custody

    def check_custody(self) -> None:
        """Take in which backends have ended, and which sockets are of no use as evidence any more."""
        for fd, _ in self._custody_epoll.poll(0):
            token = self._tokens.get(fd)
            if token is not None:
                gone = other_side_closed(fd)
                self.drop(token)
                if gone:
                    self.handler.gone(token)
                else:
                    self.handler.lost(token)

    def cut(self, token: Token) -> bool:
        """Tell a backend that its client is gone; return whether its socket is in custody.

        Only our sending half is shut down: so its end of the connection stays the witness of its exit. A backend that
        rests leaves at once; one in the middle of a query must be ended otherwise (`Control`).
        """
        held = self._custody.get(token)
        if held is None:
            return False
        try:
            held.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it was faster
        return True

    def transfer(self, token: Token, heir: Token) -> None:
        """Keep a lease's socket for another lease."""
        held = self._custody.pop(token, None)
        if held is not None:
            self._custody[heir] = held
            self._tokens[held.fileno()] = heir

    def drop(self, token: Token) -> None:
        """Let go of a socket: its slot is free."""
        held = self._custody.pop(token, None)
        if held is not None:
            self._custody_epoll.unregister(held)
            del self._tokens[held.fileno()]
            held.close()

    def close(self) -> None:
        """Let go of everything. No connection ends by that: the workers have theirs."""
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
