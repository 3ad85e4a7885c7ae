"""The worker's line to the broker's desk.

By it the worker deposits duplicates of its sockets, gets invitations to lanes, and sees at once
when the broker ends.
"""

from __future__ import annotations

import os
import socket

from sharedpool.descriptors import passing
from sharedpool.descriptors.owned import Identity, Owned, close_if_ours, identity, is_still
from sharedpool.errors import ProtocolError
from sharedpool.wire.codec import decode_from_desk, encode
from sharedpool.wire.desk import PACKET_BYTES, Deposit, LaneInvitation, Leave, LineOwner
from sharedpool.wire.values import Token
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.logs import logger


class DeskLine:
    """A process's line to a desk.

    Without one, as on another host or platform, everything works, but the broker has only the
    worker's word.
    """

    def __init__(self) -> None:
        self._line: socket.socket | None = None
        # Closed lines on which the broker did not read LEAVE yet.
        self._leaving: list[tuple[socket.socket, tuple[Identity, ...]]] = []
        self._known: tuple[Identity, ...] = ()

    @property
    def line(self) -> socket.socket | None:
        """The line's socket, if there is one. It becomes readable when the broker ends."""
        return self._line

    def open(self, path: str, program: bytes) -> None:
        """Connect to the desk at `path`, if there is one on this host. Does not block.

        `program` is the prefix of the names of all sessions that end when this process does.
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
                "no desk at %s (%s): only this process's own word tells the broker of closed"
                " connections",
                path,
                error,
            )
            line.close()
        else:
            self._known = (identity(line.fileno()),)
            self._line = line

    def deposit(self, session: bytes, token: Token, conn: PooledConnection) -> bool:
        """Deposit a duplicate of a connection's socket; return False if that failed.

        Does not block. Any thread may call it.
        """
        line, witness = self._line, conn.sharedpool_witness
        if line is None or witness < 0 or not is_still(line.fileno(), self._known):
            return False
        try:
            copy = Owned(fileno=os.dup(witness))
            try:
                # Another thread may have closed the witness, and its number may have been reused.
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
        """Send a packet without a socket; return False if that failed.

        Does not block. Any thread may call it.
        """
        line = self._line
        if line is None or not is_still(line.fileno(), self._known):
            return False
        try:
            line.send(packet)
        except OSError:
            return False
        return True

    def read(self) -> tuple[LaneInvitation | None, list[int]] | None:
        """Read an invitation to a lane, if one has come, and its descriptors.

        Return None if the broker has ended.
        """
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
            pass  # a broker of another version, which has refused our HELLO
        finally:
            for fd in fds:
                os.close(fd)
        return None, []

    def close(self) -> None:
        """Send LEAVE and close the line.

        A line that ends without it tells the broker that this process has ended.
        """
        line, self._line = self._line, None
        leaving = [*self._leaving, *([] if line is None else [(line, self._known)])]
        self._leaving = [(each, known) for each, known in leaving if not _leave(each, known)]

    def disown(self) -> None:
        """Close the parent's line in a forked child."""
        line, self._line = self._line, None
        for each, known in [*self._leaving, *([] if line is None else [(line, self._known)])]:
            close_if_ours(each, known)
        self._leaving = []


def _leave(line: socket.socket, known: tuple[Identity, ...]) -> bool:
    """Send LEAVE and close a line; return False if the broker does not read at present."""
    try:
        if is_still(line.fileno(), known):
            line.send(encode(Leave()))
    except BlockingIOError:
        return False
    except OSError:
        pass  # the broker has ended
    close_if_ours(line, known)
    return True
