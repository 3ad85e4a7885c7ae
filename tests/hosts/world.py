"""All that a test of several hosts has: laboratory, role, workers, and oracles to judge them."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from psycopg2 import extensions

from tests.faults.events import Checkout, failures, moves
from tests.faults.oracles import Evidence, violations
from tests.faults.results import Row, merge_counts, scale
from tests.faults.server_log import Depth, ServerLog
from tests.hosts.backends import NAMES_PATTERN, BackendTimeline, Counts
from tests.hosts.crews import Crew, Crews
from tests.hosts.host import RUNTIME_DIR, Host
from tests.hosts.lab import Laboratory
from tests.hosts.server import PORT, Standby
from tests.support.waiting import wait_until

# Hosts, workers on each of them, and the one limit; a small machine may want less. Read at import,
# as in tests/faults.
_SIZE = os.environ.get("SHAREDPOOL_FAULTS_HOSTS") or "3,8,12"
HOSTS, WORKERS, MAX_CONN = map(int, _SIZE.split(","))
# For so long a host may be silent until the others may have its capacity.
TRUST_S = 20.0
ROLE = "app"
POOL = "hosts"
_BROKER = "sharedpool.broker"  # a word of the command line of an automatic broker


class World:
    """One test's world. `judge` ends it; every oracle must have agreed by then."""

    def __init__(self, lab: Laboratory, row: Row, *, max_conn: int = MAX_CONN) -> None:
        self.lab = lab
        self.row = row
        self.max_conn = max_conn
        self.standby: Standby | None = None
        self._logs = [ServerLog(lab.server.log_path)]
        self.backends = BackendTimeline(lab.server, ROLE)
        self.working: dict[str, Crew] = {}  # by host
        connection = lab.server.observer()
        try:
            with connection.cursor() as cursor:
                cursor.execute(f"CREATE ROLE {ROLE} LOGIN")
                cursor.execute(f"CREATE DATABASE {ROLE} OWNER {ROLE}")
        finally:
            connection.close()
        self.crews = Crews(lab.directory / "crews", row.seed)

    def add_standby(self) -> Standby:
        """Have a replica, whose address the workers know from then on."""
        self.standby = self.lab.add_standby()
        self._logs.append(ServerLog(self.standby.log_path))
        return self.standby

    @property
    def dsn(self) -> str:
        """What the workers connect by: the address of the server, and of its replica, if any."""
        servers = [self.lab.server, *([self.standby] if self.standby else [])]
        one: dict[str, Any] = {"host": ",".join(server.address for server in servers)}
        if self.standby:
            one["target_session_attrs"] = "read-write"
        return str(extensions.make_dsn(user=ROLE, dbname=ROLE, port=PORT, **one))

    # --- hosts and workers

    def prepare(self, **habits: Any) -> None:
        """Start the watch on the server; workers may be started from now on."""
        self.crews.config = {"max_conn": self.max_conn, "name": POOL, "dsn": self.dsn}
        self.crews.habits |= habits
        self.backends.start()

    def open(self, hosts: int = HOSTS, workers: int = WORKERS) -> list[Host]:
        """Start hosts whose workers are all at work when this returns."""
        self.prepare()
        joined = [self.lab.add_host(name) for name in _names(hosts)]
        for host in joined:
            self.join(host, workers)
        for crew in self.working.values():
            crew.wait_for("out", timeout_s=60)
        return joined

    def join(self, host: Host, workers: int = WORKERS) -> Crew:
        """Have workers begin on a host."""
        self.working[host.name] = self.crews.start(host, workers)
        return self.working[host.name]

    def mourn(self, host: Host, at: float) -> None:
        """Know that a host was killed."""
        self.crews.mourn(host, at)
        del self.working[host.name]

    def leave(self, host: Host) -> None:
        """Have the workers of a host leave in good order. Its broker and the host itself stay."""
        self.working.pop(host.name).dismiss()

    def living(self) -> list[Host]:
        return [host for host in self.lab.hosts.values() if host.is_up]

    def all_of(self, hosts: list[Host]) -> int:
        """How many connections the workers of these hosts together can have at the most."""
        workers = sum(len(self.working[host.name].numbers) for host in hosts)
        return min(self.max_conn, workers)

    def wait_until_full(self, hosts: list[Host], since: float, timeout_s: float) -> float:
        """Wait until these hosts have all capacity that they can use; return when they had."""
        addresses = [host.address for host in hosts]
        return self.backends.wait_for_sum(addresses, self.all_of(hosts), since, timeout_s)

    def wait_until_each_has(self, least: int, since: float, timeout_s: float) -> float:
        """Wait until all working hosts have so many connections each; return that moment."""
        working = [self.lab.hosts[name].address for name in self.working]
        return self.backends.wait_for(
            since,
            f"{working} to have {least} connections each",
            lambda counts: all(counts.get(address, 0) >= least for address in working),
            timeout_s,
        )

    def wait_until_gone(self, host: Host, since: float, timeout_s: float) -> float:
        """Wait until a host has no connection on the server; return when it had none."""
        return self.backends.wait_for(
            since,
            f"the connections of {host.name} to be gone",
            lambda counts: not counts.get(host.address),
            timeout_s,
        )

    def fair(self) -> int:
        """How many connections each working host can have at the same time as all the others."""
        fewest = min(len(crew.numbers) for crew in self.working.values())
        return min(self.max_conn // len(self.working), fewest)

    @staticmethod
    def clock() -> float:
        """The time as workers note it: the same on all hosts, which no product may rely on."""
        return time.monotonic()

    def signal_broker(self, host: Host, signum: int) -> float:
        """Send a signal to a host's broker and to nothing else; return when."""
        (broker,) = wait_until(lambda: self.brokers_of(host), 10, f"a broker on {host.name}")
        at = time.monotonic()
        os.kill(broker, signum)
        return at

    def transactions(self) -> int:
        """How many transactions there have been in the pool's database. This one adds none."""
        connection = self.lab.server.observer()
        try:
            with connection.cursor() as cursor:
                cursor.execute(
                    "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s",
                    [ROLE],
                )
                (count,) = cursor.fetchone() or (0,)
                return int(count)
        finally:
            connection.close()

    def brokers_of(self, host: Host) -> list[int]:
        """Return the processes of a host's broker, by this machine's pids."""
        return host.pids_of([_BROKER])

    # --- the verdict

    def all_slots(self, host: Host) -> tuple[int, float]:
        """Have a fresh worker of one host take all slots at once, while nobody works.

        Return how many it has taken, and how long that took.
        """
        crew = self.crews.start(host, 1, "a")
        (took,) = crew.wait_for("took", timeout_s=60)
        crew.wait_for("gave")
        crew.dismiss()
        return int(took.words[0]), float(took.words[1])

    def state_of(self, host: Host) -> str:
        """Return what a host's broker says of itself, for the text of a failure."""
        status = host.output(sys.executable, "-m", "sharedpool", "status")
        return status + host.output("sh", "-c", f"tail -n 40 {RUNTIME_DIR}/sharedpool/*.log")

    def left_after(self, seconds: float) -> Counts:
        """Return the pool's connections that are still there so long after the last worker left.

        {} if none is.
        """
        deadline = self.clock() + seconds
        while (left := self.backends.now()) and self.clock() < deadline:
            time.sleep(0.01)  # polls for the condition
        return left

    def depth(self) -> Depth:
        """Return what the servers' logs tell of pools' connections.

        One server is dead before the next one serves.
        """
        found = [log.depth(ROLE, NAMES_PATTERN) for log in self._logs]
        deepest = max(found, key=lambda depth: depth.peak)
        return Depth(deepest.peak, sum(depth.backends for depth in found), at_peak=deepest.at_peak)

    def judge(self, *, within_s: float = 3.0) -> list[Checkout]:
        """Stop the load and apply every oracle; return all checkouts for the row's own figures."""
        row = self.row
        self.crews.quiet()
        took = {host.name: self.all_slots(host) for host in self.living()}
        states = [
            self.state_of(host) for host in self.living() if took[host.name][0] < self.max_conn
        ]
        self.crews.dismiss()
        left = self.left_after(20)
        self.backends.stop()
        found = self.crews.checkouts()
        fewest, slowest = min(n for n, _ in took.values()), max(s for _, s in took.values())
        depth, peak = self.depth(), self.backends.timeline.peak
        seen = Evidence(self.max_conn, depth, peak, found, self.crews.killed, fewest, slowest)
        row.peak_by_log, row.peak_by_sampler, row.backends = depth.peak, peak, depth.backends
        row.overshoot, row.leaked, row.double_use = seen.overshoot, seen.leaked, seen.double_use
        row.all_within_s = slowest
        row.moves = moves(found)
        row.checkouts = sum(checkout.backend is not None for checkout in found)
        row.errors = merge_counts(failures(found))
        row.figures |= {"took": took, "at the peak": self.backends.timeline.at_peak()}
        row.figures |= {"samples": self.backends.samples}
        wrong = violations(seen, within_s * scale(2, 1))
        if left:
            wrong.append(f"connections of workers that are gone: {left}")
        said = "\n".join(states)
        at_peak = self.backends.timeline.at_peak()
        assert not wrong, f"{wrong}; at the peak: {at_peak}; took: {took}\n{said}"
        for host in self.lab.hosts.values():
            assert "Traceback" not in host.errors(), f"on {host.name}: {host.errors()[:4000]}"
        return found

    def close(self) -> None:
        self.backends.stop()
        self.crews.close()


def _names(hosts: int) -> list[str]:
    return [chr(ord("a") + number) for number in range(hosts)]


@contextmanager
def world(row: Row, *, max_conn: int = MAX_CONN) -> Iterator[World]:
    """Make a laboratory and a world in it, and clear both away."""
    with Laboratory() as lab:
        made = World(lab, row, max_conn=max_conn)
        try:
            yield made
        finally:
            made.close()
