"""A Flask app whose gunicorn workers share three connections, however many there are.

    $ gunicorn -w 4 --chdir examples gunicorn_app:app

DATABASE_URL must name the database, such as postgresql://user:password@localhost:5432/app.

Then http://127.0.0.1:8000/ shows which worker and which PostgreSQL backend served the request, and
how many connections the pool has on the server: never more than three. --preload and threads
(-k gthread --threads 4) work as well. A second gunicorn shares the same three connections, because
all processes find the same broker.

To set the limit on the command line, let `sharedpool run` start a broker that lives as long as
gunicorn:

    $ sharedpool run --max-conn 3 -- gunicorn -w 4 --chdir examples gunicorn_app:app
"""

import os

import flask

import sharedpool

# At import, which with --preload happens before the fork. That is right: configuring a pool
# connects to nothing, and a forked child never uses its parent's connections.
# ThreadedConnectionPool suits every worker class.
sharedpool.config_pool(
    max_conn=3, name="gunicorn example", pool_manager=sharedpool.ThreadedConnectionPool
)

app = flask.Flask(__name__)


@app.get("/")
def index() -> dict[str, int]:
    # The block commits at its end, and returns the connection.
    with (
        sharedpool.get_pool("gunicorn example").connection(timeout=5) as conn,
        conn.cursor() as cursor,
    ):
        cursor.execute(
            "SELECT pg_backend_pid(), count(*) FROM pg_stat_activity"
            " WHERE application_name LIKE %s",
            ["sharedpool gunicorn example [%"],
        )
        backend, connections = cursor.fetchone()
    return {"worker": os.getpid(), "backend": backend, "connections": connections}


@app.errorhandler(sharedpool.PoolTimeout)
def busy(error: sharedpool.PoolTimeout) -> flask.typing.ResponseReturnValue:
    # No connection became free in five seconds. An error is better than a pile of requests.
    app.logger.warning("%s", error)
    return "All connections are busy. Try again soon.\n", 503, {"Retry-After": "1"}
