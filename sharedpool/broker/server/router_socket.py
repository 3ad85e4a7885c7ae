"""The broker's ROUTER socket: whom a message is from, and one frame each way."""

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


def is_at(path: Path, ours: os.stat_result) -> bool:
    """Say whether a socket's file is still at its path; if so make it young."""
    try:
        if not os.path.samestat(ours, path.lstat()):
            return False
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


class Incoming(NamedTuple):
    """A message as it has come: from which session, and in what, which tells over whose connection
    (`RouterSocket.sender`).
    """

    session: bytes
    body: bytes
    frame: zmq.Frame


class RouterSocket:
    """`readable` is whether there may be something to `read`. libzmq's descriptor tells of news only once, and to any
    call: after each use it must be asked whether something came meanwhile (`poll`).
    """

    def __init__(self, address: str, listener: int | None) -> None:
        """`listener`: a socket that listens at the address already (systemd's)."""
        self._address = address
        self._inherited = listener is not None
        self._path = Path(address.removeprefix("ipc://")) if address.startswith("ipc://") else None
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(
            zmq.ROUTER_MANDATORY, 1
        )  # an unreachable peer is an error, not silence
        self._router.setsockopt(
            zmq.ROUTER_HANDOVER, 1
        )  # a worker that reconnects replaces its old connection
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._router.setsockopt(zmq.IPV6, 1)
        if listener is not None:
            self._router.setsockopt(zmq.USE_FD, listener)
        self._drop_log = DropLog()
        self._admitted: set[bytes] = set()  # routing ids of whom we serve: nobody else can know one
        self._ours: os.stat_result | None = None  # our socket's file
        self.readable = self._used = True

    @property
    def is_local(self) -> bool:
        """Whether everybody who writes is on this host."""
        return self._path is not None

    @property
    def left_behind(self) -> bool:
        """Whether a broker that has crashed has left its socket. Before `bind`."""
        return self._path is not None and not self._inherited and self._path.exists()

    def bind(self) -> None:
        """Listen. Raise `SharedPoolError` when that cannot be."""
        if self._path is not None and (
            self._path.is_symlink() or (self._path.exists() and not self._path.is_socket())
        ):
            raise SharedPoolError(
                f"cannot listen at {self._address}: there is a file that is no socket"
            )
        mask = os.umask(0o177)  # the socket is this user's alone, wherever it lies
        try:
            self._router.bind(self._address)
        except zmq.ZMQError as error:
            raise SharedPoolError(f"cannot listen at {self._address}: {error}") from error
        finally:
            os.umask(mask)
        if self._path is not None and not self._inherited:
            self._ours = self._path.stat()

    def mend(self) -> bool:
        """Listen at the path anew if somebody has deleted it, and keep it young; return whether that was so.

        Who is connected remains so. systemd's socket is systemd's. Raise OSError, `SharedPoolError` when it cannot be.
        """
        if self._path is None or self._ours is None or is_at(self._path, self._ours):
            return False
        self.bind()
        return True

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there is news, perhaps."""
        return int(self._router.getsockopt(zmq.FD))

    def on_readable(self) -> None:
        """Take in that the descriptor was readable."""
        self.readable = True

    def poll(self) -> bool:
        """Say whether there is something to read."""
        if self._used:
            self._used = False
            self.readable = self._has_messages()
        return self.readable

    def _has_messages(self) -> bool:
        return bool(int(self._router.getsockopt(zmq.EVENTS)) & _READABLE)

    def read(self, most: int) -> Iterator[Incoming]:
        """Yield up to `most` messages, without those that are not to be looked at. Does not block."""
        self._used = True
        receive, admitted = self._router.recv, self._admitted
        for count in range(most):
            if (
                count == 1 and not self._has_messages()
            ):  # it mostly comes singly, and zmq.Again is dear
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
                logger.debug("dropped what a worker said before it made another connection")
            else:
                yield Incoming(session, body, frame)

    def _drop_excess(self) -> int:
        """Throw away the rest of a message; return how many frames that were."""
        count = 1
        while self._router.recv(_NOW, copy=False).more:
            count += 1
        return count

    def _admits(self, routing_id: bytes, session: bytes, frame: zmq.Frame) -> bool:
        """Say whether we serve who has this routing id, and remember it; tell him if not."""
        uid, pid, _ = self.sender(frame)
        if uid not in (None, os.geteuid(), 0):
            self._drop_log.dropped("dropped a message from uid %d%s", uid, called(pid))
            refusal = f"the broker is uid {os.geteuid()}'s and serves nobody else (but root), not uid {uid}"
            self.send(session, encode(Reject(refusal, fatal=True)))
            return False
        if len(self._admitted) >= _MOST_ADMITTED:
            self._admitted.clear()  # each is asked for once more
        self._admitted.add(routing_id)
        return True

    def sender(self, frame: zmq.Frame) -> Peer:
        """Return over whose connection a frame has come."""
        return peer_of(frame, ipc=self.is_local)

    def send(self, session: bytes, frame: bytes) -> None:
        """Send one frame. One who is gone, or does not read, misses it. Does not block."""
        self._used = True
        try:
            routing_id, body = from_session(session, frame)
            self._router.send(routing_id, _NOW_AND_MORE)  # if it cannot be sent, this tells
            self._router.send(body, _NOW)
        except zmq.ZMQError as error:
            # The state stands: the session's next RENEW, or its death, repairs it.
            logger.debug("not sent to %s: %s", session.hex()[:12], error)

    def close(self) -> None:
        """Send nothing any more."""
        self._router.close()
        self._context.term()

    def unlink(self) -> None:
        """Remove the path, unless it is systemd's. The address's lock must be held."""
        if self._path is not None and not self._inherited:
            self._path.unlink(missing_ok=True)
