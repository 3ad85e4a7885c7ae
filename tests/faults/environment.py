"""All that a fault test has: server, role, broker, workers, and the oracles that judge them in the
end."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2 import extensions, sql

from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.faults.brokers import BrokerProcess
from tests.faults.events import Checkout, Event, checkouts, failures, files, moves
from tests.faults.oracles import Evidence, violations
from tests.faults.results import HANDOVER, Row, merge_counts, scale
from tests.faults.role_sampler import RoleSampler
from tests.faults.server_log import ServerLog
from tests.faults.worker_fleet import WorkerFleet
from tests.support.waiting import wait_until

MAX_CONN = 10
WORKERS = 16
TTL_S = 3.0
POOL = "fault"
# How long after its deadline a `get_conn` may answer on a busy machine, in tests that do not
# measure it.
LATE_S = scale(1.5, 1.0)
_numbers = count(1)


class Environment:
    """One test's world. `judge` ends it; every oracle must have agreed by then."""

    def __init__(
        self, server: EphemeralPostgres, row: Row, *, role_limit: bool, directory: Path
    ) -> None:
        self.server = server
        self.row = row
        self.directory = directory
        self.role = f"app{next(_numbers)}"
        self.dsn = extensions.make_dsn(server.dsn, user=self.role, dbname=self.role)
        self._create(role_limit)
        self.log = ServerLog(server.log_path)
        self.sampler = RoleSampler(server.dsn, self.role)
        self.address = f"ipc://{directory}/broker.sock"
        self.broker = BrokerProcess(
            self.address,
            directory / "broker.log",
            max_conn=MAX_CONN,
            ttl=TTL_S,
            dsn=server.dsn,
            drain_timeout=3,
        )
        self.crew: WorkerFleet | None = None
        self.max_conn = MAX_CONN
        self.pools_elsewhere = (
            False  # a pooler has backends of its own, and lends them to one worker after another
        )

    def _create(self, role_limit: bool) -> None:
        limit = MAX_CONN if role_limit else -1
        role = sql.Identifier(self.role)
        with self.admin() as cursor:
            cursor.execute(
                sql.SQL("CREATE ROLE {} LOGIN CONNECTION LIMIT {}").format(role, sql.Literal(limit))
            )
            cursor.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(role, role))
        with self.admin(self.role) as cursor:
            cursor.execute(
                "CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL DEFAULT 0)"
            )
            cursor.execute("INSERT INTO account SELECT generate_series(0, 99)")
            cursor.execute(sql.SQL("GRANT ALL ON account TO {}").format(role))

    @contextmanager
    def admin(self, database: str = "postgres") -> Iterator[extensions.cursor]:
        """Have a cursor of the superuser's, in autocommit mode."""
        connection = psycopg2.connect(
            self.server.dsn, dbname=database, application_name="fault observer"
        )
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                yield cursor
        finally:
            connection.close()

    def open(
        self, address: str | None = None, config: dict[str, Any] | None = None, **habits: Any
    ) -> WorkerFleet:
        """Start sampler, broker and the nursery of the workers; the workers themselves are the
        test's to start."""
        self.sampler.start()
        self.broker.start()
        settings = {
            "broker": address or self.address,
            "dsn": self.dsn,
            "name": POOL,
            "max_conn": MAX_CONN,
        }
        settings["handover"] = HANDOVER
        self.crew = WorkerFleet(
            self.directory / "crew", self.row.seed, settings | (config or {}), **habits
        )
        return self.crew

    # --- what was seen

    def events(self) -> dict[str, Iterator[Event]]:
        """All that the workers have noted, file by file."""
        assert self.crew is not None
        return files(self.crew.directory)

    def checkouts(self) -> list[Checkout]:
        return checkouts(self.events())

    def backends(self) -> int:
        """How many backends the pool has on the server."""
        with self.admin() as cursor:
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE usename = %s", [self.role])
            (found,) = cursor.fetchone() or (0,)
            return int(found)

    # --- the verdict

    def all_slots(self) -> tuple[int, float]:
        """Have a fresh worker take all slots at once, while the others do nothing; return how many,
        and how long."""
        assert self.crew is not None
        (fresh,) = self.crew.start(1, "a")
        (took,) = self.crew.wait_for([fresh], "took")
        self.crew.wait_for([fresh], "gave")
        self.crew.dismiss([fresh])
        return int(took.words[0]), float(took.words[1])

    def judge(self, *, within_s: float = 2.0) -> list[Checkout]:
        """Stop the load and apply every oracle; return all checkouts for the row's own figures."""
        crew, row = self.crew, self.row
        assert crew is not None
        crew.quiet()
        took, took_s = self.all_slots()
        state = self.broker.report()
        crew.dismiss()
        found = self.checkouts()
        wait_until(
            lambda: self.backends() == 0,
            10,
            "the backends of the workers that have left to be gone",
        )
        self.sampler.stop()
        killed = {str(number): at for number, at in crew.killed.items()}
        depth = self.log.depth(self.role)
        seen = Evidence(self.max_conn, depth, self.sampler.peak, found, killed, took, took_s)
        row.peak_by_log, row.peak_by_sampler, row.backends = (
            depth.peak,
            self.sampler.peak,
            depth.backends,
        )
        row.overshoot, row.leaked, row.double_use = seen.overshoot, seen.leaked, seen.double_use
        row.all_within_s = took_s
        row.moves = moves(found)
        row.checkouts = sum(checkout.backend is not None for checkout in found)
        row.errors = merge_counts(failures(found))
        late = [
            c for c in found if c.answered is not None and c.timeout > 0 and c.lateness > LATE_S
        ]
        row.figures["late answers"] = len(late)
        if HANDOVER == "off" and not self.pools_elsewhere:
            assert not row.moves, "a connection has moved between workers"
        wrong = violations(seen, within_s * scale(2, 1))
        assert not wrong, f"{wrong}; the broker: {state}"
        for said in (self.broker.words(), crew.errors()):
            assert "Traceback" not in said, _first_traceback(said)
        return found

    def close(self) -> None:
        if self.crew is not None:
            self.crew.close()
        self.sampler.stop()
        self.broker.stop()
        with self.admin() as cursor:
            cursor.execute(
                sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(self.role))
            )


def _first_traceback(said: str) -> str:
    """Return the first traceback, and a little of what came before it."""
    at = said.index("Traceback")
    return f"{said.count('Traceback')} tracebacks, the first: {said[max(0, at - 500) : at + 4000]}"


@contextmanager
def environment(server: EphemeralPostgres, row: Row, *, role_limit: bool) -> Iterator[Environment]:
    """Make an arena, and clear it away."""
    directory = Path(tempfile.mkdtemp(prefix="spf-", dir="/tmp"))  # short enough for a unix socket
    started = time.monotonic()
    world = Environment(server, row, role_limit=role_limit, directory=directory)
    try:
        yield world
    finally:
        row.figures["duration_s"] = round(time.monotonic() - started, 1)
        print(
            f"the broker's last words:\n{world.broker.words()[-6000:]}"
        )  # pytest shows it when the test fails
        world.close()
        shutil.rmtree(directory, ignore_errors=True)
