"""A program that an agent traces: `python program.py SETTINGS` obeys one JSON command a line, and
answers each."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from recorders import RECORDERS, Recorder, Span

settings = json.loads(sys.argv[1])
recorder: Recorder | None = None


def activate() -> list[Span]:
    global recorder
    recorder = RECORDERS[settings["agent"]]()
    return []


if settings["activate"] == "first":
    activate()

import psycopg2.pool  # noqa: E402
from psycopg2 import extras, sql  # noqa: E402

import sharedpool  # noqa: E402


def make_pool() -> Any:
    if settings["pool"] == "psycopg2":
        return psycopg2.pool.ThreadedConnectionPool(
            1, 3, *settings["arguments"], **settings["keywords"]
        )
    dsn = dict(zip(["dsn"], settings["arguments"], strict=False))
    keywords = {**dsn, **settings["keywords"], **settings["options"]}
    return sharedpool.config_pool(
        pool_manager=sharedpool.ThreadedConnectionPool, timeout=20, **keywords
    )


def use(conn: Any) -> None:
    with conn, conn.cursor() as cursor:
        cursor.execute("CREATE TEMP TABLE IF NOT EXISTS books (id int, name text)")
        cursor.executemany("INSERT INTO books VALUES (%s, %s)", [(1, "a"), (2, "b")])
        cursor.callproc("abs", [-3])
        cursor.execute(sql.SQL("SELECT {} FROM books").format(sql.Identifier("name")))
        assert cursor.fetchall()
    with conn.cursor(name="served") as cursor:
        cursor.execute("SELECT id FROM books")
        assert cursor.fetchall()
    conn.rollback()
    extras.register_uuid(conn_or_curs=conn)
    with conn.cursor() as cursor:
        try:
            cursor.execute("SELECT nothing")
        except psycopg2.Error:
            conn.rollback()
        cursor.execute("SELECT 1")


def three_checkouts() -> None:
    for _ in range(3):
        conn = pool.getconn()
        use(conn)
        pool.putconn(conn)  # rolls back


def many_checkouts() -> None:
    """All at once, then none is left idle but one."""
    conns = [pool.getconn() for _ in range(2)]
    for conn in conns:
        use(conn)
        conn.commit()
    for conn in conns:
        pool.putconn(conn)


def alchemy() -> None:
    """SQLAlchemy on top of psycopg2.pool is what it has of its own: QueuePool."""
    import sqlalchemy

    from sharedpool.integrations.sqlalchemy import SharedPool

    url = "postgresql+psycopg2://"
    if settings["pool"] == "psycopg2":
        engine = sqlalchemy.create_engine(url, connect_args=settings["keywords"])
    else:
        engine = sqlalchemy.create_engine(url, creator=make_pool().connect, poolclass=SharedPool)
    for _ in range(2):
        with engine.begin() as connection:
            assert connection.execute(sqlalchemy.text("SELECT 1")).scalar() == 1


def django() -> None:
    from django.db import connection, transaction

    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SELECT %s", [1])
        assert cursor.fetchone() == (1,)
    connection.close()


def configure_django() -> None:
    import django
    from django.conf import settings as django_settings

    names = {"host": "HOST", "port": "PORT", "user": "USER", "dbname": "NAME"}
    database = {names[name]: value for name, value in settings["keywords"].items()}
    if settings["pool"] == "psycopg2":
        database["ENGINE"] = "django.db.backends.postgresql"
    else:
        database |= {"ENGINE": "sharedpool.integrations.django", "OPTIONS": settings["options"]}
    django_settings.configure(DATABASES={"default": database})
    django.setup()


def record(what: str) -> list[Span]:
    run: Callable[[], None] = {
        "three": three_checkouts, "many": many_checkouts, "sqlalchemy": alchemy, "django": django
    }[what]  # fmt: skip
    if recorder is None:
        run()
        return []
    return recorder.record(run)


def open_pool() -> list[Span]:
    global pool
    pool = make_pool()
    return []


def start() -> list[Span]:
    """Make the pool, and use it once."""

    def begin() -> None:
        open_pool()
        three_checkouts()

    if recorder is None:
        begin()
        return []
    return recorder.record(begin)


def fork() -> list[Span]:
    """Do what `start` does, in a child."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            os.write(writer, json.dumps(start(), default=str).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        text = file.read()
    os.waitpid(child, 0)
    spans: list[Span] = json.loads(text)
    return spans


def stats() -> list[Span]:
    return [
        {
            "adopted": pool.stats().adopted,
            "connects": pool.stats().connects,
            "hits": pool.stats().hits,
        }
    ]


pool: Any = None
print("ready", flush=True)
for line in sys.stdin:
    command = json.loads(line)
    function: Any = {
        "activate": activate,
        "configure_django": configure_django,
        "fork": fork,
        "open": open_pool,
        "record": record,
        "start": start,
        "stats": stats,
    }[command.pop("do")]
    print(json.dumps(function(**command) or [], default=str), flush=True)
os._exit(0)  # whatever an agent's threads are at
