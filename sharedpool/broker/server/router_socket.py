"""The broker's ROUTER socket: admit peers, read messages with their session, send messages."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import zmq

from sharedpool.broker.server.drop_log import DropLog
from sharedpool.broker.server.processes import Peer, called, peer_of
from sharedpool.errors import SharedPoolError
from sharedpool.wire.channel import from_session, is_of_former_connection, to_session
from sharedpool.wire.codec import MAX_FRAME_BYTES, encode
from sharedpool.wire.messages import Reject

logger = logging.getLogger("sharedpool.broker")

_READABLE = int(zmq.POLLIN)
_NOW = zmq.NOBLOCK
_NOW_AND_MORE = zmq.NOBLOCK | zmq.SNDMORE
_MOST_ADMITTED = 50_000


def refresh_if_ours(path: Path, ours: os.stat_result) -> bool:
    """Refresh the time stamps of a socket's file; return False if it is not at its path."""
    try:
        if not os.path.samestat(ours, path.lstat()):
            return False
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


class Incoming(NamedTuple):
    """A message that has come."""

    session: bytes
    body: bytes
    frame: zmq.Frame  # tells the sender: see `RouterSocket.sender`


class RouterSocket:
    """The socket; `readable` is True if there may be something to `read`.

    libzmq's descriptor is edge-triggered, and any call on the socket may consume the edge. So after
    each use `poll` must ask whether messages have come meanwhile.
    """

    def __init__(self, address: str, listener: int | None) -> None:
        """`listener` is systemd's socket, which listens at the address already."""
        self._address = address
        self._inherited = listener is not None
        self._path = Path(address.removeprefix("ipc://")) if address.startswith("ipc://") else None
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        # An unreachable peer is an error, and a worker that reconnects replaces its old connection.
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._router.setsockopt(zmq.IPV6, 1)
        if listener is not None:
            self._router.setsockopt(zmq.USE_FD, listener)
        self._drop_log = DropLog()
        # Routing ids of the peers that we serve. They are secret, so no other peer can use one.
        self._admitted: set[bytes] = set()
        self._ours: os.stat_result | None = None  # our socket's file
        self.readable = self._used = True

    @property
    def is_local(self) -> bool:
        """Whether all peers are on this host."""
        return self._path is not None

    @property
    def left_behind(self) -> bool:
        """Whether a crashed broker has left its socket. To be asked before `bind`."""
        return self._path is not None and not self._inherited and self._path.exists()

    def bind(self) -> None:
        """Listen. Raise `SharedPoolError` if that fails."""
        if self._path is not None and (
            self._path.is_symlink() or (self._path.exists() and not self._path.is_socket())
        ):
            raise SharedPoolError(
                f"cannot listen at {self._address}: it exists and is not a socket"
            )
        mask = os.umask(0o177)  # only this user may connect, wherever the socket is
        try:
            self._router.bind(self._address)
        except zmq.ZMQError as error:
            raise SharedPoolError(f"cannot listen at {self._address}: {error}") from error
        finally:
            os.umask(mask)
        if self._path is not None and not self._inherited:
            self._ours = self._path.stat()

    def recreate_if_deleted(self) -> bool:
        """Listen again if the socket's file was deleted, else refresh its time stamps.

        Return True if the file was deleted. Connected peers remain connected. A socket of systemd's
        is left to systemd. Raise OSError or `SharedPoolError` if the file cannot be made again.
        """
        if self._path is None or self._ours is None or refresh_if_ours(self._path, self._ours):
            return False
        self.bind()
        return True

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when messages may have come."""
        return int(self._router.getsockopt(zmq.FD))

    def on_readable(self) -> None:
        """Record that the descriptor was readable."""
        self.readable = True

    def poll(self) -> bool:
        """Return True if there is something to read."""
        if self._used:
            self._used = False
            self.readable = self._has_messages()
        return self.readable

    def _has_messages(self) -> bool:
        return bool(int(self._router.getsockopt(zmq.EVENTS)) & _READABLE)

    def read(self, most: int) -> Iterator[Incoming]:
        """Yield up to `most` messages of peers that are served. Does not block."""
        self._used = True
        receive, admitted = self._router.recv, self._admitted
        for count in range(most):
            # Messages mostly come singly, and a raised zmq.Again is expensive.
            if count == 1 and not self._has_messages():
                self.readable = False
                return
            try:
                routing_id = receive(_NOW)
                frame = receive(_NOW, copy=False)  # a message comes as a whole
            except zmq.Again:
                self.readable = False
                return
            excess = self._drop_excess() if frame.more else 0
            session, body = to_session(routing_id, frame.bytes)
            if routing_id not in admitted and not self._admits(routing_id, session, frame):
                continue
            if excess:
                name = routing_id.hex()[:12]
                text = "dropped a message from %s: %d frames instead of 2"
                self._drop_log.dropped(text, name, 2 + excess, session=name)
            elif is_of_former_connection(routing_id, body):
                logger.debug("dropped a message that a worker sent over a former connection")
            else:
                yield Incoming(session, body, frame)

    def _drop_excess(self) -> int:
        """Drop the rest of a message; return how many frames that were."""
        count = 1
        while self._router.recv(_NOW, copy=False).more:
            count += 1
        return count

    def _admits(self, routing_id: bytes, session: bytes, frame: zmq.Frame) -> bool:
        """Return True and remember the peer if it is served; otherwise reject it."""
        uid, pid, _ = self.sender(frame)
        if uid not in (None, os.geteuid(), 0):
            self._drop_log.dropped("dropped a message from uid %d%s", uid, called(pid))
            owner = os.geteuid()
            refusal = (
                f"the broker is uid {owner}'s and serves nobody else (but root), not uid {uid}"
            )
            self.send(session, encode(Reject(refusal, fatal=True)))
            return False
        if len(self._admitted) >= _MOST_ADMITTED:
            self._admitted.clear()  # each peer is checked once more
        self._admitted.add(routing_id)
        return True

    def sender(self, frame: zmq.Frame) -> Peer:
        """Return the peer over whose connection a frame has come."""
        return peer_of(frame, ipc=self.is_local)

    def send(self, session: bytes, frame: bytes) -> None:
        """Send one frame; it is lost if the peer is gone or does not read. Does not block."""
        self._used = True
        try:
            routing_id, body = from_session(session, frame)
            self._router.send(routing_id, _NOW_AND_MORE)  # raises if the peer cannot be reached
            self._router.send(body, _NOW)
        except zmq.ZMQError as error:
            # The ledger's decision stands: the session's next RENEW, or its end, repairs this.
            logger.debug("not sent to %s: %s", session.hex()[:12], error)

    def close(self) -> None:
        """Close the socket and its context."""
        self._router.close()
        self._context.term()

    def unlink(self) -> None:
        """Remove the path, unless it is systemd's. The address's lock must be held."""
        if self._path is not None and not self._inherited:
            self._path.unlink(missing_ok=True)
