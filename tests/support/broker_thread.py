"""A broker in a thread of the test, and a bare ZeroMQ line to a broker."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import zmq

from sharedpool.broker.server.server import Server
from sharedpool.broker.settings import BrokerSettings


@contextmanager
def line_to(address: str, identity: bytes = b"") -> Iterator[zmq.Socket[bytes]]:
    """A bare ZeroMQ socket that talks to the broker."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    try:
        if identity:
            dealer.setsockopt(zmq.IDENTITY, identity)
        dealer.setsockopt(zmq.LINGER, 1000)
        dealer.setsockopt(zmq.RCVTIMEO, 10_000)
        dealer.connect(address)
        yield dealer
    finally:
        dealer.close()
        context.term()


@contextmanager
def server_in_a_thread(address: str, **settings: Any) -> Iterator[Server]:
    """A broker whose log the test sees."""
    server = Server(BrokerSettings(address, **settings))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()
