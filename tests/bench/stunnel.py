"""stunnel from its package: a TLS endpoint on the clients' machine, gone with its `with` block."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg2
from psycopg2.extensions import make_dsn

from tests.bench.peers import Unavailable
from tests.bench.processes import die_with_parent, end
from tests.bench.server import PASSWORD, TYPIST, BenchServer, Route

_PORT = 5432  # a name: it listens on a unix socket
_START_S = 20.0


def find() -> str:
    """Return the program's path. Raises Unavailable."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/bin", "/usr/sbin"])
    # Debian's name goes first: elsewhere `stunnel` may be a wrapper of version 3.
    if found := shutil.which("stunnel4", path=path) or shutil.which("stunnel", path=path):
        return found
    raise Unavailable("no program `stunnel4` is installed (Debian: apt-get install stunnel4)")


def version() -> str:
    """Return the program's version, or that there is none."""
    try:
        said = subprocess.run(
            [find(), "-version"], capture_output=True, text=True, check=True
        ).stderr
    except (Unavailable, subprocess.CalledProcessError):
        return "not installed"
    return next(
        (line.split()[1] for line in said.splitlines() if line.startswith("stunnel ")), "unknown"
    )


@contextlib.contextmanager
def endpoint(server: BenchServer) -> Iterator[Route]:
    """Have a way to the server that is a plain unix socket as far as the endpoint, and TLS from
    there.

    The server's certificate is checked; who logs in there is asked for a password, since libpq
    refuses SCRAM. Raises Unavailable where stunnel is not installed.
    """
    program = find()
    with tempfile.TemporaryDirectory(prefix="bench-tls-", dir="/tmp") as name:
        directory = Path(name)
        config, log = directory / "stunnel.conf", directory / "log"
        config.write_text(_config(server, directory / f".s.PGSQL.{_PORT}"))
        who = {"user": TYPIST, "dbname": "postgres", "password": PASSWORD}
        dsn = make_dsn(host=name, port=_PORT, sslmode="disable", gssencmode="disable", **who)
        with log.open("wb") as output:
            process = subprocess.Popen(
                [program, str(config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,  # this process has no other threads
            )
        try:
            _wait_until_it_answers(process, dsn, log)
            yield Route("endpoint", "TLS by a local endpoint, password", dsn)
        finally:
            end(process)


def _config(server: BenchServer, accept: Path) -> str:
    lines = [
        "foreground = yes",
        "pid =",
        "syslog = no",
        "debug = err",
        "[postgres]",
        "client = yes",
        "protocol = pgsql",
        f"accept = {accept}",
        f"connect = 127.0.0.1:{server.postgres.port}",
        f"CAfile = {server.certificate}",
        "verifyChain = yes",
        "checkHost = localhost",
    ]
    return "\n".join(lines) + "\n"


def _wait_until_it_answers(process: "subprocess.Popen[bytes]", dsn: str, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            psycopg2.connect(dsn, connect_timeout=2).close()
            return
        except psycopg2.OperationalError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"stunnel does not answer: {error}{said}") from None
        time.sleep(0.01)
