"""A process in a lane with real connection objects, and a server of which a test says what it
says."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator

import msgspec
import pytest

from sharedpool.broker_location import GivenBroker
from sharedpool.descriptors.readable import readable
from sharedpool.lane import lane as lanes
from sharedpool.lane.lane import Lane, MovingConnection
from sharedpool.lane.wait_sockets import WaitSockets
from sharedpool.postgres.conninfo import resolve
from sharedpool.wire.board import SHELF
from sharedpool.wire.desk import Live
from sharedpool.wire.values import Backend, Token
from sharedpool.worker.connection.connection import take_lease
from sharedpool.worker.connection.handover import encoded_parameters, names_of_parameters
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.server_facts import ServerFacts
from sharedpool.worker.core.lease import Lease
from sharedpool.worker.local_pool import LocalPool
from sharedpool.worker.mover import Mover
from sharedpool.worker.session import Session
from sharedpool.worker.settings import PoolConfig

_SAID = {
    b"server_version": b"16.2",
    b"server_encoding": b"UTF8",
    b"client_encoding": b"UTF8",
    b"DateStyle": b"ISO, MDY",
    b"TimeZone": b"UTC",
    b"integer_datetimes": b"on",
    b"standard_conforming_strings": b"on",
}
_NAMES = msgspec.msgpack.encode(ServerFacts("u", "d", "", 5432, "", False, "dbname=d", {}))
LIVE = Live(
    Backend(7, 1, 1, direct=True),
    1,
    encoded_parameters(tuple(map(_SAID.get, names_of_parameters))),
    None,
    _NAMES,
)
DONE = b"C" + struct.pack("!i", 16) + b"DISCARD ALL\0"
READY = b"Z" + struct.pack("!i", 5) + b"I"


class Rig:
    """A process in a lane, another one's end of it, and the server's ends of the connections that
    move."""

    def __init__(self) -> None:
        config = PoolConfig(resolve(dsn="host=nowhere user=u dbname=d"), timeout=5.0)
        self.local = LocalPool(config, GivenBroker("ipc:///nowhere"), Session, Mover)
        self.local.messages.welcomed(1, 1, time.monotonic())
        self.local.receiver.works = True  # it was seen to work here
        self.fds = lanes.make()
        self.lane = Lane([os.dup(fd) for fd in self.fds], 1)
        self.other = Lane([os.dup(fd) for fd in self.fds], 2)
        self.wait_sockets = WaitSockets(self.lane, 0, lambda moved, sock: sock.close())
        self.mover = Mover(self.local, self.wait_sockets, self.lane, None)
        self.lane.board.generation, self.lane.board.moving = 1, True
        self.servers: dict[int, socket.socket] = {}

    def give(self, said: bytes = DONE + READY, *, on_shelf: bool = True) -> Token:
        """Have the other process give a connection, whose server has said this to its reset."""
        serial = len(self.servers) + 1
        token = Token(1, serial)
        ours, self.servers[serial] = socket.socketpair()
        self.servers[serial].sendall(said)
        self.lane.board.enter(serial, token, 2, 0)
        with ours:
            assert self.other.give(MovingConnection(token, serial, LIVE, ours.fileno()))
        assert not on_shelf or self.lane.board.holding(serial).holder == SHELF
        return token

    def take(self, wait_s: float = 0.3) -> PooledConnection | None:
        return self.mover.take(wait_s, time.monotonic())

    def lease(self, conn: PooledConnection) -> Lease:
        lease = conn.sharedpool_lease
        assert isinstance(lease, Lease)
        return lease

    def check_in(self, conn: PooledConnection) -> bool:
        lease = self.lease(conn)
        take_lease(conn)
        return self.mover.give(lease, conn, time.monotonic())

    def is_over(self, token: Token) -> bool:
        """Return True if the connection's session has ended and nothing can be written to it."""
        server = self.servers[token.serial]
        with contextlib.suppress(ConnectionResetError):
            while readable([server], 0):
                if not server.recv(1000):
                    return True
        return False

    def close(self) -> None:
        self.wait_sockets.disown()
        for lane in (self.lane, self.other):
            lane.close()
        for fd in self.fds:
            os.close(fd)
        for server in self.servers.values():
            server.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()
