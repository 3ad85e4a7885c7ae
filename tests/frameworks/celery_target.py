"""The Celery application that the tests run.

It imports nothing of the tests: an application as a user's would be.
"""

import json
import os
from pathlib import Path
from typing import Any

import celery
from celery.signals import worker_process_shutdown

import sharedpool
from sharedpool.integrations.celery import connect_signals

app = celery.Celery("celery_target")
app.conf.update(json.loads(os.environ["TARGET_CELERY"]))

threads: dict[str, Any] = (
    {"pool_manager": sharedpool.ThreadedConnectionPool} if "TARGET_THREADS" in os.environ else {}
)
pool = sharedpool.config_pool(max_conn=3, name=os.environ["TARGET_POOL"], timeout=30, **threads)
if "TARGET_SIGNALS" in os.environ:
    connect_signals()
    connect_signals()  # the second time: nothing


@app.task(name="look")
def look(seconds: float) -> tuple[int, int]:
    """Do a query; tell by which process and which backend it was done."""
    with pool.connection() as conn, conn.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s), pg_backend_pid()", [seconds])
        ((_, backend),) = cursor.fetchall()
        return os.getpid(), backend


@worker_process_shutdown.connect  # after the pool's own
def note(pid: int, **_: object) -> None:
    """Leave word of how this process ended."""
    Path(os.environ["TARGET_ENDS"], str(pid)).write_text("disposed" if pool.disposed else "in use")
