"""The proxies that people put in front of PostgreSQL, each started for a test."""

import contextlib
import os
import re
import select
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from psycopg2.extensions import make_dsn

from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.ports import free_port
from tests.support.waiting import wait_until

# Debian's are not on everybody's PATH.
_PLACES = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/usr/bin"])
HOST = "127.0.0.1"


@contextmanager
def haproxy(
    server: EphemeralPostgres, *, silence_s: float = 60.0, orders: Path | None = None
) -> Iterator[str]:
    """HAProxy, which closes both sides after `silence_s` without traffic, even during a query.

    It takes orders (see `shut_down_sessions`) at the socket `orders`.
    """
    port, silence = free_port(), f"{silence_s * 1000:.0f}ms"
    config = f"""
        global
            {f"stats socket {orders} mode 600 level admin" if orders else ""}
        defaults
            mode tcp
            timeout connect 5s
            timeout client {silence}
            timeout server {silence}
        listen postgres
            bind {HOST}:{port}
            server one {unix_path(server)}
    """
    with (
        _file("haproxy.cfg", config) as path,
        running(program("haproxy"), "-db", "-f", str(path), port=port),
    ):
        yield by(server, port)


def shut_down_sessions(orders: Path) -> None:
    """Let HAProxy close both sides of all that it forwards, as if the time of silence were over."""
    with socket.socket(socket.AF_UNIX) as admin:
        admin.connect(str(orders))
        admin.sendall(b"shutdown sessions server postgres/one\n")
        said = b"".join(iter(lambda: admin.recv(4096), b""))
    assert not said.strip(), said.decode()


@contextmanager
def socat(server: EphemeralPostgres) -> Iterator[str]:
    """A plain forwarder, with a process for each connection."""
    port = free_port()
    listen = f"TCP-LISTEN:{port},bind={HOST},reuseaddr,fork,backlog=128"
    with running(program("socat"), listen, f"UNIX-CONNECT:{unix_path(server)}", port=port):
        yield by(server, port)


@contextmanager
def stunnel(server: EphemeralPostgres) -> Iterator[str]:
    """A tunnel: TLS between one stunnel near the workers and another near the server."""
    near, far = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="spx-") as directory:
        keys = Path(directory, "both.pem")
        subprocess.run(
            [
                program("openssl"),
                "req",
                "-new",
                "-x509",
                "-days",
                "9",
                "-nodes",
                "-subj",
                "/CN=tunnel",
                "-out",
                keys,
                "-keyout",
                keys.with_suffix(".key"),
            ],
            check=True,
            capture_output=True,
        )
        common = "foreground = yes\npid =\ndebug = err\n"
        client = f"{common}[near]\nclient = yes\naccept = {HOST}:{near}\nconnect = {HOST}:{far}\n"
        inner = f"accept = {HOST}:{far}\nconnect = {unix_path(server)}\n"
        serving = f"{common}[far]\n{inner}cert = {keys}\nkey = {keys.with_suffix('.key')}\n"
        with (
            _file("far.conf", serving) as far_end,
            running(program("stunnel4"), str(far_end), port=far),
            _file("near.conf", client) as near_end,
            running(program("stunnel4"), str(near_end), port=near),
        ):
            yield by(server, near)


@contextmanager
def tls_endpoint(config: str, **settings: object) -> Iterator[None]:
    """Run stunnel by the configuration `config`, with other values for some settings (`accept`
    always)."""
    for name, value in settings.items():
        config, found = re.subn(rf"^{name} = .*$", f"{name} = {value}", config, flags=re.MULTILINE)
        assert found == 1, f"{name} is set {found} times"
    accept = settings["accept"]
    where = accept if isinstance(accept, Path) else int(str(accept).rpartition(":")[2])
    with (
        _file("endpoint.conf", config) as path,
        running(program("stunnel4"), str(path), port=where),
    ):
        yield


@contextmanager
def pgbouncer(
    server: EphemeralPostgres,
    user: str,
    *,
    mode: str = "session",
    size: int = 20,
    others: tuple[str, ...] = (),
) -> Iterator[str]:
    """PgBouncer, with room for `size` backends of its own."""
    port = free_port()
    users = "".join(f'"{name}" ""\n' for name in dict.fromkeys((user, *others)))
    with _directory() as directory:
        (directory / "users.txt").write_text(users)
        (directory / "pgbouncer.ini").write_text(
            f"[databases]\n* = host={server.host} port={server.port}\n"
            f"[pgbouncer]\nlisten_addr = {HOST}\nlisten_port = {port}\nunix_socket_dir =\n"
            "auth_type = trust\n"
            f"auth_file = {directory}/users.txt\npool_mode = {mode}\ndefault_pool_size = {size}\n"
            "max_client_conn = 200\nserver_idle_timeout = 1\n"
        )
        with running(
            program("pgbouncer"),
            "-q",
            str(directory / "pgbouncer.ini"),
            port=port,
            uid=owner(server),
        ):
            yield by(server, port)


class LateCloser:
    """A proxy that closes the client's side when the client does, and the server's side `late_s`
    later.

    `accept_late_s`: a connect waits for so long in its queue before the server hears of it.
    """

    def __init__(
        self, server: EphemeralPostgres, late_s: float, accept_late_s: float = 0.0
    ) -> None:
        self._path = unix_path(server)
        self._late_s, self._accept_late_s = late_s, accept_late_s
        self._listener = socket.create_server((HOST, 0), backlog=128)
        self.dsn = by(server, self._listener.getsockname()[1])
        self.accepted = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="late closer")
        self._sessions: list[threading.Thread] = []

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                self.accepted += 1
                self._sessions.append(threading.Thread(target=self._serve, args=[client]))
                self._sessions[-1].start()

    def _serve(self, client: socket.socket) -> None:
        self._over.wait(self._accept_late_s)
        with socket.socket(socket.AF_UNIX) as server:
            with client, contextlib.suppress(OSError):
                server.connect(self._path)
                self._forward(client, server)
            self._over.wait(self._late_s)

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        poller = select.poll()
        for each in (client, server):
            poller.register(each, select.POLLIN)
        while not self._over.is_set():
            for fd, _ in poller.poll(100):
                source, sink = (client, server) if fd == client.fileno() else (server, client)
                if not (data := source.recv(65536)):
                    return
                sink.sendall(data)

    def __enter__(self) -> "LateCloser":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in (self._thread, *self._sessions):
            thread.join()


@contextmanager
def late_closer(server: EphemeralPostgres, *, late_s: float = 2.0) -> Iterator[str]:
    with LateCloser(server, late_s) as proxy:
        yield proxy.dsn


# --- what they share


def program(name: str) -> str:
    """Return the path of a program; skip the test if it is not installed."""
    found = shutil.which(name, path=_PLACES)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def by(server: EphemeralPostgres, port: int) -> str:
    """Return the server's DSN by another port, without encryption, whose start some proxies cannot
    parse."""
    return make_dsn(server.dsn, host=HOST, port=port, sslmode="disable", gssencmode="disable")


def unix_path(server: EphemeralPostgres) -> str:
    return f"{server.host}/.s.PGSQL.{server.port}"


def owner(server: EphemeralPostgres) -> int:
    """Return the owner of the server's directory, since PgBouncer does not run as root."""
    return server.directory.stat().st_uid


@contextmanager
def _directory() -> Iterator[Path]:
    """A directory that every user may read: some of these programs do not run as root."""
    path = Path(tempfile.mkdtemp(prefix="spx-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _file(name: str, text: str) -> Iterator[Path]:
    with _directory() as directory:
        path = directory / name
        path.write_text("\n".join(line.strip() for line in text.strip().splitlines()) + "\n")
        yield path


@contextmanager
def running(*command: str, port: int | Path, uid: int | None = None) -> Iterator[None]:
    """Run a program that listens at a port or a path during the block, as `uid` if this user is
    root.

    With port 0, nothing is waited for.
    """
    options: dict[str, object] = {}
    if uid is not None and os.geteuid() == 0:
        options = {"user": uid, "extra_groups": []}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, **options)  # type: ignore[call-overload]
        try:
            if port:
                wait_until(_listens(process, port), 20, f"{command[0]} to listen")
            yield
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            said.seek(0)
            print(
                f"{Path(command[0]).name} said:\n{said.read()[-2000:]}"
            )  # pytest shows it when the test fails


def _listens(process: "subprocess.Popen[bytes]", port: int | Path) -> Callable[[], bool]:
    def listens() -> bool:
        assert process.poll() is None, "it has ended"
        by_path = isinstance(port, Path)
        with socket.socket(socket.AF_UNIX if by_path else socket.AF_INET) as sock:
            return sock.connect_ex(str(port) if by_path else (HOST, port)) == 0

    return listens
