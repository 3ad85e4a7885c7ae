"""An app for gunicorn's gevent worker: SETTINGS (environment) are the pool's.

A page can keep a connection busy.
"""

import json
import os

import flask
from gevent import event

import sharedpool

pool = sharedpool.config_pool(
    pool_manager=sharedpool.ThreadedConnectionPool, **json.loads(os.environ["SETTINGS"])
)
app = flask.Flask(__name__)
let_go = event.Event()


@app.get("/hold")
def hold() -> dict[str, int]:
    """Keep a connection until /release is asked for."""
    with pool.connection(timeout=20) as conn:
        let_go.wait(30)
        return {"worker": os.getpid(), "backend": conn.info.backend_pid}


@app.get("/release")
def release() -> dict[str, int]:
    let_go.set()
    return {}


@app.get("/state")
def state() -> dict[str, int]:
    return {"in_use": pool.stats().in_use, "waiting": pool.stats().waiting}


@app.get("/sleep")
def sleep() -> dict[str, int]:
    with pool.connection(timeout=20) as conn, conn.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(0.01), pg_backend_pid()")
        ((_, backend),) = cursor.fetchall()
        return {"worker": os.getpid(), "backend": backend}
