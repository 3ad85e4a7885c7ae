"""The broker's desk, with real sockets and without a ledger."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharedpool.broker.desk import SUPPORTED, Desk
from sharedpool.wire import descriptors
from sharedpool.wire.codec import decode_from_desk, encode
from sharedpool.wire.desk import Ask, Deposit, Give, Live, Pass, Withdraw
from sharedpool.wire.messages import Backend, Token

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="no desk on this platform")

TOKEN = Token(5, 1)
MESSAGE = Pass(1, TOKEN, 1, 0, False, Live(Backend(7), 1, b"parameters"))


class Clerk:
    """Note what the desk tells."""

    def __init__(self) -> None:
        self.lines: list[int] = []
        self.ended: list[int] = []

    def expects(self, session: bytes, token: Token) -> bool:
        return True

    def deposited(self, token: Token) -> None:
        pass

    def gone(self, token: Token) -> None:
        pass

    def lost(self, token: Token) -> None:
        pass

    def asked(self, ask: Ask, line: int) -> None:
        self.lines.append(line)

    def given(self, give: Give) -> None:
        pass

    def withdrawn(self, withdraw: Withdraw) -> None:
        pass

    def left(self, line: int) -> None:
        pass

    def stays(self, session: bytes, line: int) -> None:
        pass

    def line_ended(self, line: int) -> None:
        self.ended.append(line)


@pytest.fixture
def clerk() -> Clerk:
    return Clerk()


@pytest.fixture
def desk(runtime_dir: Path, clerk: Clerk) -> Iterator[Desk]:
    desk = Desk(runtime_dir / "desk")
    desk.clerk = clerk
    yield desk
    desk.close()


@pytest.fixture
def line(desk: Desk) -> Iterator[socket.socket]:
    """A line on which somebody waits, with the socket of `TOKEN` in custody."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
        line.connect(str(desk.path))
        line.setblocking(False)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            descriptors.send_with(line, encode(Deposit(b"w", TOKEN)), ours.fileno())
            line.send(encode(Ask(b"w", 1, 1000)))
            desk.receive()
            yield line


def test_what_cannot_be_passed_on_ends_the_line(desk: Desk, clerk: Clerk, line: socket.socket) -> None:
    """Its worker sees that, and asks in the ordinary way; else it would wait for what never comes."""
    (number,) = clerk.lines
    passed = 0
    while not clerk.ended:  # until no more fits in
        desk.pass_on(number, MESSAGE)
        passed += 1
    assert clerk.ended == [number]
    for _ in range(passed - 1):
        packet, fds, _ = descriptors.receive(line, 8192)
        assert decode_from_desk(packet) == MESSAGE
        os.close(fds[0])
    assert descriptors.receive(line, 8192)[0] == b""
    desk.pass_on(number, MESSAGE)
    assert clerk.ended == [number, number]
