"""The answer to the reset of a session that has moved, read by who gets it."""

import socket
import struct
import threading
from collections.abc import Iterator

import msgspec
import pytest

from sharedpool.descriptors.owned import Owned
from sharedpool.worker.connection import reset

DONE, READY = b"C\0\0\0\x10DISCARD ALL\0", b"Z\0\0\0\x05I"
BEFORE = {"client_encoding": "LATIN1", "DateStyle": "ISO, MDY"}


def message(kind: bytes, body: bytes) -> bytes:
    return struct.pack("!ci", kind, len(body) + 4) + body


def status(name: str, value: str) -> bytes:
    return message(b"S", f"{name}\0{value}\0".encode())


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Owned]]:
    """The server's end of a session's socket and ours."""
    server, ours = socket.socketpair()
    ours.setblocking(False)  # as libpq has it
    owned = Owned(fileno=ours.detach())
    with server:
        yield server, owned
    owned.close()


def after(ours: Owned) -> dict[str, str] | None:
    encoded = reset.parameters_after(ours, msgspec.msgpack.encode(BEFORE))
    return None if encoded is None else msgspec.msgpack.decode(encoded)


def test_unchanged_parameters_stay(ends: tuple[socket.socket, Owned]) -> None:
    server, ours = ends
    server.sendall(DONE + READY)
    assert after(ours) == BEFORE


def test_a_reported_parameter_counts(ends: tuple[socket.socket, Owned]) -> None:
    server, ours = ends
    notice = message(b"N", b"SNOTICE\0\0") + message(b"A", struct.pack("!i", 7) + b"news\0said\0")
    reported = status("client_encoding", "UTF8") + status("unheard_of", "1")
    server.sendall(notice + reported + DONE + READY)
    assert after(ours) == BEFORE | {"client_encoding": "UTF8"}


def test_the_answer_may_come_in_pieces(ends: tuple[socket.socket, Owned]) -> None:
    server, ours = ends
    found: list[dict[str, str] | None] = []
    reader = threading.Thread(target=lambda: found.append(after(ours)))
    reader.start()
    for byte in status("client_encoding", "UTF8") + DONE + READY:
        server.sendall(bytes([byte]))
    reader.join(10)
    assert found == [BEFORE | {"client_encoding": "UTF8"}]


@pytest.mark.parametrize(
    "answer",
    [
        message(b"E", b"SERROR\0C57014\0\0") + READY,
        DONE + b"Z\0\0\0\x05T",
        DONE + READY + status("client_encoding", "UTF8"),
        message(b"T", b"\0\0") + DONE + READY,
        message(b"S", b"no value\0") + DONE + READY,
        message(b"N", b"x" * 70000) + DONE + READY,
        struct.pack("!ci", b"C", -5) + READY,
        struct.pack("!ci", b"C", 0) + READY,
    ],
    ids=[
        "an error",
        "a transaction",
        "more",
        "rows",
        "half a status",
        "too much",
        "less than 0",
        "0",
    ],
)
def test_all_else_makes_the_session_useless(
    ends: tuple[socket.socket, Owned], answer: bytes
) -> None:
    server, ours = ends
    sender = threading.Thread(target=server.sendall, args=(answer,))
    sender.start()
    assert after(ours) is None
    ours.close()
    sender.join(10)


def test_the_end_of_the_session_is_no_answer(ends: tuple[socket.socket, Owned]) -> None:
    server, ours = ends
    server.sendall(DONE)
    server.close()
    assert after(ours) is None


def test_the_answer_is_not_waited_for_for_long(
    ends: tuple[socket.socket, Owned], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reset, "LIMIT_S", 0.05)
    server, ours = ends
    server.sendall(DONE)
    assert after(ours) is None
