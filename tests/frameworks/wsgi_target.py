"""The WSGI application that the tests serve.

It imports nothing of the tests: an application as a user's would be.

/       do a query and tell by whom it was done /stuck  hold a connection in a query that does not
end
"""

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import sharedpool

simple: dict[str, Any] = (
    {} if "TARGET_SIMPLE" in os.environ else {"pool_manager": sharedpool.ThreadedConnectionPool}
)
pool = sharedpool.config_pool(max_conn=3, name=os.environ["TARGET_POOL"], timeout=30, **simple)

if "TARGET_AT_IMPORT" in os.environ:  # in the master, if that loads the application
    with pool.connection() as conn, conn.cursor() as cursor:
        cursor.execute("SELECT 1")


def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    seconds = 600 if environ["PATH_INFO"] == "/stuck" else 0.002
    with pool.connection() as conn, conn.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s), pg_backend_pid()", [seconds])
        ((_, backend),) = cursor.fetchall()
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps({"worker": os.getpid(), "backend": backend, "uid": os.getuid()}).encode()]
