"""The PostgreSQL of the run: one server, with three ways in."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg2
from psycopg2.extensions import make_dsn

from sharedpool.postgres.throwaway_server import EphemeralPostgres

PASSWORD = "benchmark"
TYPIST = "typist"  # logs in by the password itself, under TLS
ROWS_OF_ONE = 1000  # each client has rows of its own: nobody waits for a row lock
_CLIENTS = 160
_HBA = f"""
local all all trust
hostssl all {TYPIST} 127.0.0.1/32 password
host all all 127.0.0.1/32 scram-sha-256
"""
# Dead rows are pruned page by page as they are met; a vacuum would fall into somebody's turn.
_SETTINGS = {"autovacuum": "off", "shared_buffers": "128MB", "max_wal_size": "2GB"}


@dataclass(frozen=True)
class Route:
    """A way to the server."""

    name: str  # unix, tcp or tls
    text: str
    dsn: str


class BenchServer:
    """A PostgreSQL with a table to work on.

    `routes` are by unix socket (trust), TCP (scram), TCP with TLS (scram).
    """

    def __init__(self, postgres: EphemeralPostgres) -> None:
        self.postgres = postgres
        where: dict[str, Any] = {"user": "postgres", "dbname": "postgres", "port": postgres.port}
        host: dict[str, Any] = {"host": "127.0.0.1", "password": PASSWORD}
        self.routes = {
            "unix": Route(
                "unix", "unix socket, trust", make_dsn(host=str(postgres.directory), **where)
            ),
            "tcp": Route("tcp", "TCP, scram", make_dsn(**host, sslmode="disable", **where)),
            "tls": Route(
                "tls", "TCP with TLS, scram", make_dsn(**host, sslmode="require", **where)
            ),
        }
        self.dsn = self.routes["unix"].dsn
        self.certificate = postgres.data_dir / "server.crt"
        self.key = postgres.data_dir / "server.key"

    @property
    def version(self) -> str:
        with contextlib.closing(psycopg2.connect(self.dsn)) as conn:
            return str(conn.info.parameter_status("server_version"))

    def prepare(self) -> None:
        """Open the three ways, and make the table."""
        owner = self.postgres.data_dir.stat()
        hba = self.postgres.data_dir / "pg_hba.conf"
        hba.write_text(_HBA)
        make = [
            "openssl",
            "req",
            "-x509",
            "-nodes",
            "-subj",
            "/CN=localhost",
            "-newkey",
            "rsa:2048",
        ]
        subprocess.run(
            [*make, "-out", self.certificate, "-keyout", self.key], check=True, capture_output=True
        )
        self.key.chmod(0o600)
        for path in (self.certificate, self.key):
            os.chown(path, owner.st_uid, owner.st_gid)
        with contextlib.closing(psycopg2.connect(self.dsn, password=PASSWORD)) as conn:
            conn.autocommit = True
            with conn.cursor() as cursor:
                cursor.execute("ALTER SYSTEM SET ssl = on")
                cursor.execute("SELECT pg_reload_conf()")
                cursor.execute(f"CREATE ROLE {TYPIST} SUPERUSER LOGIN PASSWORD %s", [PASSWORD])
                cursor.execute(
                    "CREATE TABLE bench (id int PRIMARY KEY, counter bigint NOT NULL DEFAULT 0, "
                    "filler text NOT NULL)"
                    " WITH (fillfactor = 50)"
                )
                cursor.execute(
                    "INSERT INTO bench SELECT n, 0, repeat('x', 80) FROM generate_series(0, %s) n",
                    [ROWS_OF_ONE * _CLIENTS - 1],
                )
                cursor.execute("VACUUM (ANALYZE, FREEZE) bench")
                cursor.execute("CHECKPOINT")
        self._wait_for_tls()

    def _wait_for_tls(self) -> None:
        """The postmaster takes in new settings a moment after it was told."""
        deadline = time.monotonic() + 10
        while True:
            try:
                psycopg2.connect(self.routes["tls"].dsn).close()
                return
            except psycopg2.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


@contextlib.contextmanager
def bench_server() -> Iterator[BenchServer]:
    """Start the server; it is gone without a trace afterwards."""
    with EphemeralPostgres(
        max_connections=300, settings=_SETTINGS, tcp=True, password=PASSWORD
    ) as postgres:
        server = BenchServer(postgres)
        server.prepare()
        yield server
