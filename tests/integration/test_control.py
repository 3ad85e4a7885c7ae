"""The control connection by itself, on a real server: what it ends, what it sees, and what it
survives."""

import logging
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg2
import pytest
from psycopg2.extensions import connection, make_dsn

from sharedpool.broker.core.commands import Fence
from sharedpool.broker.postgres.control_connection import ControlConnection
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.wire.values import Backend, Token
from tests.integration.control_driver import running
from tests.support.refusing_server import RefusingServer
from tests.support.sql import backend_of
from tests.support.waiting import wait_until


@contextmanager
def refusing(message: bytes) -> Iterator[int]:
    """A server that refuses every client with this text; its port."""

    def serve(client: socket.socket) -> None:
        with client, client.makefile("rb") as words:
            while True:
                (length,) = struct.unpack("!i", words.read(4))
                (code,) = struct.unpack("!i", words.read(length - 4)[:4])
                if code not in (80877103, 80877104):  # asks for TLS, GSS
                    break
                client.sendall(b"N")
            fields = b"SFATAL\0VFATAL\0C57P03\0M" + message + b"\0\0"
            client.sendall(b"E" + struct.pack("!i", len(fields) + 4) + fields)

    def listen() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            serve(client)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def test_a_refusal_in_another_encoding_does_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    """psycopg2 raises UnicodeDecodeError, which is none of its own errors."""
    caplog.set_level(logging.DEBUG, "sharedpool.broker")
    text = "das Datenbanksystem f\ufffdhrt herunter; tried again every second"
    with (
        refusing("das Datenbanksystem fährt herunter".encode("latin-1")) as port,
        running(f"host=127.0.0.1 port={port} user=x dbname=x") as (control, _),
    ):
        wait_until(lambda: caplog.text.count(text) >= 2)
        said = [r.levelname for r in caplog.records if text in r.getMessage()]
        assert (said[0], {*said[1:]}) == ("WARNING", {"DEBUG"})  # the same again is no news
        assert control.state.startswith("unreachable: ")


def test_a_backend_that_may_not_be_ended_keeps_no_other_alive(
    postgres: EphemeralPostgres, server_connection: connection, caplog: pytest.LogCaptureFixture
) -> None:
    with server_connection.cursor() as cursor:
        cursor.execute("DROP ROLE IF EXISTS fencer")
        cursor.execute("CREATE ROLE fencer LOGIN IN ROLE pg_monitor, pg_signal_backend")
    mighty = psycopg2.connect(postgres.dsn)  # a superuser's: only a superuser may end it
    plain = psycopg2.connect(make_dsn(postgres.dsn, user="fencer"))
    refused, ended = backend_of(mighty), backend_of(plain)
    with running(make_dsn(postgres.dsn, user="fencer")) as (control, listener):
        nonsense = Backend(2**40, 1, ended.boot_us)  # from a journal that nobody has validated
        wait_until(lambda: control.state == "connected")
        for serial, backend in enumerate((refused, nonsense, ended)):
            control.enqueue_fence(Fence(Token(1, serial), "p", backend, "a test"))
        assert {listener.gone.get(timeout=10), listener.gone.get(timeout=10)} == {
            Token(1, 1),
            Token(1, 2),
        }
        assert listener.gone.empty()
        assert backend_of(mighty) == refused
    assert "lost" not in caplog.text
    mighty.close()
    plain.close()


def unconnected(dsn: str) -> ControlConnection:
    return ControlConnection(dsn, None, lambda _: None, (), None, maintenance=False)


@pytest.mark.parametrize(
    ("encoding", "text"), [("utf-8", "слишком много клиентов"), ("latin-1", "für »app« verboten")]
)
def test_a_refusal_passes_a_barrier_in_every_language(encoding: str, text: str) -> None:
    with RefusingServer(
        "start", "53300", text, "ВАЖНО" if encoding == "utf-8" else "FATAL", encoding
    ) as server:
        unconnected(server.dsn).pass_barrier()
        assert server.connects == 1


def test_a_server_that_hangs_up_without_a_word_has_accepted_nobody() -> None:
    with RefusingServer("hangs up") as server, pytest.raises(psycopg2.OperationalError):
        unconnected(server.dsn).pass_barrier()
