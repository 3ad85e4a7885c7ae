"""How many connections of pools each host has on the server, sampled as fast as that answers.

It looks at the server alone: at the names and addresses in `pg_stat_activity`. A pool's connections
are named `sharedpool POOL [INSTANCE]`; what brokers have for themselves is named otherwise and not
counted, since the limit is the pool's.
"""

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import psycopg2

from tests.hosts.server import LabServer
from tests.support.waiting import wait_until

NAMES = "sharedpool % [%]"
NAMES_PATTERN = r"sharedpool .* \[[^\]]*\]"
_COUNT = (
    "SELECT host(client_addr), count(*) FROM pg_stat_activity"
    " WHERE usename = %s AND application_name LIKE %s GROUP BY client_addr"
)
Counts = dict[str, int]


@dataclass(slots=True)
class Timeline:
    """The counts by host's address from `at` on (CLOCK_MONOTONIC), until the next entry."""

    entries: list[tuple[float, Counts]] = field(default_factory=list)

    def add(self, at: float, counts: Counts) -> None:
        if not self.entries or self.entries[-1][1] != counts:
            self.entries.append((at, counts))

    @property
    def peak(self) -> int:
        """The most that there were at once, over all hosts."""
        return max((sum(counts.values()) for _, counts in self.entries), default=0)

    def at_peak(self) -> Counts:
        """Return who had how many when there were most."""
        return max(
            (counts for _, counts in self.entries), key=lambda c: sum(c.values()), default={}
        )

    def first(self, since: float, holds: Callable[[Counts], bool]) -> float | None:
        """Return the first moment from `since` on at which this held of the counts, if any."""
        start = max(0, bisect_right(self.entries, since, key=lambda entry: entry[0]) - 1)
        for at, counts in self.entries[start:]:
            if holds(counts):
                return max(at, since)
        return None


class BackendTimeline:
    """A thread that keeps the timeline of one role.

    It survives restarts of the server, and follows it elsewhere.
    """

    def __init__(self, server: LabServer, role: str, every_s: float = 0.002) -> None:
        self._server = server
        self._role = role
        self._every_s = every_s
        self._stop_asked = threading.Event()
        self._thread = threading.Thread(target=self._run, name="backend timeline")
        self.timeline = Timeline()
        self.samples = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop_asked.set()
        if self._thread.ident is not None:
            self._thread.join()

    def follow(self, server: LabServer) -> None:
        """Look at another server as soon as this one is gone."""
        self._server = server

    def now(self) -> Counts:
        entries = self.timeline.entries
        return entries[-1][1] if entries else {}

    def wait_for(self, since: float, what: str, holds: Callable[[Counts], bool], s: float) -> float:
        """Wait until something has held of the counts from `since` on; return that moment."""

        def found() -> tuple[float] | None:
            nonlocal since
            looked_until = self.timeline.entries[-1][0] if self.timeline.entries else since
            at = self.timeline.first(since, holds)
            since = max(since, looked_until)  # what was before has been looked at
            return None if at is None else (at,)

        try:
            return wait_until(found, s, what)[0]
        except AssertionError as error:
            raise AssertionError(f"{error}; the hosts' connections now: {self.now()}") from None

    def wait_for_sum(self, addresses: Iterable[str], least: int, since: float, s: float) -> float:
        """Wait until these hosts have so many connections together; return when they had."""
        these = set(addresses)
        what = f"{sorted(these)} to have {least} connections"
        return self.wait_for(
            since, what, lambda c: sum(n for a, n in c.items() if a in these) >= least, s
        )

    def _run(self) -> None:
        while not self._stop_asked.is_set():
            try:
                self._sample()
            except psycopg2.Error:
                self.timeline.add(time.monotonic(), {})
                self._stop_asked.wait(0.01)  # the server is away

    def _sample(self) -> None:
        connection = self._server.observer()
        try:
            with connection.cursor() as cursor:
                while not self._stop_asked.wait(self._every_s):
                    cursor.execute(_COUNT, [self._role, NAMES])
                    counts = {str(address): int(n) for address, n in cursor.fetchall()}
                    self.timeline.add(time.monotonic(), counts)
                    self.samples += 1
        finally:
            connection.close()
