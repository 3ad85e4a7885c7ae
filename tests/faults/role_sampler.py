"""Sample, as fast as the server answers, how many backends one role has."""

import threading
import time

import psycopg2


class RoleSampler:
    """`peak` is the most seen at once. It survives restarts of the server."""

    def __init__(self, dsn: str, role: str, every_s: float = 0.002) -> None:
        self._dsn = dsn
        self._role = role
        self._every_s = every_s
        self._stop_asked = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler")
        self._awaited = threading.Event()
        self._count, self._seen = 0, 0.0
        self.peak = 0
        self.now = 0
        self.samples = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop_asked.set()
        if self._thread.ident is not None:
            self._thread.join()

    def wait_for(self, count: int, timeout_s: float) -> float:
        """Wait until there are `count` backends at once; return when that was seen."""
        self._count = count
        self._awaited.clear()
        assert self._awaited.wait(timeout_s), (
            f"only {self.now} of {count} backends after {timeout_s:g} s"
        )
        return self._seen

    def _run(self) -> None:
        while not self._stop_asked.is_set():
            try:
                self._sample()
            except psycopg2.Error:
                self.now = 0
                self._stop_asked.wait(0.01)  # the server is away

    def _sample(self) -> None:
        connection = psycopg2.connect(
            self._dsn, application_name="fault sampler", connect_timeout=5
        )
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                while not self._stop_asked.wait(self._every_s):
                    cursor.execute(
                        "SELECT count(*) FROM pg_stat_activity WHERE usename = %s", [self._role]
                    )
                    (self.now,) = cursor.fetchone() or (0,)
                    self.peak = max(self.peak, self.now)
                    self.samples += 1
                    if self.now >= self._count and not self._awaited.is_set():
                        self._seen = time.monotonic()
                        self._awaited.set()
        finally:
            connection.close()
