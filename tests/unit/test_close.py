"""A close is over when the server's end of the socket is closed: what a lease's
release rests on."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psycopg2
import pytest

from sharedpool.postgres.peer_closed import other_side_closed
from sharedpool.worker.connection.closing import _shut, close_confirmed, cut
from sharedpool.worker.connection.connection import Connection
from sharedpool.worker.connection.opening import take_duplicate
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.stub_server import greeting, read_startup

_PATIENCE_S = 30.0


class Backend:
    """A server process of one session, which exits when it is told to by `may_exit`, once its
    client has left."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.may_exit = threading.Event()
        self.client_left = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(directory / ".s.PGSQL.5432"))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        client, _ = self._listener.accept()
        with client:
            read_startup(client)
            client.sendall(
                greeting(
                    {"server_version": "16.0", "client_encoding": "UTF8", "DateStyle": "ISO, MDY"}
                )
            )
            while client.recv(4096):
                pass
            self.client_left.set()
            self.may_exit.wait(_PATIENCE_S)

    def connect(self) -> PooledConnection:
        conn = psycopg2.connect(
            host=str(self.directory), user="u", dbname="d", connection_factory=Connection,
            sslmode="disable", gssencmode="disable",
        )  # fmt: skip
        assert isinstance(conn, PooledConnection)
        conn.sharedpool_direct = True
        return take_duplicate(conn)

    def end(self) -> None:
        self.may_exit.set()
        self._thread.join(_PATIENCE_S)
        self._listener.close()


@pytest.fixture
def backend(runtime_dir: Path) -> Iterator[Backend]:
    server = Backend(runtime_dir)
    yield server
    server.end()


@pytest.mark.parametrize("end", [close_confirmed, cut])
def test_a_backend_that_lives_on_is_not_said_to_be_gone(backend: Backend, end: object) -> None:
    """The goodbye has been sent, and read: that the backend is told proves nothing."""
    conn = backend.connect()
    end([conn], limit_s=0.05)  # type: ignore[operator]
    if end is cut:
        assert not conn.closed  # its thread may be using it
    assert backend.client_left.wait(_PATIENCE_S)
    assert not conn.sharedpool_gone


@pytest.mark.parametrize("end", [close_confirmed, cut])
def test_a_backend_that_exits_is_waited_for(backend: Backend, end: object) -> None:
    conn = backend.connect()

    def exit_when_told() -> None:
        backend.client_left.wait(_PATIENCE_S)
        backend.may_exit.set()

    threading.Thread(target=exit_when_told, daemon=True).start()
    end([conn], limit_s=_PATIENCE_S)  # type: ignore[operator]
    assert conn.sharedpool_gone
    assert backend.may_exit.is_set()


class Interrupt(BaseException):
    pass


def interrupt_at(step: int, function: Callable[[], object]) -> bool:
    """Run a function, raise an interrupt before its nth instruction, and return whether it came so
    far."""
    left = step

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        frame.f_trace_opcodes = True
        left -= event == "opcode"
        if left < 0:
            raise Interrupt
        return trace

    sys.settrace(trace)
    try:
        function()
    except Interrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("use", [_shut, other_side_closed])
def test_an_interrupt_anywhere_closes_no_descriptor_of_another_owner(
    use: Callable[[int], object],
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        interrupt_at(
            sys.maxsize, lambda: use(ours.fileno())
        )  # Python 3.12 tells of no opcodes the first time
        step = 0
        while interrupt_at(step, lambda: use(ours.fileno())):
            os.fstat(ours.fileno())
            step += 1
        assert step > 10
        os.fstat(ours.fileno())
