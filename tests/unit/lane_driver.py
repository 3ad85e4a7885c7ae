"""Two processes' ends of a lane, and connections that move in it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from sharedpool.descriptors.owned import Owned
from sharedpool.lane import lane as lanes
from sharedpool.lane.lane import Lane, MovingConnection, Ticket
from sharedpool.wire.board import PLACES
from sharedpool.wire.desk import Live, Moved
from sharedpool.wire.values import Backend, Token

GENERATION = 3
LIVE = Live(Backend(7), GENERATION, b"parameters")


class Process:
    """One process's end of a lane."""

    def __init__(self, fds: list[int], number: int) -> None:
        self.refused: list[Moved] = []
        self.lane = Lane([os.dup(fd) for fd in fds], number, self.refused.append)
        self.number = number
        self.wait_sockets: dict[int, Any] = {}

    def wait(self, wait_socket: int, request: int, *, ticket: bool = True) -> Ticket:
        """Take a place, and queue a ticket for it."""
        place = self.number * PLACES + wait_socket
        if wait_socket not in self.wait_sockets:
            self.wait_sockets[wait_socket] = self.lane.wait_socket(place)
        self.lane.board.take_place(place, request)
        written = Ticket(self.number, place, request)
        assert not ticket or self.lane.add_ticket(written)
        return written

    def came(self, wait_socket: int) -> Moved | None:
        """Return what has come to a wait socket."""
        return unpacked(self.lane.receive(self.wait_sockets[wait_socket]))

    def taken(self) -> Moved | None:
        return unpacked(self.lane.take_from_shelf())

    def close(self) -> None:
        self.lane.close()
        for sock in self.wait_sockets.values():
            sock.close()


def unpacked(got: tuple[Moved, Owned] | None) -> Moved | None:
    if got is None:
        return None
    moved, sock = got
    assert sock.send(b"x") == 1  # it is the connection's
    sock.close()
    return moved


class Rig:
    """Two processes in a lane, and connections whose other ends are here."""

    def __init__(self) -> None:
        self.fds = lanes.make()
        self.a, self.b = Process(self.fds, 1), Process(self.fds, 2)
        self.board = self.a.lane.board
        self.board.generation = GENERATION
        self.ends: dict[int, socket.socket] = {}
        self.mine: dict[int, socket.socket] = {}
        self.serial = 0

    def connection(self, holder: int = 1) -> MovingConnection:
        self.serial += 1
        ours, theirs = socket.socketpair()
        self.ends[self.serial], self.mine[self.serial] = theirs, ours
        token = Token(1, self.serial)
        self.board.enter(self.serial, token, holder, 0)
        return MovingConnection(token, self.serial, LIVE, ours.fileno())

    def drop(self, item: MovingConnection) -> None:
        """Let go of the giver's own descriptor."""
        self.mine.pop(item.token.serial).close()

    def is_over(self, item: MovingConnection) -> bool:
        """Return True if every copy of the connection's socket is closed."""
        end = self.ends[item.token.serial]
        end.setblocking(False)
        try:
            while end.recv(100):
                pass
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        self.a.close()
        self.b.close()
        for fd in self.fds:
            os.close(fd)
        for sock in [*self.ends.values(), *self.mine.values()]:
            sock.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def open_descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the listing's own
            pass
    return found


def fill(wait_socket: socket.socket) -> None:
    """Put packets into a wait socket until there is no room for another."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        try:
            while True:
                sender.sendto(b"", wait_socket.getsockname())
        except BlockingIOError:
            pass
