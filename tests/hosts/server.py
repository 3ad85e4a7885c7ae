"""PostgreSQL on machines of its own: a throw-away server in a namespace, and a streaming replica.

The test itself reaches a server through its unix socket, which no cut cable and no namespace is in
the way of.
"""

import time
from subprocess import DEVNULL, Popen

import psycopg2
from psycopg2 import extensions

from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.faults import server_log
from tests.hosts.network import NETMASK, PREFIX, Cable, NetworkNamespace, Switch
from tests.support import replica
from tests.support.waiting import wait_until

PORT = 5432
_START_S = 60.0


class LabServer(EphemeralPostgres):
    """The throw-away server, on an address of the laboratory, with a log that oracles can read."""

    def __init__(self, address: str, switch: Switch, *, max_connections: int = 100) -> None:
        settings = {"listen_addresses": address, "wal_keep_size": "256MB"}
        super().__init__(max_connections=max_connections, settings=server_log.SETTINGS | settings)
        self.address = address
        self._namespace = NetworkNamespace()
        try:
            self.cable: Cable = switch.connect(self._namespace.pid, address)
        except BaseException:
            self._namespace.close()
            raise

    def _spawn(self, program: str, *arguments: str) -> "Popen[bytes]":
        """Start a server program as the throw-away server does, but in the namespace.

        `nsenter` needs root; so it, and not Popen, changes the account. It becomes the program.
        """
        user, group = self._account or (0, 0)
        account = ("--setuid", str(user), "--setgid", str(group)) if self._account else ()
        namespace = f"--net=/proc/{self._namespace.pid}/ns/net"
        with self.log_path.open("ab") as log:
            return Popen(
                ["nsenter", namespace, *account, str(self.bin_dir / program), *arguments],
                stdin=DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
                start_new_session=True,
            )

    def _create(self) -> None:
        super()._create()
        with (self.data_dir / "pg_hba.conf").open("a") as file:
            for database in ("all", "replication"):
                file.write(f"host {database} all {PREFIX}0/{NETMASK} trust\n")

    def observer(self, database: str = "postgres") -> extensions.connection:
        """Have an autocommit connection of the superuser's, through the unix socket."""
        connection = psycopg2.connect(self.dsn, dbname=database, application_name="lab observer")
        connection.autocommit = True
        return connection

    def stop(self) -> None:
        try:
            super().stop()
        finally:
            self._namespace.close()


class Standby(LabServer):
    """A streaming replica of another server; until it is promoted, it is read-only."""

    def __init__(self, primary: LabServer, address: str, switch: Switch) -> None:
        super().__init__(address, switch)
        self._primary = primary

    def _create(self) -> None:
        super()._create()
        address = self._primary.address
        replica.copy(
            self._primary,
            self,
            listen_addresses=self.address,
            primary_conninfo=f"host={address} user=postgres",
        )

    def wait_until_it_streams(self) -> None:
        """Wait until all that the primary has written by now is here."""
        ours, theirs = self.observer(), self._primary.observer()
        try:
            with ours.cursor() as here, theirs.cursor() as there:
                there.execute("SELECT pg_current_wal_lsn()")
                (written,) = there.fetchone() or ("",)

                def caught_up() -> bool:
                    here.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", [written])
                    return bool((here.fetchone() or (False,))[0])

                wait_until(caught_up, _START_S, "the replica to follow the primary")
        finally:
            ours.close()
            theirs.close()

    def promote(self) -> float:
        """Make it a server that writes; return when it was one."""
        replica.promote(self)
        return time.monotonic()
