"""A Flask app with one connection per request, returned however the request ends.

    $ flask --app examples/flask_app.py init-db
    $ flask --app examples/flask_app.py run
    $ flask --app examples/flask_app.py drop-db

DATABASE_URL must name the database, such as postgresql://user:password@localhost:5432/app.

The first command creates a table, `sharedpool_visits`, and the last one drops it. In between,
http://127.0.0.1:5000/ counts its visits there and shows which PostgreSQL backend did that.
http://127.0.0.1:5000/fail counts a visit and then fails, so the visit is rolled back. The teardown
returns the connection, not the view. Serve the app with as many processes as you like, by gunicorn
or anything else: they share three connections.
"""

import flask
import psycopg2.extensions

import sharedpool

# Flask's own server runs each request in its own thread, so the pool must be the one for threads.
pool = sharedpool.config_pool(
    max_conn=3, name="flask example", timeout=5, pool_manager=sharedpool.ThreadedConnectionPool
)

app = flask.Flask(__name__)


def database() -> psycopg2.extensions.connection:
    """Return this request's connection. The first call checks it out."""
    if "connection" not in flask.g:
        flask.g.connection = pool.get_conn()
    return flask.g.connection


@app.after_request
def commit(response: flask.Response) -> flask.Response:
    # Commit before the client gets the answer: a failed commit must not look like a success.
    if "connection" in flask.g and response.status_code < 400:
        flask.g.connection.commit()
    return response


@app.teardown_appcontext
def give_back(error: BaseException | None) -> None:
    """Return the connection. The pool rolls back what is not committed."""
    if (connection := flask.g.pop("connection", None)) is not None:
        if error is not None:
            pool.notice(connection, error)  # if the server fails over, the other processes know
        pool.put_conn(connection)


@app.get("/")
def index() -> dict[str, int]:
    with database().cursor() as cursor:
        cursor.execute("INSERT INTO sharedpool_visits DEFAULT VALUES")
        cursor.execute("SELECT count(*), pg_backend_pid() FROM sharedpool_visits")
        visits, backend = cursor.fetchone()
    return {"visits": visits, "backend": backend}


@app.get("/fail")
def fail() -> dict[str, int]:
    index()
    raise RuntimeError("the visit that was just counted does not count")


@app.errorhandler(sharedpool.PoolTimeout)
def busy(error: sharedpool.PoolTimeout) -> flask.typing.ResponseReturnValue:
    app.logger.warning("%s", error)
    return "All connections are busy. Try again soon.\n", 503, {"Retry-After": "1"}


@app.cli.command("init-db")
def init_db() -> None:
    with pool.connection() as connection, connection.cursor() as cursor:
        cursor.execute(
            "CREATE TABLE IF NOT EXISTS sharedpool_visits (at timestamptz DEFAULT now())"
        )


@app.cli.command("drop-db")
def drop_db() -> None:
    with pool.connection() as connection, connection.cursor() as cursor:
        cursor.execute("DROP TABLE IF EXISTS sharedpool_visits")
