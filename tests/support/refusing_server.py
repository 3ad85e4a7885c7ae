"""A server that speaks PostgreSQL's start-up protocol up to a refusal, in any language."""

import contextlib
import socket
import struct
import threading
from typing import IO, Literal, Self

Stage = Literal["start", "password", "login", "silent", "hangs up"]

_SSL, _GSS = 80877103, 80877104


class RefusingServer:
    """Refuse every connect.

    The refusal comes at the `start`, after the `password` or after the `login`, as PostgreSQL's
    does depending on the reason. A `silent` server never answers; one that `hangs up` closes the
    socket. `connects` counts the start-up packets.
    """

    def __init__(
        self,
        stage: Stage,
        code: str = "28P01",
        text: str = "",
        severity: str = "FATAL",
        encoding: str = "",
    ):
        self._stage, self._code = stage, code
        self._severity, self._text = (
            each.encode(encoding or "utf-8") for each in (severity, text or "no")
        )
        self.connects = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="refusing server", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        # close() alone does not wake a thread that is in accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._open:
            each.close()

    @property
    def dsn(self) -> str:
        return f"host=127.0.0.1 port={self.port} user=app dbname=app password=zsecret"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                threading.Thread(
                    target=self._serve, args=[client], name="refusing session", daemon=True
                ).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, client.makefile("rb") as stream:
            while struct.unpack("!ii", self._startup(stream))[1] in (_SSL, _GSS):
                client.sendall(b"N")
            self.connects += 1
            if self._stage == "silent":
                stream.read()  # until the client closes the socket
            if self._stage in ("silent", "hangs up"):
                return
            if self._stage == "password":
                client.sendall(b"R" + struct.pack("!ii", 8, 3))
                kind, length = struct.unpack("!ci", stream.read(5))
                assert kind == b"p"
                stream.read(length - 4)
            if self._stage == "login":
                client.sendall(b"R" + struct.pack("!ii", 8, 0))
            fields = (
                (b"S", self._severity),
                (b"V", b"FATAL"),
                (b"C", self._code.encode()),
                (b"M", self._text),
            )
            body = b"".join(name + value + b"\0" for name, value in fields) + b"\0"
            client.sendall(b"E" + struct.pack("!i", len(body) + 4) + body)

    @staticmethod
    def _startup(stream: IO[bytes]) -> bytes:
        head = stream.read(8)
        if len(head) < 8:
            raise OSError("the client has gone")
        stream.read(struct.unpack("!i", head[:4])[0] - 8)
        return head
