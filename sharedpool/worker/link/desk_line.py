"""The worker's line to the broker's desk: hand in duplicates of sockets; see at once when the broker is gone."""

from __future__ import annotations

import os
import socket

from sharedpool.descriptors import passing
from sharedpool.descriptors.owned import Identity, Owned, close_if_ours, identity, is_still
from sharedpool.errors import ProtocolError
from sharedpool.wire.codec import decode_from_desk, encode
from sharedpool.wire.desk import PACKET_BYTES, Deposit, LaneInvitation, Leave, LineOwner
from sharedpool.wire.messages import Token
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.logs import logger


class DeskLine:
    """One session's line. Without one (another host or platform) everything works, on the worker's word."""

    def __init__(self) -> None:
        self._line: socket.socket | None = None
        self._leaving: list[
            tuple[socket.socket, tuple[Identity, ...]]
        ] = []  # the broker did not read: it is still to be told
        self._known: tuple[Identity, ...] = ()

    @property
    def line(self) -> socket.socket | None:
        """The line; it becomes readable when the broker has gone."""
        return self._line

    def open(self, path: str, program: bytes) -> None:
        """Go to the desk at `path` of this host, if there is one. Does not block.

        `program`: what the names of all sessions begin with that end with this program.
        """
        self.close()
        if not path or not hasattr(socket, "SOCK_SEQPACKET"):
            return
        line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            line.setblocking(False)
            line.connect(path)
            line.send(encode(LineOwner(program)))
        except OSError as error:
            logger.info(
                "no desk at %s (%s): connections are closed by this process's own word", path, error
            )
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
                passing.send_with(line, encode(Deposit(session, token)), copy.fileno())
            finally:
                copy.close()
        except OSError as error:
            logger.debug("lease %s was not deposited: %s", token, error)
            return False
        return True

    def send(self, packet: bytes) -> bool:
        """Send what needs no socket; return whether that was done. From any thread, not blocking."""
        line = self._line
        if line is None or not is_still(line.fileno(), self._known):
            return False
        try:
            line.send(packet)
        except OSError:
            return False
        return True

    def read(self) -> tuple[LaneInvitation | None, list[int]] | None:
        """Read what came on the line: an invitation to a lane, with its descriptors; None when the broker has gone."""
        line = self._line
        if line is None:
            return None
        try:
            packet, fds, whole = passing.receive(line, PACKET_BYTES)
        except BlockingIOError:
            return None, []
        except OSError:
            return None
        if not packet:
            return None
        try:
            message = decode_from_desk(packet)
            if whole and isinstance(message, LaneInvitation):
                given, fds = fds, []
                return message, given
        except ProtocolError:
            pass  # of a version that is not ours: its HELLO was refused
        finally:
            for fd in fds:
                os.close(fd)
        return None, []

    def close(self) -> None:
        """Leave the desk, saying so: a line that just ends tells that this program has ended."""
        line, self._line = self._line, None
        leaving = [*self._leaving, *([] if line is None else [(line, self._known)])]
        self._leaving = [(each, known) for each, known in leaving if not _said_goodbye(each, known)]

    def disown(self) -> None:
        """In a forked child: let go of the parent's line."""
        line, self._line = self._line, None
        for each, known in [*self._leaving, *([] if line is None else [(line, self._known)])]:
            close_if_ours(each, known)
        self._leaving = []


def _said_goodbye(line: socket.socket, known: tuple[Identity, ...]) -> bool:
    """Say goodbye and close a line, unless the broker does not read just now."""
    try:
        if is_still(line.fileno(), known):
            line.send(encode(Leave()))
    except BlockingIOError:
        return False
    except OSError:
        pass  # the broker has gone
    close_if_ours(line, known)
    return True
