"""What /proc says of a process, and what the kernel does for one. Linux."""

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")
_MB = 1024.0
_PR_SET_PDEATHSIG = 1
_END_S = 5.0


def die_with_parent() -> None:
    """Have this process killed when its parent ends, however that ends.

    To be called after a change of the account.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a process, by SIGKILL if it takes too long."""
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Memory(NamedTuple):
    """A process's memory in MB: all that is mapped in, its share of it, and what is its alone."""

    rss_mb: float
    pss_mb: float
    private_mb: float


def cpu_s(pid: int) -> float:
    """Return the processor time that a process's threads have used, in seconds.

    From the scheduler, to the microsecond; where it tells nothing, from `stat`, by steps of 1/100 s
    on most machines.
    """
    try:
        files = list(Path(f"/proc/{pid}/task").glob("*/schedstat"))
        if files:
            return sum(int(file.read_text().split()[0]) for file in files) / 1e9
    except (OSError, ValueError):
        pass  # a thread has ended meanwhile, or the kernel keeps no such books
    # The name in parentheses may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def memory(pid: int) -> Memory:
    """Return a process's memory."""
    kb: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        kb[name] = int(rest.split()[0])
    return Memory(
        kb["Rss"] / _MB, kb["Pss"] / _MB, (kb["Private_Clean"] + kb["Private_Dirty"]) / _MB
    )


@contextlib.contextmanager
def on_one_cpu(*pids: int) -> Iterator[int]:
    """Keep this process, `pids` and all that any of them starts meanwhile on one processor; return
    which."""
    found = {pid: os.sched_getaffinity(pid) for pid in (0, *pids)}
    cpu = max(found[0])
    try:
        for pid in found:
            os.sched_setaffinity(pid, {cpu})
        yield cpu
    finally:
        for pid, cpus in found.items():
            os.sched_setaffinity(pid, cpus)


def threads(pid: int) -> int:
    """Return how many threads a process has."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))
