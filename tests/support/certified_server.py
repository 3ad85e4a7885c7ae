"""A PostgreSQL that wants TLS, with a certificate of a CA of its own."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import pytest
from psycopg2.extensions import make_dsn

from sharedpool.postgres.throwaway_server import EphemeralPostgres, PostgresFailed
from tests.support.proxies import HOST, owner, program

PASSWORD = "zsecret"
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Certified:
    """A PostgreSQL whose certificate says `name`, with a role and a database `app`.

    By TCP it wants TLS of everybody.

    `keys` has ca.crt, its CA's certificate, stranger.crt, that of another one, and app.crt with
    app.key, the role's. The superuser logs in by SCRAM.
    """

    server: EphemeralPostgres
    name: str
    keys: Path

    @property
    def near_dsn(self) -> str:
        """The superuser's DSN by the unix socket, without TLS or a password."""
        return make_dsn(self.server.dsn, host=str(self.server.directory))

    @property
    def verified_dsn(self) -> str:
        """The superuser's DSN by TCP, under TLS that verifies the server."""
        whom = {
            "host": self.name,
            "hostaddr": HOST,
            "sslmode": "verify-full",
            "sslrootcert": str(self.keys / "ca.crt"),
        }
        return make_dsn(self.server.dsn, **whom)


@contextmanager
def certified(name: str, method: str) -> Iterator[Certified]:
    """Run such a server; `app` logs in by this method, with the superuser's password."""
    with (
        tempfile.TemporaryDirectory(prefix="spx-") as place,
        EphemeralPostgres(tcp=True, password=PASSWORD) as server,
    ):
        keys, data = Path(place), server.data_dir
        for authority in ("ca", "stranger"):
            _openssl(
                "req",
                "-x509",
                *_NEW_KEY,
                "-days",
                "9",
                "-subj",
                f"/CN={authority}",
                "-keyout",
                keys / f"{authority}.key",
                "-out",
                keys / f"{authority}.crt",
            )
        _certify(keys, "app", "app")
        _certify(keys, "server", name)
        for file in ("server.crt", "server.key", "ca.crt"):
            shutil.copy(keys / file, data)
            os.chown(data / file, owner(server), -1)
        entries = (
            f"hostssl app app {HOST}/32 {method}",
            f"hostssl all all {HOST}/32 scram-sha-256",
        )
        (data / "pg_hba.conf").write_text("\n".join(["local all all trust", *entries, ""]))
        with (data / "postgresql.conf").open("a") as settings:
            settings.write("ssl = on\nssl_ca_file = 'ca.crt'\n")
        try:
            server.restart()
        except PostgresFailed as error:
            if "SSL is not supported by this build" not in str(error):
                raise
            pytest.skip("this PostgreSQL was built without TLS")
        with contextlib.closing(psycopg2.connect(server.dsn)) as conn:
            conn.autocommit = True
            with conn.cursor() as cursor:
                cursor.execute("CREATE ROLE app LOGIN PASSWORD %s", [PASSWORD])
                cursor.execute("CREATE DATABASE app OWNER app")
        yield Certified(server, name, keys)


def _certify(keys: Path, whom: str, name: str) -> None:
    """Make a key, and let the CA certify it for `name`."""
    key, request, names = (keys / f"{whom}.{kind}" for kind in ("key", "request", "names"))
    names.write_text(f"subjectAltName = DNS:{name}\n")
    _openssl("req", "-new", *_NEW_KEY, "-subj", f"/CN={name}", "-keyout", key, "-out", request)
    _openssl(
        "x509",
        "-req",
        "-in",
        request,
        "-extfile",
        names,
        "-days",
        "9",
        "-out",
        keys / f"{whom}.crt",
        "-CA",
        keys / "ca.crt",
        "-CAkey",
        keys / "ca.key",
        "-CAcreateserial",
    )
    key.chmod(0o600)


def _openssl(*arguments: str | Path) -> None:
    subprocess.run([program("openssl"), *arguments], check=True, capture_output=True)
