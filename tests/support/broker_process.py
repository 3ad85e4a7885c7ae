"""A `sharedpool broker --metrics` process, and its metrics."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.support.waiting import wait_until

POOL = "db_client_connection_pool_name"
STATE = "db_client_connection_state"


class Broker:
    """The process; `port` is its HTTP server's."""

    def __init__(self, directory: Path, dsn: str) -> None:
        self.address = f"ipc://{directory}/broker.sock"
        self.log = log = directory / "broker.log"
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "sharedpool", "broker", "--max-conn", "20"),
                    *("--bind", self.address, "--dsn", dsn, "--ttl", "1.5"),
                    *("--metrics", "127.0.0.1:0"),
                ],
                stderr=output,
            )
        try:
            found = wait_until(
                lambda: re.search(r"metrics at http://127\.0\.0\.1:(\d+)/metrics", log.read_text()),
                timeout_s=30,
            )
        except AssertionError:
            self.process.kill()
            self.process.wait()
            raise
        self.port = int(found[1])

    def fetch(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    def families(self) -> dict[str, Metric]:
        return {
            family.name: family for family in text_string_to_metric_families(self.fetch("/metrics"))
        }

    def value(self, sample: str, pool: str, **labels: str) -> float:
        """Return a sample's value; 0 for a pool that the broker does not know yet."""
        wanted = {POOL: pool, **labels}
        for family in self.families().values():
            for each in family.samples:
                if each.name == sample and each.labels == wanted:
                    return float(each.value)
        return 0.0


@contextmanager
def running(dsn: str, directory: Path) -> Iterator[Broker]:
    served = Broker(directory, dsn)
    try:
        yield served
    finally:
        served.process.terminate()
        try:
            served.process.wait(20)
        except subprocess.TimeoutExpired:
            served.process.kill()
            served.process.wait()
            raise
