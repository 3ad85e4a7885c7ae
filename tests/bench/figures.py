"""The figures of this project, measured: `python tests/bench/figures.py [hit] [recall] [storm]`.

hit     checkout and return on a cache hit, beside psycopg2.pool in the same run: medians and their ratio
recall  one process lies idle on all connections, another asks: p50 and p99
storm   40 unrelated processes x 4 threads on 6 connections: the peak that the server saw, and every error

It starts its own PostgreSQL and asserts nothing.
"""

import contextlib
import json
import os
import statistics
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path

import psycopg2.pool

import sharedpool
from sharedpool.broker.lock import is_held
from sharedpool.cli.postgres import EphemeralPostgres

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from processes import Sampler, Worker, workers
from waiting import wait_until


def hit(server: EphemeralPostgres, rounds: int = 15, calls: int = 20_000) -> None:
    """Compare checkout+return on a hit; the two take turns."""
    contestants: dict[str, Callable[[], object]] = {}
    with contextlib.ExitStack() as stack:
        for kind in (sharedpool.ThreadedConnectionPool, sharedpool.SimpleConnectionPool):
            pool = sharedpool.config_pool(dsn=server.dsn, pool_manager=kind, name=kind.__name__)
            stack.callback(pool.release_all)
            contestants[f"sharedpool {kind.__name__}"] = lambda pool=pool: pool.put_conn(pool.get_conn())
        for peer in (psycopg2.pool.ThreadedConnectionPool, psycopg2.pool.SimpleConnectionPool):
            other = peer(1, 5, server.dsn)
            stack.callback(other.closeall)
            contestants[f"psycopg2.pool {peer.__name__}"] = lambda pool=other: pool.putconn(pool.getconn())
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, call in contestants.items():
                times[name].append(timeit.timeit(call, number=calls) / calls * 1e6)
        base = statistics.median(times["psycopg2.pool ThreadedConnectionPool"])
        for name, each in times.items():
            median = statistics.median(each)
            print(f"hit     {name:40} {median:6.2f} us ({min(each):.2f}-{max(each):.2f})  {median / base:5.2f} x")


def recall(server: EphemeralPostgres, tries: int = 500, limit: int = 5) -> None:
    """Time a checkout whose slot must first be recalled from a process that lies idle on all of them."""
    settings = {"dsn": server.dsn, "max_conn": limit}
    waits = []
    with Worker(**settings) as one, Worker(**settings) as two:
        holder, asker = one, two
        for turn in range(tries):
            if turn % limit == 0:  # all slots lie idle in one process; the other has none
                holder, asker = asker, holder
                for number in range(limit):
                    holder.ask("get", name=str(number), timeout=10)
                for number in range(limit):
                    holder.ask("put", name=str(number))
            waits.append(asker.ask("get", name=f"x{turn}", timeout=10)["waited"] * 1000)
            if turn % limit == limit - 1:
                for number in range(turn - limit + 1, turn + 1):
                    asker.ask("put", name=f"x{number}")
    cuts = statistics.quantiles(waits, n=100)
    print(f"recall  {tries} tries: p50 {cuts[49]:.2f} ms, p99 {cuts[98]:.2f} ms, max {max(waits):.2f} ms")


def storm(
    server: EphemeralPostgres, processes: int = 40, threads: int = 4, limit: int = 6, seconds: float = 30
) -> None:
    """Let many processes fight for few connections."""
    with (
        workers(processes, dsn=server.dsn, max_conn=limit, threads=True) as crew,
        Sampler(server.dsn, "sharedpool default [%") as sampler,
    ):
        for worker in crew:
            worker.send("hammer", seconds=seconds, threads=threads, timeout=60)
        outcomes = [worker.answer(seconds + 120) for worker in crew]
    done = [outcome["done"] for outcome in outcomes]
    errors = [error for outcome in outcomes for error in outcome["errors"]]
    print(
        f"storm   {processes} processes x {threads} threads, max_conn {limit}, {seconds:g} s:"
        f" server peak {sampler.peak} in {sampler.samples} samples, {sum(done)} transactions"
        f" (least {min(done)}, most {max(done)} a process), {len(errors)} errors"
    )
    for error in sorted(set(errors)):
        print(f"        {errors.count(error)} x {error}")


def main() -> None:
    chosen = sys.argv[1:] or ["hit", "recall", "storm"]
    with tempfile.TemporaryDirectory(prefix="spb-", dir="/tmp") as runtime, EphemeralPostgres() as server:
        os.environ.update(XDG_RUNTIME_DIR=runtime, SHAREDPOOL_LINGER="1")
        print(json.dumps({"python": sys.version.split()[0], "cpus": os.cpu_count(), "postgres": str(server.bin_dir)}))
        for name in chosen:
            {"hit": hit, "recall": recall, "storm": storm}[name](server)
        locks = list(Path(runtime, "sharedpool").glob("*.lock"))
        wait_until(lambda: not any(map(is_held, locks)), what="the automatic brokers to leave")


if __name__ == "__main__":
    main()
