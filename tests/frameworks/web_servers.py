"""Start a web server as a user would, on a socket that listens already, and load it."""

import http.client
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
CLIENTS = 12


class Server(NamedTuple):
    process: "subprocess.Popen[bytes]"
    port: int
    log: Path

    def words(self) -> str:
        return self.log.read_text()

    def stop(self) -> int:
        """Have it end in good order; return its status."""
        self.process.terminate()
        return self.process.wait(30)


@contextmanager
def serving(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[Server]:
    """Run `command`, in which {fd} is replaced: a listening socket; end it with everything that it
    has started.

    Nobody can take the port, and requests wait until a worker is there.
    """
    with log.open("w") as output, socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        process = subprocess.Popen(
            [part.format(fd=listener.fileno()) for part in command],
            cwd=HERE,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | environment,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
        port: int = listener.getsockname()[1]
    with process:
        server = Server(process, port, log)
        try:
            yield server
            if process.poll() is None:
                server.stop()
        finally:
            print(server.words()[-5000:])  # pytest shows it when the test fails
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def request(port: int, path: str = "/", timeout_s: float = 60) -> dict[str, int]:
    """Send one request, which must succeed; return what the application says."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        answer: dict[str, int] = json.loads(body)
        return answer


def load(server: Server, requests: int) -> list[dict[str, int]]:
    """Send so many requests from twelve clients; each must be answered with 200."""
    with ThreadPoolExecutor(CLIENTS) as executor:
        return list(executor.map(request, [server.port] * requests))


class Traffic:
    """What twelve clients hear that send one request after the other."""

    def __init__(self, server: Server) -> None:
        self._port = server.port
        self._enough = threading.Event()
        self.answers: list[dict[str, int]] = []
        self.lost: list[Exception] = []

    def _client(self) -> None:
        while not self._enough.is_set():
            try:
                self.answers.append(request(self._port))
            except (
                OSError,
                http.client.HTTPException,
            ) as error:  # no answer; a wrong one fails the test
                self.lost.append(error)

    @property
    def workers(self) -> set[int]:
        """The processes that have answered."""
        return {answer["worker"] for answer in list(self.answers)}


@contextmanager
def traffic(server: Server) -> Iterator[Traffic]:
    """Have clients send requests as long as the block runs."""
    seen = Traffic(server)
    with ThreadPoolExecutor(CLIENTS) as executor:
        clients = [executor.submit(seen._client) for _ in range(CLIENTS)]
        try:
            yield seen
        finally:
            seen._enough.set()
        for client in clients:
            client.result()
