"""Find, ask and end the automatic broker, whose address no test knows."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sharedpool
from sharedpool.cli.client import fetch_report
from sharedpool.discovery.address import lock_path, runtime_dir
from sharedpool.discovery.lock_file import is_held
from sharedpool.wire.reports import Report
from tests.support.processes import alive
from tests.support.waiting import wait_until


def living(folder: Path | None = None) -> list[str]:
    """Return the addresses of the brokers in a directory; by default in this environment's."""
    found = [f"ipc://{path}" for path in sorted((folder or runtime_dir()).glob("*.sock"))]
    return [address for address in found if is_held(lock_path(address))]


def reports(folder: Path | None = None) -> list[Report]:
    """Return the reports of those brokers; one that is just ending may be missing."""
    found = []
    for address in living(folder):
        try:
            found.append(fetch_report(address))
        except sharedpool.BrokerUnavailable:
            assert address not in living(folder), "a broker holds its lock and does not answer"
    return found


def leases(name: str) -> int:
    """Return the number of a pool's leases, over all brokers."""
    return sum(pool.leases for report in reports() for pool in report.pools if pool.name == name)


def command(report: Report) -> list[str]:
    """Return the command line of a broker."""
    return Path(f"/proc/{report.pid}/cmdline").read_text().rstrip("\0").split("\0")


@contextmanager
def seen_off(folder: Path | None = None) -> Iterator[None]:
    """After the block, wait for the end of all sessions and end the brokers, which would stay 30
    seconds."""
    yield
    wait_until(
        lambda: not any(report.sessions for report in reports(folder)),
        30,
        "the end of all sessions",
    )
    ends = {report.pid for report in reports(folder)}
    for pid in ends:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not any(map(alive, ends)), 30, "the brokers' end")
    assert living(folder) == []
