"""Custody: the broker's duplicates of the workers' sockets, and the desk where they are handed in.

PostgreSQL holds its end of a connection's socket open until the backend has exited (`socket_close` in its pqcomm.c). A
duplicate in an epoll set, watched for EPOLLRDHUP and nothing else, therefore tells the broker that a slot is free, with
no SQL and no word from the worker, and is silent while the worker uses the connection. (A TCP socket that has only died
on this side, by a RST or a time-out, tells nothing: `hangup.py`.) It is also how a dead worker's session is *cut*: the
duplicate keeps the connection open, so the broker must shut it down.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path

from sharedpool.errors import ProtocolError
from sharedpool.hangup import other_side_closed
from sharedpool.wire.codec import decode_to_desk
from sharedpool.wire.messages import Deposit, Token

logger = logging.getLogger("sharedpool.broker")

SUPPORTED = hasattr(select, "EPOLLRDHUP") and hasattr(socket, "SO_PEERCRED")
_BACKLOG = 4096
_PACKET_BYTES = 4096
_UCRED = struct.Struct("3i")  # pid, uid, gid


class Desk:
    """The listener, the workers' lines to it, and what is in custody.

    `expects(session, token)` says whether a socket may be handed in for a lease. `deposited(token)` is called for what
    has come, `gone(token)` when a backend has ended, `lost(token)` when only the socket has: its backend may live on.
    """

    def __init__(
        self,
        path: Path,
        expects: Callable[[bytes, Token], bool],
        deposited: Callable[[Token], None],
        gone: Callable[[Token], None],
        lost: Callable[[Token], None],
    ) -> None:
        """Listen at `path`; the address's lock must be held. Raise OSError when that cannot be."""
        self.path = path
        self._expects = expects
        self._deposited = deposited
        self._gone = gone
        self._lost = lost
        self._custody: dict[Token, socket.socket] = {}
        self._tokens: dict[int, Token] = {}
        self._lines: dict[int, socket.socket] = {}
        if path.is_symlink() or (path.exists() and not path.is_socket()):
            raise FileExistsError(errno.EEXIST, "there is a file that is no socket", str(path))
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        path.unlink(missing_ok=True)
        mask = os.umask(0o177)  # this user's alone
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(mask)
        self._listener.listen(_BACKLOG)
        self._spare = os.open(os.devnull, os.O_RDONLY)  # for the moment when there are no descriptors left
        self._lines_epoll, self._custody_epoll = select.epoll(), select.epoll()
        self._lines_epoll.register(self._listener, select.EPOLLIN)

    def __len__(self) -> int:
        return len(self._custody)

    @property
    def lines(self) -> select.epoll:
        """Readable when `receive` has something to do."""
        return self._lines_epoll

    @property
    def custody(self) -> select.epoll:
        """Readable when `see` has something to do."""
        return self._custody_epoll

    # --- the desk

    def receive(self) -> None:
        """Take in new lines and what is handed in on the others."""
        for fd, _ in self._lines_epoll.poll(0):
            if fd == self._listener.fileno():
                self._accept()
            elif fd in self._lines:
                self._read(self._lines[fd])

    def _accept(self) -> None:
        while True:
            try:
                line, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._turn_away(error)
                elif error.errno != errno.ECONNABORTED:
                    logger.warning("the desk cannot take in a worker: %s", error)
                    return
                continue
            line.setblocking(False)
            _, uid, _ = _UCRED.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            if uid not in (os.getuid(), 0):
                logger.warning("dropped a line to the desk from uid %d", uid)
                line.close()
                continue
            self._lines[line.fileno()] = line
            self._lines_epoll.register(line, select.EPOLLIN)

    def _turn_away(self, error: OSError) -> None:
        """Close a line for which there is no descriptor, else it would be offered again and again."""
        logger.warning("the desk turns a worker away: %s", error)
        os.close(self._spare)
        try:
            line, _ = self._listener.accept()
            line.close()
        except OSError:
            pass  # it has left by itself
        finally:
            self._spare = os.open(os.devnull, os.O_RDONLY)

    def _read(self, line: socket.socket) -> None:
        try:
            packet, fds, flags, _ = socket.recv_fds(line, _PACKET_BYTES, 8, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            packet, fds, flags = b"", [], 0
        if not packet and not fds:
            self._lines_epoll.unregister(line)
            del self._lines[line.fileno()]
            line.close()
            return
        taken = False
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) != 1 or not _is_socket(fds[0]):
                raise ProtocolError(f"{len(packet)} bytes and {len(fds)} descriptors instead of one socket")
            taken = self._take(decode_to_desk(packet), fds[0])
        except ProtocolError as error:
            logger.warning("dropped what came to the desk: %s", error)
        finally:
            for fd in fds[1:] if taken else fds:
                os.close(fd)

    def _take(self, deposit: Deposit, fd: int) -> bool:
        if deposit.token in self._custody or not self._expects(deposit.session, deposit.token):
            return False
        held = socket.socket(fileno=fd)
        self._custody[deposit.token] = held
        self._tokens[fd] = deposit.token
        self._custody_epoll.register(fd, select.EPOLLRDHUP)
        self._deposited(deposit.token)
        return True

    # --- custody

    def see(self) -> None:
        """Take in which backends have ended, and which sockets are of no use as evidence any more."""
        for fd, _ in self._custody_epoll.poll(0):
            token = self._tokens.get(fd)
            if token is not None:
                gone = other_side_closed(fd)
                self.drop(token)
                if gone:
                    self._gone(token)
                else:
                    self._lost(token)

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
        os.close(self._spare)
        self._lines_epoll.close()
        self._custody_epoll.close()

    def unlink(self) -> None:
        """Remove the path. The address's lock must be held."""
        self.path.unlink(missing_ok=True)


def _is_socket(fd: int) -> bool:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)
