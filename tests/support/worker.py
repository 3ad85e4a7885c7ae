"""A worker process: `python worker.py SETTINGS` reads a JSON command a line and answers each.

The program imports nothing from the tests, like the unrelated process of a user.
"""

import hashlib
import json
import math
import os
import random
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psycopg2

import sharedpool

settings = json.loads(sys.argv[1])
if files := settings.pop("files", 0):  # so that every later descriptor has a higher number
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (files + 1000, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    while os.open(os.devnull, os.O_RDONLY) < files:
        pass
if settings.pop("threads", False):
    settings["pool_manager"] = sharedpool.ThreadedConnectionPool
if secret := settings.pop("password_file", ""):
    settings["password"] = Path(secret).read_text
pool = sharedpool.config_pool(**settings)
held: dict[str, Any] = {}
aside: dict[str, Any] = {}

# Marks the session: a session that was not reset still shows its last user's mark.
_MARK = (
    "SELECT pg_backend_pid(), current_setting('sharedpool.user', true), "
    "set_config('sharedpool.user', %s, false),"
    " pg_sleep(%s)"
)


def get(name: str, timeout: float = 0.0) -> dict[str, Any]:
    started = time.monotonic()
    conn = held[name] = pool.get_conn(timeout=timeout)
    waited = time.monotonic() - started
    return {"backend": conn.info.backend_pid, "at": time.monotonic(), "waited": waited}


def put(name: str, close: bool = False) -> dict[str, Any]:
    pool.put_conn(held.pop(name), close=close)
    return {"at": time.monotonic()}


def query(name: str, sql: str) -> dict[str, Any]:
    with held[name].cursor() as cursor:
        cursor.execute(sql)
        return {"rows": cursor.fetchall() if cursor.description else None}


def cycle(count: int) -> dict[str, Any]:
    """Check out and in, one after the other."""
    for _ in range(count):
        pool.put_conn(pool.get_conn(timeout=30))
    return {}


def stats() -> dict[str, Any]:
    s = pool.stats()
    found = {"idle": s.idle, "in_use": s.in_use, "max_conn": pool.max_conn, "connects": s.connects}
    return found | {
        "adopted": s.adopted,
        "moving": bool(pool._local.cache.moving_flag[0]),
        "in_lane": pool._local.membership.wait_sockets is not None,
    }


def hammer(
    seconds: float,
    threads: int,
    timeout: float,
    work_s: float = 0.002,
    think_s: float | None = None,
    stop: str = "",
) -> dict[str, Any]:
    """Use the pool from `threads` threads, until the file `stop` exists; return what happened.

    `wrong` counts checkouts of a session that another process has marked, or that is not the
    connection's own; `longest` is the longest wait; `least` the checkouts of the unluckiest thread.
    """
    outcome: dict[str, Any] = {
        "done": 0,
        "errors": [],
        "wrong": 0,
        "longest": 0.0,
        "least": math.inf,
    }
    until = time.monotonic() + seconds
    lock = threading.Lock()
    me = str(os.getpid())

    def run() -> None:
        done = wrong = 0
        longest = 0.0
        try:
            while (began := time.monotonic()) < until and not (stop and os.path.exists(stop)):
                with pool.connection(timeout=timeout) as conn, conn.cursor() as cursor:
                    longest = max(longest, time.monotonic() - began)
                    cursor.execute(_MARK, [me, random.uniform(0, work_s)])
                    ((pid, before, _, _),) = cursor.fetchall()
                    wrong += pid != conn.info.backend_pid or before not in (None, "", me)
                done += 1
                time.sleep(
                    random.uniform(0, work_s if think_s is None else think_s)
                )  # no synchronisation
        except Exception as error:
            with lock:
                outcome["errors"].append(f"{type(error).__name__}: {error}")
        with lock:
            outcome["done"] += done
            outcome["wrong"] += wrong
            outcome["longest"] = max(longest, outcome["longest"])
            outcome["least"] = min(done, outcome["least"])

    crew = [threading.Thread(target=run) for _ in range(threads)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    return outcome


def insist(seconds: float, timeout: float, stop: str = "", least: int = 0) -> dict[str, Any]:
    """Check out and in, whatever is raised, until the file `stop` exists, and at least `least`
    times.

    Return how often each outcome came, the errors' texts, and the longest duration.
    """
    outcomes: dict[str, int] = {}
    texts: dict[str, str] = {}
    longest, until = 0.0, time.monotonic() + seconds
    while sum(outcomes.values()) < least or (
        time.monotonic() < until and not (stop and os.path.exists(stop))
    ):
        began = time.monotonic()
        try:
            pool.put_conn(pool.get_conn(timeout=timeout))
            kind = "done"
        except psycopg2.Error as error:
            kind = type(error).__name__
            texts.setdefault(kind, str(error))
        outcomes[kind] = outcomes.get(kind, 0) + 1
        longest = max(longest, time.monotonic() - began)
        time.sleep(0.005)  # other work
    return {"outcomes": outcomes, "texts": texts, "longest": longest}


def write_rows(worker: int, count: int) -> dict[str, Any]:
    """Write rows that name their writer, each in a checkout of its own; read each row back in the
    next."""
    wrong, before = 0, ""
    for n in range(count):
        body = hashlib.sha256(f"{worker} {n}".encode()).hexdigest() * 4
        with pool.connection(timeout=60) as conn, conn.cursor() as cursor:
            if n:
                cursor.execute(
                    "SELECT body FROM moves WHERE worker = %s AND n = %s", (worker, n - 1)
                )
                wrong += cursor.fetchone() != (before,)
            cursor.execute(
                "INSERT INTO moves VALUES (%s, %s, %s) RETURNING body, pg_backend_pid()",
                (worker, n, body),
            )
            wrong += cursor.fetchone() != (body, conn.info.backend_pid)
        before = body
    return {"wrong": wrong}


def fork(name: str | None = None) -> dict[str, Any]:
    """Fork; the child uses the pool and the inherited connection, and exits as
    Python programs do."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        report: dict[str, Any] = {}
        try:
            if name is not None:
                inherited = held.pop(name)
                try:
                    inherited.cursor().execute("SELECT 1")
                    report["inherited"] = "used"
                except psycopg2.Error as error:
                    report["inherited"] = type(error).__name__
                try:
                    pool.put_conn(inherited)
                except sharedpool.PoolError as error:
                    report["put"] = str(error)
                inherited.close()
            conn = pool.get_conn(timeout=10)
            report["backend"] = conn.info.backend_pid
            pool.put_conn(conn)
        except BaseException as error:
            report["error"] = f"{type(error).__name__}: {error}"
        os.write(write_end, json.dumps(report).encode())
        sys.exit(0)  # runs atexit, as a child that returns from its work would
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        report = json.loads(pipe.read())
    os.waitpid(child, 0)
    return report


def wait_aside(timeout: float) -> dict[str, Any]:
    """Have another thread wait for a connection."""

    def wait() -> None:
        try:
            pool.get_conn(timeout=timeout)
        except psycopg2.Error as error:
            aside.update(error=type(error).__name__, at=time.monotonic())

    aside["thread"] = threading.Thread(target=wait)
    aside["thread"].start()
    return {}


def dispose() -> dict[str, Any]:
    """Dispose of the pool; return what the waiting thread was told, and how much later."""
    began = time.monotonic()
    pool.release_all()
    aside["thread"].join()
    return {"error": aside.get("error"), "after": aside.get("at", began) - began}


def leave() -> dict[str, Any]:
    raise SystemExit(0)


functions = (
    get,
    put,
    query,
    cycle,
    stats,
    hammer,
    insist,
    write_rows,
    wait_aside,
    dispose,
    fork,
    leave,
)
commands = {function.__name__: function for function in functions}
print("ready", flush=True)
for line in sys.stdin:
    command = json.loads(line)
    try:
        answer = commands[command.pop("do")](**command)
    except Exception as error:
        answer = {"error": type(error).__name__, "text": str(error)}
    print(json.dumps(answer), flush=True)
