"""A Flask app whose gunicorn workers share three connections, however many workers there are.

    $ gunicorn -w 4 --chdir examples gunicorn_app:app

DATABASE_URL says where PostgreSQL is: export
DATABASE_URL=postgresql://user:password@localhost:5432/app

Then http://127.0.0.1:8000/ shows which worker and which PostgreSQL connection served the request,
and how many connections the pool has on the server at that moment: never more than three. It is the
same with --preload, with threads (-k gthread --threads 4), and with a second gunicorn beside it:
the broker is found by all of them.

To have the limit on the command line, where a deployment has it, let the broker live and end with
gunicorn:

    $ sharedpool run --max-conn 3 -- gunicorn -w 4 --chdir examples gunicorn_app:app
"""

import os

import flask

import sharedpool

# At import, and that is right with --preload too, where the import happens before the fork: to
# configure connects to nothing, and what a process has connected a forked child never uses.
# ThreadedConnectionPool serves every worker class.
sharedpool.config_pool(
    max_conn=3, name="gunicorn example", pool_manager=sharedpool.ThreadedConnectionPool
)

app = flask.Flask(__name__)


@app.get("/")
def index() -> dict[str, int]:
    # The connection is this request's alone until the block ends; then the transaction is
    # committed.
    with (
        sharedpool.get_pool("gunicorn example").connection(timeout=5) as conn,
        conn.cursor() as cursor,
    ):
        cursor.execute(
            "SELECT pg_backend_pid(), count(*) FROM pg_stat_activity WHERE application_name LIKE %s",
            ["sharedpool gunicorn example [%"],
        )
        backend, connections = cursor.fetchone()
    return {"worker": os.getpid(), "backend": backend, "connections": connections}


@app.errorhandler(sharedpool.PoolTimeout)
def busy(error: sharedpool.PoolTimeout) -> flask.typing.ResponseReturnValue:
    # Five seconds without a free connection: better to say so than to let requests pile up.
    app.logger.warning("%s", error)
    return "All connections are busy. Try again soon.\n", 503, {"Retry-After": "1"}
