"""A streaming replica of a throw-away server, and how it becomes the primary."""

import shutil
import subprocess
from subprocess import DEVNULL

import psycopg2

from sharedpool.postgres.throwaway_server import EphemeralPostgres

_PROMOTED_S = 60


class Replica(EphemeralPostgres):
    """A streaming replica of a server without TCP; until it is promoted, it is read-only."""

    def __init__(self, primary: EphemeralPostgres) -> None:
        super().__init__()
        self._primary = primary

    def _create(self) -> None:
        super()._create()
        copy(self._primary, self, primary_conninfo=self._primary.dsn)


def copy(primary: EphemeralPostgres, replica: EphemeralPostgres, **settings: str) -> None:
    """Replace what a new server has by what the primary has, while the primary runs.

    By the server's own functions for that: its programs for that may not be there.
    """
    shutil.rmtree(replica.data_dir)
    connection = psycopg2.connect(primary.dsn)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            new = connection.server_version >= 150000
            start, stop = (
                ("pg_backup_start(%s, true)", "pg_backup_stop(false)")
                if new
                else ("pg_start_backup(%s, true, false)", "pg_stop_backup(false, false)")
            )
            cursor.execute(f"SELECT {start}", ["replica"])
            # By `cp`: files may vanish and change meanwhile, and keep their owner and mode.
            subprocess.run(
                ["cp", "-a", str(primary.data_dir), str(replica.data_dir)],
                check=False,
                stderr=DEVNULL,
            )
            cursor.execute(f"SELECT labelfile FROM {stop}")
            (label,) = cursor.fetchone() or ("",)
    finally:
        connection.close()
    for name in ("postmaster.pid", "postmaster.opts"):
        (replica.data_dir / name).unlink(missing_ok=True)
    for entry in (replica.data_dir / "pg_wal").iterdir():
        if entry.is_file():
            entry.unlink()  # half written; the replica has them sent
    for name, text in (("backup_label", label), ("standby.signal", "")):
        path = replica.data_dir / name
        path.write_text(text)
        shutil.chown(path, primary.data_dir.owner(), primary.data_dir.group())
    with (replica.data_dir / "postgresql.conf").open("a") as file:
        for name, value in {"unix_socket_directories": str(replica.directory), **settings}.items():
            file.write(f"{name} = '{value}'\n")


def promote(replica: EphemeralPostgres) -> None:
    """Make a replica a primary; return when it is one."""
    connection = psycopg2.connect(replica.dsn)
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_promote(true, %s)", [_PROMOTED_S])
            assert cursor.fetchone() == (True,), "the replica was not promoted"
    finally:
        connection.close()
