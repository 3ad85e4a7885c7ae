"""A server that lets libpq build a connection object without PostgreSQL.

It serves the calling process alone, at an abstract unix address, so that there is no file. See
`shells.py`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Mapping

from sharedpool.descriptors.owned import NO_SIGNAL

LIMIT_S = 5.0  # for the whole start

# Of PostgreSQL's protocol 3.0: messages of the server, and requests in place of a version.
_AUTHENTICATION, _PARAMETER_STATUS, _KEY_DATA, _READY = b"R", b"S", b"K", b"Z"
_NEGOTIATE, _REFUSE = b"v", b"N"
_SSL_REQUEST, _GSS_REQUEST = 80877103, 80877104
_UCRED = struct.Struct("3i")  # pid, uid, gid


class StubServer:
    """Lets one client in, in a thread of its own, and tells it the given parameters."""

    port = 5432

    def __init__(self, parameters: Mapping[str, str]) -> None:
        self._greeting = greeting(parameters)
        self.host = f"@sharedpool-{os.getpid()}-{os.urandom(8).hex()}"
        # Connects to wake the thread if the client never comes. It is made now, since later no
        # descriptor may be free.
        self._waker = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except BaseException:
            self._waker.close()
            raise
        self._thread = threading.Thread(target=self._serve, name="sharedpool-shell", daemon=True)

    def __enter__(self) -> StubServer:
        try:
            self._listener.settimeout(LIMIT_S)
            self._listener.bind(f"\0{self.host[1:]}/.s.PGSQL.{self.port}")
            self._listener.listen(1)
            self._thread.start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():  # still in accept(): connect once to wake it
            with contextlib.suppress(OSError):
                self._waker.connect(self._listener.getsockname())
            self._waker.close()
        self._thread.join(LIMIT_S)
        self._close()

    def _close(self) -> None:
        self._waker.close()
        self._listener.close()

    def _serve(self) -> None:
        # If the thread fails, the listener is closed, so that the client fails at once.
        with contextlib.suppress(OSError), self._listener:
            client, _ = self._listener.accept()
            while not _is_this_process(client):
                client.close()
                client, _ = self._listener.accept()
            with client:
                client.settimeout(LIMIT_S)
                while (version := read_startup(client)) in (_SSL_REQUEST, _GSS_REQUEST):
                    client.sendall(_REFUSE, NO_SIGNAL)
                # A client that asks for a newer minor version than 3.0 is told to use 3.0.
                newer = version & 0xFFFF
                negotiation = _message(_NEGOTIATE, struct.pack("!ii", 0, 0)) if newer else b""
                client.sendall(negotiation + self._greeting, NO_SIGNAL)


def _is_this_process(client: socket.socket) -> bool:
    pid, _, _ = _UCRED.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return bool(pid == os.getpid())


def read_startup(client: socket.socket) -> int:
    """Read one packet of a client's start; return its version, or the code of its request."""
    head = client.recv(8, socket.MSG_WAITALL)
    if len(head) < 8:
        raise ConnectionError("the client has left")
    size, version = struct.unpack("!ii", head)
    if size > 8:
        client.recv(size - 8, socket.MSG_WAITALL)
    return int(version)


def greeting(parameters: Mapping[str, str]) -> bytes:
    """Return the messages with which a server lets a client in (protocol 3.0, "Start-up")."""
    status = [
        _message(_PARAMETER_STATUS, f"{name}\0{value}\0".encode())
        for name, value in parameters.items()
    ]
    return b"".join(
        [
            _message(_AUTHENTICATION, struct.pack("!i", 0)),
            *status,
            _message(_KEY_DATA, struct.pack("!ii", 0, 0)),
            _message(_READY, b"I"),
        ]
    )


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body
