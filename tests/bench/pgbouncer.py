"""PgBouncer from its package, in a directory of its own, gone with its `with` block."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

import psycopg2
from psycopg2.extensions import make_dsn, parse_dsn

from tests.bench.peers import Unavailable
from tests.bench.processes import die_with_parent, end
from tests.bench.server import PASSWORD, BenchServer, Route

_START_S = 20.0


def find() -> str:
    """Return the program's path. Raises Unavailable."""
    # Debian has it where only root's PATH looks.
    found = shutil.which(
        "pgbouncer", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    )
    if found is None:
        raise Unavailable("no program `pgbouncer` is installed (Debian: apt-get install pgbouncer)")
    return found


def version() -> str:
    """Return the program's version, or that there is none."""
    try:
        said = subprocess.run(
            [find(), "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (Unavailable, subprocess.CalledProcessError):
        return "not installed"
    return said.splitlines()[0].removeprefix("PgBouncer").strip()


class PgBouncer:
    """A PgBouncer in front of the server. `dsn` is how clients reach it.

    It goes to the server by `route`. Its clients come the same way, the password and TLS included,
    unless `is_local`: then by its unix socket. `mode` is its pool_mode. It refuses to run as root:
    then it is PostgreSQL's account's. Raises Unavailable where it is not installed.
    """

    def __init__(
        self,
        server: BenchServer,
        route: Route,
        *,
        mode: str = "transaction",
        size: int = 8,
        near: bool = False,
    ) -> None:
        self._program = find()
        self._server = server
        self._route = route
        self._clients = server.routes["unix"] if near else route
        self._mode = mode
        self._size = size
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "it is not running"
        return self._process.pid

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="bench-pgb-", dir="/tmp"))
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        by_unix = self._clients.name == "unix"
        who = {"user": "postgres", "dbname": "postgres", "port": port}
        self.dsn = (
            make_dsn(host=str(self._directory), **who)
            if by_unix
            else make_dsn(
                host="127.0.0.1",
                password=PASSWORD,
                sslmode=parse_dsn(self._clients.dsn)["sslmode"],
                **who,
            )
        )
        self._write("userlist.txt", f'"postgres" "{PASSWORD}"\n')
        self._write("pgbouncer.ini", self._settings(port, by_unix=by_unix))
        if self._clients.name == "tls":
            for file in (self._server.certificate, self._server.key):
                self._write(file.name, file.read_text())
        account = pwd.getpwuid(self._server.postgres.data_dir.stat().st_uid)
        other = os.geteuid() == 0
        if other:
            for path in (self._directory, *self._directory.iterdir()):
                os.chown(path, account.pw_uid, account.pw_gid)
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [self._program, "-q", str(self._directory / "pgbouncer.ini")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=account.pw_uid if other else None,
                group=account.pw_gid if other else None,
                extra_groups=[] if other else None,
                start_new_session=True,
                preexec_fn=die_with_parent,  # this process has no other threads
            )
        self._wait_until_it_answers()

    def _write(self, name: str, text: str) -> None:
        path = self._directory / name
        path.write_text(text)
        path.chmod(0o600)

    def _settings(self, port: int, *, by_unix: bool) -> str:
        """Return its configuration: as it comes, but for the pool, the limits on clients and the
        ways in and out."""
        server = parse_dsn(self._route.dsn)
        target = f"host={server['host']} port={server['port']} user=postgres"
        lines = [
            "[databases]",
            f"postgres = {target} dbname=postgres"
            + f" password={PASSWORD}" * ("password" in server),
            "[pgbouncer]",
            f"listen_port = {port}",
            f"unix_socket_dir = {self._directory if by_unix else ''}",
            f"listen_addr = {'' if by_unix else '127.0.0.1'}",
            f"auth_type = {'trust' if by_unix else 'scram-sha-256'}",
            f"auth_file = {self._directory}/userlist.txt",
            f"pool_mode = {self._mode}",
            f"default_pool_size = {self._size}",
            "stats_users = postgres",
            "max_client_conn = 1000",
            "log_connections = 0",
            "log_disconnections = 0",
        ]
        if self._route.name == "tls":
            lines.append("server_tls_sslmode = require")
        if self._clients.name == "tls":
            lines += [
                "client_tls_sslmode = require",
                f"client_tls_cert_file = {self._directory / self._server.certificate.name}",
                f"client_tls_key_file = {self._directory / self._server.key.name}",
            ]
        return "\n".join(lines) + "\n"

    def _wait_until_it_answers(self) -> None:
        """Connect to its console: that opens no connection to the server, which a row may want to
        begin without."""
        assert self._process is not None
        deadline = time.monotonic() + _START_S
        while True:
            try:
                psycopg2.connect(make_dsn(self.dsn, dbname="pgbouncer"), connect_timeout=2).close()
                return
            except psycopg2.OperationalError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    said = (self._directory / "log").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"PgBouncer does not answer: {error}{said}") from None
            time.sleep(0.01)

    def _stop(self) -> None:
        if self._process is not None:
            end(self._process)
            self._process = None
        shutil.rmtree(self._directory, ignore_errors=True)
