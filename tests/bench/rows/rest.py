"""Nothing happens: what it costs to be there."""

import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.bench.contestants import PGBOUNCER, broker
from tests.bench.crew import Member, crew
from tests.bench.peers import MakeClient, Permanent, Shared
from tests.bench.pgbouncer import PgBouncer
from tests.bench.processes import cpu_s, memory, threads
from tests.bench.report import US, Metric, Result, Sample
from tests.bench.runner import Bench, Contestant, Row, opened, say

WORKERS = 100
SLOTS = 20
_SETTLE_S = 1.0
_SHARED_WORKER = "a worker with sharedpool"
_PLAIN_WORKER = "a worker with psycopg2 alone"
_OVERHEAD = "a worker's overhead"
_CPU = Metric("CPU", "%")
_WORKERS_CPU = Metric(f"CPU of all {WORKERS} workers", "%")
_RSS = Metric("RSS", "MB", 1)
_PRIVATE = Metric("private memory", "MB", 1)
_THREADS = Metric("threads", "", 0)
_PYTHON_THREADS = Metric("of these Python's", "", 0)


class Bystander(Member):
    """A process that has had a connection once and wants nothing more."""

    def __init__(self, make: MakeClient) -> None:
        self._client = make()
        conn = self._client.checkout()
        with conn.cursor() as cursor:
            cursor.execute("SELECT 1")
        conn.rollback()
        self._client.checkin(conn)

    def close(self) -> None:
        self._client.close()


def _rest(bench: Bench, result: Result) -> None:
    """All are at rest at the same time: they do not disturb each other."""
    watched: dict[str, tuple[int, list[int]]] = {}
    dsn = bench.server.dsn

    def attach(stack: ExitStack, name: str, pid: int, make: MakeClient) -> None:
        workers = stack.enter_context(crew([partial(Bystander, make)] * WORKERS))
        watched[name] = (pid, workers.pids)

    def ours(stack: ExitStack) -> partial[Sample]:
        process = broker(bench, stack, SLOTS, dsn)
        attach(stack, US, process.pid, Shared(dsn, process.address, SLOTS))
        return partial(Sample, {})

    def bouncer(stack: ExitStack) -> partial[Sample]:
        proxy = stack.enter_context(
            PgBouncer(bench.server, bench.server.routes["unix"], size=SLOTS)
        )
        attach(stack, PGBOUNCER, proxy.pid, Permanent(proxy.dsn))
        return partial(Sample, {})

    seconds = bench.scaled(60, 10)
    with opened([Contestant(US, ours), Contestant(PGBOUNCER, bouncer)], result):
        time.sleep(_SETTLE_S)
        say(f"rest: nothing for {seconds} s")
        before = {
            name: (cpu_s(pid), sum(map(cpu_s, workers))) for name, (pid, workers) in watched.items()
        }
        time.sleep(seconds)
        for name, (pid, workers) in watched.items():
            used, workers_used = (
                cpu_s(pid) - before[name][0],
                sum(map(cpu_s, workers)) - before[name][1],
            )
            of = memory(pid)
            figures = {_CPU: used, _WORKERS_CPU: workers_used}
            figures = {metric: value / seconds * 100 for metric, value in figures.items()}
            result.add(
                name,
                Sample(
                    figures | {_RSS: of.rss_mb, _PRIVATE: of.private_mb, _THREADS: threads(pid)}
                ),
            )
    _overhead(bench, result)
    result.notes.append(
        f"{WORKERS} workers attached, {SLOTS} slots, {seconds} s; overhead is measured on "
        "programs of their own (the"
        " crew's are forked), each with a connection; two of a worker's threads are ZeroMQ's own "
        "and run no Python"
    )


def _overhead(bench: Bench, result: Result) -> None:
    """Compare a program that uses sharedpool with one that uses psycopg2 alone."""
    dsn = bench.server.dsn
    with ExitStack() as stack:
        address = broker(bench, stack, SLOTS, dsn).address
        for _ in range(bench.rounds):
            plain, shared = _program(dsn), _program(dsn, address)
            result.add(_PLAIN_WORKER, Sample(plain))
            result.add(_SHARED_WORKER, Sample(shared))
            result.add(
                _OVERHEAD, Sample({metric: shared[metric] - plain[metric] for metric in shared})
            )


def _program(*arguments: str) -> dict[Metric, float]:
    """Start the program, and return what it takes once it has its connection."""
    script = str(Path(__file__).parents[1] / "attached.py")
    with subprocess.Popen(
        [sys.executable, script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        of = memory(process.pid)
        return {
            _RSS: of.rss_mb,
            _PRIVATE: of.private_mb,
            _THREADS: threads(process.pid),
            _PYTHON_THREADS: int(said),
        }


ROWS = (
    Row(
        "rest",
        f"at rest, {WORKERS} attached workers",
        "broker < 0.5 % CPU, < 45 MB; a worker's overhead < 6 MB and one thread",
        _rest,
    ),
)
