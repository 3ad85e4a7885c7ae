"""PgSimple on a real server: every method, pg_simple's own examples, hostile names, who gets the
connection."""

import datetime
import gc
import io
import itertools
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import psycopg2
import pytest
from psycopg2 import sql
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, TRANSACTION_STATUS_INTRANS, make_dsn

import sharedpool
from sharedpool import PgSimple, Pool, PoolClosed, PoolError, PoolExhausted
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.fixture_types import MakePool
from tests.support.waiting import wait_until

TTL_S = 1.5  # heartbeats twice a second
HOSTILE = ['we"ird; drop', "50%s", "Ünïcode 数", "select", "it's", "a%(b)s"]


@pytest.fixture(scope="module")
def module_dsn(postgres: EphemeralPostgres) -> Iterator[str]:
    """A database for all tests here: creating one for each takes longer than the tests."""
    admin = psycopg2.connect(postgres.dsn)
    admin.autocommit = True
    with admin.cursor() as cursor:
        cursor.execute("CREATE DATABASE pgsimple")
        yield make_dsn(postgres.dsn, dbname="pgsimple")
        cursor.execute("DROP DATABASE pgsimple WITH (FORCE)")
    admin.close()


@pytest.fixture(scope="module")
def broker(postgres: EphemeralPostgres) -> Iterator[sharedpool.Broker]:
    """A broker for all tests here: every test has a pool of its own name."""
    with (
        tempfile.TemporaryDirectory(
            prefix="spr-", dir="/tmp"
        ) as folder,  # short enough for a unix socket
        sharedpool.start_broker(
            max_conn=8, address=f"ipc://{folder}/broker", dsn=postgres.dsn, ttl=TTL_S
        ) as broker,
    ):
        yield broker


_numbers = itertools.count(1)


@pytest.fixture
def make_pool(module_dsn: str, broker: sharedpool.Broker) -> Iterator[MakePool]:
    """Make pools, disposed of after the test; then the database is emptied."""
    pools: list[Pool] = []

    def make(max_conn: int = 2, **options: Any) -> Pool:
        options = {
            "dsn": module_dsn,
            "broker": broker.address,
            "name": f"test {next(_numbers)}",
            **options,
        }
        pools.append(sharedpool.config_pool(max_conn, **options))
        return pools[-1]

    yield make
    for pool in pools:
        if not pool.disposed:
            pool.release_all()
    cleaner = psycopg2.connect(module_dsn)
    with cleaner, cleaner.cursor() as cursor:
        cursor.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    cleaner.close()


@pytest.fixture
def pool(make_pool: MakePool) -> Pool:
    return make_pool()


@pytest.fixture
def db(pool: Pool) -> Iterator[PgSimple]:
    handle = PgSimple(pool)
    yield handle
    handle.close()


@pytest.fixture
def books(db: PgSimple) -> PgSimple:
    """The table of pg_simple's README with nine books, one for each year from 2001 on."""
    db.drop("books")
    db.create(
        "books",
        """
        "id" SERIAL NOT NULL,
        "genre" VARCHAR(20) NOT NULL,
        "name" VARCHAR(40) NOT NULL,
        "price" MONEY NOT NULL,
        "published" DATE NOT NULL,
        "modified" TIMESTAMP(6) NOT NULL DEFAULT now()
        """,
    )
    db.execute('ALTER TABLE "books" ADD CONSTRAINT "books_pkey" PRIMARY KEY ("id")')
    for i in range(1, 10):
        row = {
            "genre": "fiction",
            "name": f"Book Name vol. {i}",
            "price": 1.23 * i,
            "published": f"{2000 + i}-{i}-1",
        }
        assert db.insert("books", row) == 1
    db.commit()
    return db


def names(rows: list[Any]) -> list[str]:
    return [row.name for row in rows]


# --- pg_simple's own examples


def test_fetchone_with_two_fields(books: PgSimple) -> None:
    book = books.fetchone(
        "books", fields=["name", "published"], where=("published = %s", [datetime.date(2002, 2, 1)])
    )
    assert book.name == book[0] == "Book Name vol. 2"
    assert book.published == datetime.date(2002, 2, 1)
    assert books.fetchone("books", where=("id = %s", [-1])) is None


def test_fetchall_with_aliases_order_limit_and_offset(books: PgSimple) -> None:
    rows = books.fetchall(
        "books",
        fields=["name AS n", "genre AS g"],
        where=(
            "published BETWEEN %s AND %s",
            [datetime.date(2005, 2, 1), datetime.date(2009, 2, 1)],
        ),
        order=["published", "DESC"],
        limit=5,
        offset=2,
    )
    assert [row.n for row in rows] == ["Book Name vol. 6", "Book Name vol. 5"]
    assert rows[0].g == rows[0][1] == "fiction"


def test_update_and_delete_count_rows(books: PgSimple) -> None:
    changed = books.update(
        "books",
        data={
            "name": "An expensive book",
            "price": 998.997,
            "genre": "non-fiction",
            "modified": "NOW()",
        },
        where=("published = %s", [datetime.date(2001, 1, 1)]),
    )
    assert changed == 1
    assert (
        books.fetchone("books", "genre", ("price = %s::money", ["$999.00"])).genre == "non-fiction"
    )
    assert books.delete("books", where=("published >= %s", [datetime.date(2005, 1, 31)])) == 5
    assert len(books.fetchall("books")) == 4


def test_returning_gives_rows(books: PgSimple) -> None:
    row = books.insert(
        "books",
        {"genre": "fiction", "name": "Book with ID", "price": 123.45, "published": "1997-01-31"},
        returning="id",
    )
    assert row.id == 10
    rows = books.update(
        "books",
        data={"name": "Another expensive book", "price": 500.50, "modified": "NOW()"},
        where=("published = %s", [datetime.date(2006, 6, 1)]),
        returning="modified",
    )
    assert isinstance(rows[0].modified, datetime.datetime)
    rows = books.delete(
        "books", where=("published >= %s", [datetime.date(2005, 1, 31)]), returning="name"
    )
    assert len(rows) == 5
    assert "Another expensive book" in names(rows)
    assert books.delete("books", where="id < 0", returning="*") == []


def test_execute_returns_the_cursor(books: PgSimple) -> None:
    found = books.execute(
        "SELECT tablename FROM pg_tables WHERE schemaname=%s and tablename=%s", ["public", "books"]
    ).fetchall()
    assert [tuple(row) for row in found] == [("books",)]
    assert books.execute("SELECT 1 % 2 AS plain").fetchone() == (1,)
    assert books.execute(sql.SQL("SELECT {}").format(sql.Literal("x"))).fetchone() == ("x",)


def test_an_earlier_result_stays_readable(books: PgSimple) -> None:
    cursor = books.execute("SELECT id FROM books ORDER BY id")
    for (number,) in cursor:
        books.update("books", {"name": f"no {number}"}, ("id = %s", (number,)))
    assert names(books.fetchall("books", "name", order="id", limit=2)) == ["no 1", "no 2"]


def test_truncate_one_and_several(db: PgSimple) -> None:
    db.create("tbl1", "id serial PRIMARY KEY")
    db.create("tbl2", "id serial, ref int REFERENCES tbl1")
    db.create("tbl3", "id serial")
    for table in ("tbl1", "tbl3"):
        db.insert(table, {})
    db.truncate("tbl3")
    assert db.fetchall("tbl3") == []
    assert db.insert("tbl3", {}, returning="id").id == 2
    db.commit()
    with pytest.raises(psycopg2.errors.FeatureNotSupported):
        db.truncate("tbl1")
    db.rollback()
    db.truncate("tbl1, tbl3", restart_identity=True, cascade=True)
    assert db.insert("tbl3", {}, returning="id").id == 1
    db.truncate(["tbl1", sql.Identifier("tbl2"), "public.tbl3"])
    assert db.fetchall("tbl1") == db.fetchall("tbl2") == db.fetchall("tbl3") == []


def test_drop_ignores_a_missing_table_and_cascades_on_request(db: PgSimple) -> None:
    db.drop("no_such_table")
    db.create("t", "id int")
    db.execute("CREATE VIEW v AS SELECT * FROM t")
    db.commit()
    with pytest.raises(psycopg2.errors.DependentObjectsStillExist):
        db.drop("t")
    db.rollback()
    db.drop("t", cascade=True)
    with pytest.raises(psycopg2.errors.UndefinedTable):
        db.fetchall("t")


# --- fields, where, order


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        ("name", ["name"]),
        ("name, price", ["name", "price"]),
        ("name AS n, price as p", ["n", "p"]),
        (["name"], ["name"]),
        (("name", "id as Nr"), ["name", "Nr"]),
        ("books.name", ["name"]),
        ("books.*", ["id", "genre", "name", "price", "published", "modified"]),
        ("*", ["id", "genre", "name", "price", "published", "modified"]),
        (["*"], ["id", "genre", "name", "price", "published", "modified"]),
        (sql.SQL("count(*) AS n"), ["n"]),
        (["genre", sql.SQL("id % 2 AS odd")], ["genre", "odd"]),
        (sql.Identifier("name"), ["name"]),
    ],
)
def test_fields(books: PgSimple, fields: Any, columns: list[str]) -> None:
    cursor = books._select("books", fields, None, None, 0, None)
    assert [column.name for column in cursor.description or ()] == columns
    if columns != ["n"] and "odd" not in columns:
        assert list(books.fetchone("books", fields)._fields) == columns


@pytest.mark.parametrize(
    "fields",
    ["count(*)", "name n", "name; DROP TABLE books", 'we"ird', "name AS a b", "id::text",
     "DISTINCT name", "1", "", "a,", "*.name", "books.* AS b", "a..b", [], ["name, price"]],
)  # fmt: skip
def test_anything_but_a_name_must_be_composable(books: PgSimple, fields: Any) -> None:
    with pytest.raises(ValueError, match=r"psycopg2\.sql\.SQL|fields is empty"):
        books.fetchall("books", fields)
    with pytest.raises(ValueError, match=r"psycopg2\.sql\.SQL|fields is empty"):
        books.delete("books", returning=fields)
    assert len(books.fetchall("books")) == 9


@pytest.mark.parametrize(
    ("where", "count"),
    [
        (None, 9),
        ((), 9),
        ("id = 1", 1),
        (("id = 1",), 1),
        (["id = 1"], 1),
        (("id = 1", None), 1),
        (("id = %s", [1]), 1),
        (["id = %s", (1,)], 1),
        (("id = %s", 1), 1),
        (("name = %s", "Book Name vol. 1"), 1),
        (("id IN %s", [(1, 2)]), 2),
        (("id = ANY(%s)", ([1, 2, 3],)), 3),
        (("id = %s OR id = %s", (1, 2)), 2),
        ("name LIKE 'Book%'", 9),
        ("id % 2 = 0", 4),
        (("id %% 2 = %s", [0]), 4),
        (("id %% 2 = 0", []), 4),
        (sql.SQL("id % 2 = 1"), 5),
        ((sql.SQL("{} = %s").format(sql.Identifier("id")), [1]), 1),
    ],
)
def test_where_forms(books: PgSimple, where: Any, count: int) -> None:
    assert len(books.fetchall("books", where=where)) == count
    assert len(books.fetchall("books", where=where, limit=100, offset=0)) == count
    assert books.update("books", {"genre": "x%s"}, where) == count
    assert books.update("books", {"genre": sql.SQL("genre || '%s'")}, where) == count
    assert len(books.delete("books", where, returning="id")) == count


@pytest.mark.parametrize(
    "where", [("id = %s", {"id": 1}), ("id = %s AND id = %s", 1, 2), (1,), {"id": 1}]
)
def test_a_malformed_where_is_refused_before_anything_happens(books: PgSimple, where: Any) -> None:
    with pytest.raises(ValueError, match="where"):
        books.delete("books", where)
    assert len(books.fetchall("books")) == 9


def test_order_limit_and_offset(books: PgSimple) -> None:
    def ids(**rest: Any) -> list[int]:
        return [row.id for row in books.fetchall("books", "id", **rest)]

    assert ids(order=["id", "DESC"], limit=2) == [9, 8]
    assert ids(order=("id", "asc"), limit=2, offset=1) == [2, 3]
    assert ids(order="books.id", limit=1) == [1]
    assert ids(order=["id"], limit=1) == [1]
    assert ids(order=sql.SQL("id % 2 DESC, id"), limit=2) == [1, 3]
    assert ids(order=[sql.SQL("id % 2"), "DESC"], limit=5) == ids(
        order=sql.SQL("id % 2 DESC"), limit=5
    )
    assert ids(limit=0) == []
    assert books.fetchone("books", "id", order=["id", "DESC"], offset=1).id == 8


@pytest.mark.parametrize(
    "order", [["id", "DOWN"], ["id", "DESC; DROP TABLE books"], ["id", "ASC", "DESC"], ["id", 1]]
)
def test_a_wrong_direction_is_refused(books: PgSimple, order: Any) -> None:
    with pytest.raises(ValueError, match="order must be"):
        books.fetchall("books", order=order)


def test_an_expression_as_order_or_limit_is_refused(books: PgSimple) -> None:
    with pytest.raises(ValueError, match=r"psycopg2\.sql\.SQL"):
        books.fetchall("books", order="id DESC")
    with pytest.raises(ValueError, match=r"psycopg2\.sql\.SQL"):
        books.fetchall("books", order=["id; DROP TABLE books"])
    with pytest.raises(TypeError):
        books.fetchall("books", limit="1; DROP TABLE books")  # type: ignore[arg-type]


def test_join_keeps_the_rows_without_a_partner(books: PgSimple) -> None:
    books.create("loans", "loan_id serial, book int, who text, id int")
    books.insert("loans", {"book": 2, "who": "ann", "id": 70})
    rows = books.join(
        ("books", "loans"),
        (["name", "id AS book_id"], ["who", "id"]),
        ("id", "book"),
        where=("books.id <= %s", [3]),
        order=["books.id", "DESC"],
        limit=2,
    )
    assert [tuple(row) for row in rows] == [
        ("Book Name vol. 3", 3, None, None),
        ("Book Name vol. 2", 2, "ann", 70),
    ]
    assert rows[1].book_id == 2
    assert len(books.join(["books", "loans"], ["name", []], ["id", "book"], offset=1)) == 8
    assert (
        books.join(["loans", "public.books"], ["*", "name, genre AS g"], ["book", "id"])[0].g
        == "fiction"
    )
    counted = books.join(["books", "loans"], [sql.SQL("count(*)"), ()], ["id", "book"])
    assert counted[0].count == 9
    assert books.join(["books", "loans"], ["name", "who"], ["id", "book"], "false") == []


def test_join_wants_two_of_each(books: PgSimple) -> None:
    with pytest.raises(ValueError, match="tables must"):
        books.join("books", ["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match="fields must"):
        books.join(["books", "books"], ["a"], ["a", "b"])
    with pytest.raises(ValueError, match="join_fields must"):
        books.join(["books", "books"], ["a", "b"], "ab")
    with pytest.raises(ValueError, match="no field"):
        books.join(["books", "books"], [[], []], ["id", "id"])


def test_values_may_be_sql(books: PgSimple) -> None:
    new = {
        "genre": sql.SQL("upper('50%s')"),
        "name": "100% %s",
        "price": sql.Literal(1),
        "published": sql.SQL("now()"),
    }
    row = books.insert(
        "books", new, returning=["genre", "name", sql.SQL("published = current_date AS today")]
    )
    assert tuple(row) == ("50%S", "100% %s", True)
    assert (
        books.update(
            "books", {"name": sql.SQL("name || {}").format(sql.Literal("%"))}, ("id = %s", [1])
        )
        == 1
    )
    assert books.fetchone("books", "name", ("id = %s", [1])).name == "Book Name vol. 1%"


def test_values_are_never_sql(books: PgSimple) -> None:
    evil = "'); DROP TABLE books; --"
    books.update("books", {"name": evil}, ("id = %s", [1]))
    assert books.fetchone("books", where=("name = %s", [evil])).id == 1


def test_empty_data(db: PgSimple) -> None:
    db.create("t", "id serial, at timestamptz DEFAULT now()")
    assert db.insert("t", {}) == 1
    with pytest.raises(ValueError, match="data is empty"):
        db.update("t", {})


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_only_names(db: PgSimple, name: str) -> None:
    ours = sql.Identifier(name)
    db.create(name, sql.SQL("id serial, {} text").format(ours))
    assert db.insert(name, {name: "a"}, returning=[ours]) == ("a",)
    assert db.update(name, {name: "b"}, (sql.SQL("{} = 'a'").format(ours),), returning=ours) == [
        ("b",)
    ]
    assert db.fetchall(name, ["id", ours], order=[ours, "DESC"], limit=1) == [(1, "b")]
    assert db.fetchall(f"public.{name}", ours, sql.SQL("{} LIKE '%'").format(ours)) == [("b",)]
    db.truncate([name])
    assert db.delete(name) == 0
    db.drop(name)
    with pytest.raises(psycopg2.errors.UndefinedTable):
        db.fetchone(name)


def test_names_keep_their_case_and_dots_can_be_escaped(db: PgSimple) -> None:
    db.create("Books", '"Name" text')
    db.insert("Books", {"Name": "x"})
    assert db.fetchone("Books", "Name").Name == "x"
    db.create(sql.Identifier("a.b"), "id int")
    assert db.fetchall(sql.Identifier("a.b")) == []


def test_dict_rows(pool: Pool) -> None:
    with PgSimple(pool, nt_cursor=False) as db:
        row = db.execute("SELECT 1 AS one, 2 AS two").fetchone()
        assert row is not None
        assert row["two"] == row[1] == 2  # type: ignore[call-overload]


# --- log


def test_log_writes_queries_and_errors(pool: Pool) -> None:
    out = io.StringIO()
    with PgSimple(
        pool, log=out, log_fmt=lambda x: f">> {x if isinstance(x, str) else x.query}"
    ) as db:
        db.execute("SELECT %s", ["v"])
        with pytest.raises(psycopg2.errors.UndefinedTable):
            db.fetchall("no_such")
    first, second = out.getvalue().splitlines()[:2]
    assert first == ">> b\"SELECT 'v'\""
    assert second.startswith('>> execute() failed: relation "no_such" does not exist')


def test_log_without_a_format_and_with_a_logger(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), PgSimple(pool, log=logging.getLogger("mine")) as db:
        db.execute("SELECT 'é%'")
        with pytest.raises(psycopg2.errors.SyntaxError):
            db.execute("SELEC")
    assert [(r.name, r.levelname) for r in caplog.records] == [("mine", "DEBUG"), ("mine", "ERROR")]
    assert caplog.records[0].getMessage() == "SELECT 'é%'"


def test_without_a_log_the_format_is_not_called(pool: Pool) -> None:
    with PgSimple(pool, log_fmt=lambda x: pytest.fail("called")) as db:
        db.execute("SELECT 1")


def test_a_format_may_skip_and_knows_when_the_query_began(pool: Pool) -> None:
    out, times = io.StringIO(), []
    with PgSimple(pool, log=out, log_fmt=lambda x: times.append(x.timestamp)) as db:
        db.execute("SELECT 1")
    assert out.getvalue() == ""
    assert times[0] > 1e9


def test_a_failing_log_does_not_hide_the_statements_error(pool: Pool) -> None:
    def broken(what: Any) -> str:
        raise RuntimeError("log is full")

    with (
        PgSimple(pool, log=io.StringIO(), log_fmt=broken) as db,
        pytest.raises(psycopg2.errors.SyntaxError),
    ):
        db.execute("SELEC")


# --- transactions and the way back


@pytest.fixture
def table(db: PgSimple) -> str:
    db.create("t", "id int UNIQUE DEFERRABLE INITIALLY DEFERRED")
    db.commit()
    return "t"


def count(db: PgSimple) -> int:
    rows = len(db.fetchall("t"))
    db.rollback()
    return rows


def in_use(pool: Pool) -> int:
    return pool.stats().in_use


def cached(pool: Pool) -> int:
    return pool.stats().idle


def test_with_commits_and_returns(pool: Pool, db: PgSimple, table: str) -> None:
    with PgSimple(pool) as inner:
        assert inner.is_open
        assert in_use(pool) == 2
        inner.insert(table, {"id": 1})
    assert not inner.is_open
    assert (in_use(pool), cached(pool)) == (1, 1)
    assert count(db) == 1


@pytest.mark.parametrize(
    "error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, psycopg2.DataError]
)
def test_with_rolls_back_for_any_exception(
    pool: Pool, db: PgSimple, table: str, error: type[BaseException]
) -> None:
    def work() -> None:
        with PgSimple(pool) as inner:
            inner.insert(table, {"id": 1})
            raise error("stop")

    with pytest.raises(error, match="stop"):
        work()
    assert (in_use(pool), cached(pool)) == (1, 1)
    assert count(db) == 0


def test_with_rolls_back_when_a_generator_is_dropped(pool: Pool, db: PgSimple, table: str) -> None:
    def work() -> Generator[None]:
        with PgSimple(pool) as inner:
            inner.insert(table, {"id": 1})
            yield

    generator = work()
    next(generator)
    generator.close()
    assert (in_use(pool), cached(pool)) == (1, 1)
    assert count(db) == 0


def test_explicit_commit_and_rollback(pool: Pool, db: PgSimple, table: str) -> None:
    def work() -> None:
        with PgSimple(pool) as inner:
            inner.insert(table, {"id": 1})
            inner.commit()
            inner.insert(table, {"id": 2})
            inner.rollback()
            inner.insert(table, {"id": 3})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert count(db) == 1


class ResetError(Exception):
    """What a pool's `reset` callback raises."""


def refuse(conn: object) -> None:
    raise ResetError("reset() is upset too")


def insert_twice(pool: Pool, table: str) -> None:
    with PgSimple(pool) as inner:
        inner.insert(table, {"id": 1})
        inner.insert(table, {"id": 1})  # the constraint is deferred: refused at commit


def test_a_refused_commit_reaches_the_caller_and_keeps_the_connection(
    pool: Pool, db: PgSimple, table: str
) -> None:
    with pytest.raises(psycopg2.errors.UniqueViolation):
        insert_twice(pool, table)
    assert (in_use(pool), cached(pool)) == (1, 1)
    assert count(db) == 0


def test_an_error_of_the_pool_hides_no_other(make_pool: MakePool, db: PgSimple, table: str) -> None:
    pool = make_pool(reset=refuse)
    with pytest.raises(psycopg2.errors.UniqueViolation):
        insert_twice(pool, table)
    with pytest.raises(ZeroDivisionError), PgSimple(pool):
        raise ZeroDivisionError
    with pytest.raises(ResetError), PgSimple(pool) as inner:
        inner.insert(table, {"id": 1})
    assert count(db) == 1
    with pytest.raises(ResetError):
        PgSimple(pool).close()
    assert (in_use(pool), cached(pool)) == (0, 0)


def test_a_pool_disposed_of_meanwhile_reaches_the_caller_after_success_only(
    make_pool: MakePool,
) -> None:
    def work(pool: Pool) -> None:
        with PgSimple(pool):
            pool.release_all()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work(make_pool())
    pool = make_pool()
    handle = PgSimple(pool)
    pool.release_all()
    assert not handle.is_open
    with pytest.raises(PoolClosed):
        handle.close()
    handle.close()


def pid_of(handle: PgSimple) -> int:
    return handle._live().info.backend_pid


def kill(handle: PgSimple, killer: PgSimple) -> None:
    killer.execute("SELECT pg_terminate_backend(%s, 10000)", [pid_of(handle)])
    killer.rollback()


def test_a_dead_connection_reaches_the_caller_and_is_discarded(pool: Pool, db: PgSimple) -> None:
    def work() -> None:
        with PgSimple(pool) as inner:
            kill(inner, db)
            inner.execute("SELECT 1")

    with pytest.raises(psycopg2.OperationalError, match=r"server closed|terminating connection"):
        work()
    assert (in_use(pool), cached(pool)) == (1, 0)
    with PgSimple(pool) as inner:  # its slot is free again
        inner.execute("SELECT 1")


def test_a_commit_on_a_dead_connection_reaches_the_caller(pool: Pool, db: PgSimple) -> None:
    def work() -> None:
        with PgSimple(pool) as inner:
            inner.execute("SELECT 1")
            kill(inner, db)

    with pytest.raises(psycopg2.OperationalError):
        work()
    assert (in_use(pool), cached(pool)) == (1, 0)


def test_is_open_sees_a_connection_that_broke(pool: Pool, db: PgSimple) -> None:
    inner = PgSimple(pool)
    kill(inner, db)
    with pytest.raises(psycopg2.OperationalError):
        inner.execute("SELECT 1")
    assert not inner.is_open
    with pytest.raises(psycopg2.InterfaceError):
        inner.fetchall("pg_class")
    with pytest.raises(psycopg2.InterfaceError):
        inner.commit()
    inner.close()
    assert (in_use(pool), cached(pool)) == (1, 0)


def test_close_is_idempotent_and_final(pool: Pool) -> None:
    handle = PgSimple(pool)
    assert handle.is_open
    assert "open" in repr(handle)
    handle.close()
    handle.close()
    assert not handle.is_open
    assert "closed" in repr(handle)
    uses: list[Any] = [
        handle.commit,
        handle.rollback,
        lambda: handle.execute("SELECT 1"),
        handle.__enter__,
    ]
    uses += [lambda: handle.fetchall("t"), lambda: handle.insert("t", {}), lambda: handle.drop("t")]
    for use in uses:
        with pytest.raises(psycopg2.InterfaceError, match="closed"):
            use()
    assert (in_use(pool), cached(pool)) == (0, 1)


def test_close_inside_with_commits_nothing(pool: Pool, db: PgSimple, table: str) -> None:
    with PgSimple(pool) as inner:
        inner.insert(table, {"id": 1})
        inner.close()
    assert (in_use(pool), cached(pool)) == (1, 1)
    assert count(db) == 0


def test_exhaustion_surfaces_as_pool_error(pool: Pool) -> None:
    with PgSimple(pool), PgSimple(pool):
        with pytest.raises(PoolError):
            PgSimple(pool)
        with pytest.raises(psycopg2.pool.PoolError):
            PgSimple(pool)
    assert (in_use(pool), cached(pool)) == (0, 2)


def test_the_default_is_the_current_pool(make_pool: MakePool) -> None:
    pool = make_pool(name="default")
    with PgSimple() as db:
        assert in_use(pool) == 1
        db.execute("SELECT 1")
        assert db._live().info.transaction_status == TRANSACTION_STATUS_INTRANS
    assert in_use(pool) == 0


# --- garbage collection


@pytest.fixture
def single(make_pool: MakePool) -> Pool:
    """A pool of one connection: whoever does not bring it back is found out."""
    return make_pool(max_conn=1)


def test_garbage_collection_returns_the_connection_at_once(single: Pool) -> None:
    pids = set()
    for _ in range(20):
        handle = PgSimple(single)
        handle.execute("SELECT 1")  # leaves a transaction open
        pids.add(pid_of(handle))
        with pytest.raises(PoolExhausted):
            PgSimple(single)
        del handle
    with PgSimple(single) as db:
        assert db._live().info.transaction_status == TRANSACTION_STATUS_IDLE
        pids.add(pid_of(db))
    assert len(pids) == 1


def test_garbage_is_returned_without_another_call_of_the_pool(single: Pool) -> None:
    PgSimple(single)
    wait_until(lambda: cached(single) == 1, timeout_s=3, what="the link's thread to bring it back")


def test_a_cursor_that_outlives_its_handle_does_not_keep_the_connection(single: Pool) -> None:
    cursor = PgSimple(single).execute("SELECT 42")
    with PgSimple(single) as db:
        assert db._live() is cursor.connection
    with pytest.raises(psycopg2.InterfaceError):
        cursor.fetchone()


class Node:
    """Something to make a reference cycle of."""

    def __init__(self, handle: PgSimple) -> None:
        self.handle = handle
        self.itself = self


def test_garbage_in_a_cycle_is_returned_too(single: Pool) -> None:
    for _ in range(5):
        Node(PgSimple(single))
        gc.collect()
        PgSimple(single).close()
    assert (in_use(single), cached(single)) == (0, 1)


def next_heartbeat(pool: Pool) -> None:
    link = pool._local.link
    assert link is not None
    heard_at = link.heard_at
    wait_until(
        lambda: link.heard_at > heard_at,
        timeout_s=5 * TTL_S,
        what="the broker's answer to a heartbeat",
    )


def test_a_checkout_after_a_collected_cycle_is_not_taken_for_lost(
    single: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    Node(PgSimple(single))
    gc.collect()
    with PgSimple(single) as db:
        for _ in range(2):  # at every heartbeat the worker looks for lost connections
            next_heartbeat(single)
        assert in_use(single) == 1
        assert db.execute("SELECT 1").fetchone() == (1,)
    assert not caplog.records


def test_garbage_collection_never_raises(make_pool: MakePool) -> None:
    # pytest turns an unraisable exception into an error.
    PgSimple.__new__(PgSimple).__del__()  # __init__ never ran
    with pytest.raises(PoolError):
        PgSimple(make_pool(name="nothing there", broker="ipc:///nonexistent/broker", timeout=0.1))
    pool = make_pool()
    handle = PgSimple(pool)
    handle.__del__()
    handle.__del__()
    handle.close()
    handle = PgSimple(pool)
    pool.release_all()
    del handle
    gc.collect()


def in_a_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; return 0 if it raised nothing."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_childs_use_of_a_handle_leaves_the_parent_alone(single: Pool) -> None:
    with PgSimple(single) as handle:
        assert in_a_child(lambda: handle.__del__()) == 0
        assert in_a_child(lambda: handle.close()) == 0
        assert in_a_child(lambda: handle.__exit__(None, None, None)) == 0
        assert handle.execute("SELECT 1").fetchone() == (1,)
    assert (in_use(single), cached(single)) == (0, 1)


def test_a_finalizer_takes_no_lock(single: Pool) -> None:
    handle = PgSimple(single)
    with single._local.lock:  # garbage collection may run in the very thread that holds it
        worker = threading.Thread(target=handle.__del__, daemon=True)
        worker.start()
        worker.join(5)
        assert not worker.is_alive()
    PgSimple(single).close()


@pytest.mark.long
def test_release_all_and_garbage_collection_do_not_deadlock(make_pool: MakePool) -> None:
    for _ in range(5):
        pool = make_pool(max_conn=4, pool_manager=sharedpool.ThreadedConnectionPool)
        for _ in range(4):
            Node(PgSimple(pool))
        thresholds = gc.get_threshold()
        gc.set_threshold(
            1, 1, 1
        )  # a collection at almost every allocation, within release_all() too
        try:
            ending = threading.Thread(target=pool.release_all, daemon=True)
            ending.start()
            ending.join(10)
        finally:
            gc.set_threshold(*thresholds)
        assert not ending.is_alive()
        gc.collect()
        assert pool.disposed
