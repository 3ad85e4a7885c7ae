"""The ZeroMQ socket of a link: frames of several channels to and from one broker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import zmq

from sharedpool.wire.channel import add_channel, split_channel
from sharedpool.wire.codec import encode
from sharedpool.wire.messages import ToBroker
from sharedpool.worker import greenlets

# At its close, and at the end of its context, the socket may go on sending for this long.
LINGER_S = 1.0
_POLLIN = int(zmq.POLLIN)  # as an int, since the enumeration's own `&` takes a microsecond


class Context(Protocol):
    """The owner of the ZeroMQ context (`links.SharedContext`)."""

    def acquire(self) -> Any:
        """Return the context, for one more user."""

    def release(self) -> None:
        """Count one user less; with the last one the context ends."""


class Dealer:
    """A DEALER that is connected to one broker. Only the link's thread may use it."""

    def __init__(self, context: Any, address: str, identity: bytes) -> None:
        self.socket = greenlets.zmq_dealer(context)
        try:
            self.socket.set(zmq.IDENTITY, identity)
            self.socket.set(zmq.LINGER, int(LINGER_S * 1000))
            self.socket.set(zmq.IPV6, 1)
            self.socket.set(zmq.RECONNECT_IVL, 20)
            self.socket.set(zmq.RECONNECT_IVL_MAX, 500)
            self.socket.connect(address)
        except BaseException:
            self.close(linger=False)
            raise

    def send(self, channel: bytes, message: ToBroker) -> bool:
        """Send a message; return False if the broker does not read and there is no room."""
        try:
            self.socket.send(add_channel(channel, encode(message)), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> Iterator[tuple[bytes, bytes]]:
        """Return channel and body of each frame that has arrived."""
        while self.socket.get(zmq.EVENTS) & _POLLIN:
            try:
                frame = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield split_channel(frame)

    def close(self, *, linger: bool) -> None:
        """Close the socket; without `linger` what it has not sent yet is dropped."""
        if not linger:
            self.socket.set(zmq.LINGER, 0)
        self.socket.close()
