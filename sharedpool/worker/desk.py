"""The worker's line to the broker's desk: hand in duplicates of sockets; see at once when the broker is gone."""

from __future__ import annotations

import logging
import os
import socket

from sharedpool.owned import Identity, Owned, identity, is_still, let_go
from sharedpool.wire import descriptors
from sharedpool.wire.codec import encode
from sharedpool.wire.desk import Deposit
from sharedpool.wire.messages import Token
from sharedpool.worker.connection import PooledConnection

logger = logging.getLogger("sharedpool.worker")


class Desk:
    """One session's line. Without one (another host or platform) everything works, on the worker's word."""

    def __init__(self) -> None:
        self._line: socket.socket | None = None
        self._known: tuple[Identity, ...] = ()

    @property
    def line(self) -> socket.socket | None:
        """The line; it becomes readable when the broker has gone."""
        return self._line

    def open(self, path: str) -> None:
        """Go to the desk at `path` of this host, if there is one. Does not block."""
        self.close()
        if not path or not hasattr(socket, "SOCK_SEQPACKET"):
            return
        line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            line.setblocking(False)
            line.connect(path)
        except OSError as error:
            logger.info("no desk at %s (%s): connections are closed by this process's own word", path, error)
            line.close()
        else:
            self._known = (identity(line.fileno()),)
            self._line = line

    def deposit(self, session: bytes, token: Token, conn: PooledConnection) -> bool:
        """Hand in a duplicate of a connection's socket; return whether that was done. From any thread, not blocking."""
        line, witness = self._line, conn.sharedpool_witness
        if line is None or witness < 0 or not is_still(line.fileno(), self._known):
            return False
        try:
            copy = Owned(fileno=os.dup(witness))
            try:
                # Another thread may have closed it meanwhile: the number may have been somebody else's already.
                if not is_still(copy.fileno(), conn.sharedpool_known):
                    return False
                descriptors.send_with(line, encode(Deposit(session, token)), copy.fileno())
            finally:
                copy.close()
        except OSError as error:
            logger.debug("lease %s was not deposited: %s", token, error)
            return False
        return True

    def say(self, packet: bytes) -> bool:
        """Send what needs no socket; return whether that was done. From any thread, not blocking."""
        line = self._line
        if line is None or not is_still(line.fileno(), self._known):
            return False
        try:
            line.send(packet)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Leave the desk; in a forked child: let go of the parent's line."""
        line, self._line = self._line, None
        if line is not None:
            let_go(line, self._known)
