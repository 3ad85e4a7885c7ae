"""Four processes share two connections, with each common library and start method.

    $ python examples/process_pools.py

DATABASE_URL must name the database, such as postgresql://user:password@localhost:5432/app.

Prints for each library how many queries were done, by how many processes, and the most connections
that the server had during a query. Exits with 1 if that was more than the limit. joblib is left out
if it is not installed.
"""

import concurrent.futures
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable

import multiprocess
from process_pools_task import look, pool

PROCESSES, QUERIES = 4, 40

Outcomes = list[tuple[int, int]]


def by_multiprocessing(method: str) -> Outcomes:
    with multiprocessing.get_context(method).Pool(PROCESSES) as workers:
        return workers.map(look, range(QUERIES), chunksize=1)


def by_futures(method: str) -> Outcomes:
    with concurrent.futures.ProcessPoolExecutor(
        PROCESSES, multiprocessing.get_context(method)
    ) as executor:
        return list(executor.map(look, range(QUERIES)))


def by_multiprocess(method: str) -> Outcomes:
    with multiprocess.get_context(method).Pool(PROCESSES) as workers:
        return workers.map(look, range(QUERIES), chunksize=1)


def by_joblib(backend: str) -> Outcomes:
    import joblib

    # loky, joblib's default, copies functions of the main script to its processes, with all that
    # they refer to. A function that uses a pool must be in a module, as `look` is.
    return joblib.Parallel(PROCESSES, backend=backend)(
        joblib.delayed(look)(number) for number in range(QUERIES)
    )


WAYS: list[tuple[str, Callable[[str], Outcomes], tuple[str, ...]]] = [
    ("multiprocessing", by_multiprocessing, ("fork", "spawn")),
    ("concurrent.futures", by_futures, ("fork", "spawn")),
    ("multiprocess", by_multiprocess, ("fork", "spawn")),
    ("joblib", by_joblib, ("multiprocessing", "loky")),
]


def main() -> int:
    peak = 0
    for library, run, methods in WAYS:
        if importlib.util.find_spec(library) is None:
            print(f"{library}: not installed")
            continue
        for method in methods:
            processes, connections = zip(*run(method), strict=True)
            most = max(connections)
            print(
                f"{library}, {method}: {len(processes)} queries by {len(set(processes))} processes,"
                f" at most {most} connections at a time",
                flush=True,
            )
            peak = max(peak, most)
    return 0 if peak <= pool.max_conn else 1


if __name__ == "__main__":  # a spawned process imports this file, too
    sys.exit(main())
