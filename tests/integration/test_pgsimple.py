"""PgSimple on a real server: every method, pg_simple's own examples, hostile names, who gets the connection."""

import datetime
import gc
import io
import logging
from collections.abc import Generator, Iterator
from typing import Any

import psycopg2
import pytest
from psycopg2 import sql
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, TRANSACTION_STATUS_INTRANS, connection, make_dsn
from psycopg2.pool import PoolError, SimpleConnectionPool

from sharedpool import config
from sharedpool.cli.postgres import EphemeralPostgres
from sharedpool.pgsimple import PgSimple

HOSTILE = ['we"ird; drop', "50%s", "Ünïcode 数", "select", "it's", "a%(b)s"]


class TinyPool:
    """psycopg2's pool under sharedpool's names, with a record of how connections came back."""

    def __init__(self, dsn: str, limit: int = 2) -> None:
        self.pool = SimpleConnectionPool(0, limit, dsn)
        self.returned: list[dict[str, bool]] = []
        self.put_error: BaseException | None = None

    def get_conn(self) -> connection:
        conn: connection = self.pool.getconn()
        return conn

    def put_conn(self, conn: connection, *, close: bool = False, fail_silently: bool = False) -> None:
        self.returned.append({"close": close, "fail_silently": fail_silently})
        self.pool.putconn(conn, close=close)
        if self.put_error is not None:
            raise self.put_error

    @property
    def in_use(self) -> int:
        return len(self.pool._used)  # type: ignore[attr-defined]


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


@pytest.fixture
def pool(module_dsn: str) -> Iterator[TinyPool]:
    pool = TinyPool(module_dsn)
    yield pool
    pool.pool.closeall()
    cleaner = psycopg2.connect(module_dsn)
    with cleaner, cleaner.cursor() as cursor:
        cursor.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    cleaner.close()


@pytest.fixture
def db(pool: TinyPool) -> Iterator[PgSimple]:
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
        row = {"genre": "fiction", "name": f"Book Name vol. {i}", "price": 1.23 * i, "published": f"{2000 + i}-{i}-1"}
        assert db.insert("books", row) == 1
    db.commit()
    return db


def names(rows: list[Any]) -> list[str]:
    return [row.name for row in rows]


# --- pg_simple's own examples -----------------------------------------------------------------------------------------


def test_fetchone_with_two_fields(books: PgSimple) -> None:
    book = books.fetchone("books", fields=["name", "published"], where=("published = %s", [datetime.date(2002, 2, 1)]))
    assert book.name == book[0] == "Book Name vol. 2"
    assert book.published == datetime.date(2002, 2, 1)
    assert books.fetchone("books", where=("id = %s", [-1])) is None


def test_fetchall_with_aliases_order_limit_and_offset(books: PgSimple) -> None:
    rows = books.fetchall(
        "books",
        fields=["name AS n", "genre AS g"],
        where=("published BETWEEN %s AND %s", [datetime.date(2005, 2, 1), datetime.date(2009, 2, 1)]),
        order=["published", "DESC"],
        limit=5,
        offset=2,
    )
    assert [row.n for row in rows] == ["Book Name vol. 6", "Book Name vol. 5"]
    assert rows[0].g == rows[0][1] == "fiction"


def test_update_and_delete_count_rows(books: PgSimple) -> None:
    changed = books.update(
        "books",
        data={"name": "An expensive book", "price": 998.997, "genre": "non-fiction", "modified": "NOW()"},
        where=("published = %s", [datetime.date(2001, 1, 1)]),
    )
    assert changed == 1
    assert books.fetchone("books", "genre", ("price = %s::money", ["$999.00"])).genre == "non-fiction"
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
    rows = books.delete("books", where=("published >= %s", [datetime.date(2005, 1, 31)]), returning="name")
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


# --- fields, where, order ---------------------------------------------------------------------------------------------


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
    cursor = books._select(books._fields(fields), "books", None, None, 0, None)
    assert [column.name for column in cursor.description or ()] == columns
    if columns != ["n"] and "odd" not in columns:
        assert list(books.fetchone("books", fields)._fields) == columns


@pytest.mark.parametrize(
    "fields",
    ["count(*)", "name n", "name; DROP TABLE books", 'we"ird', "name AS a b", "id::text", "DISTINCT name", "1", "",
     "a,", "*.name", "books.* AS b", "a..b", [], ["name, price"]],
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


@pytest.mark.parametrize("where", [("id = %s", {"id": 1}), ("id = %s AND id = %s", 1, 2), (1,), {"id": 1}])
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
    assert ids(order=[sql.SQL("id % 2"), "DESC"], limit=5) == ids(order=sql.SQL("id % 2 DESC"), limit=5)
    assert ids(limit=0) == []
    assert books.fetchone("books", "id", order=["id", "DESC"], offset=1).id == 8


@pytest.mark.parametrize("order", [["id", "DOWN"], ["id", "DESC; DROP TABLE books"], ["id", "ASC", "DESC"], ["id", 1]])
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
    assert [tuple(row) for row in rows] == [("Book Name vol. 3", 3, None, None), ("Book Name vol. 2", 2, "ann", 70)]
    assert rows[1].book_id == 2
    assert len(books.join(["books", "loans"], ["name", []], ["id", "book"], offset=1)) == 8
    assert books.join(["loans", "public.books"], ["*", "name, genre AS g"], ["book", "id"])[0].g == "fiction"
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
    new = {"genre": sql.SQL("upper('50%s')"), "name": "100% %s", "price": sql.Literal(1), "published": sql.SQL("now()")}
    row = books.insert("books", new, returning=["genre", "name", sql.SQL("published = current_date AS today")])
    assert tuple(row) == ("50%S", "100% %s", True)
    assert books.update("books", {"name": sql.SQL("name || {}").format(sql.Literal("%"))}, ("id = %s", [1])) == 1
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
    assert db.update(name, {name: "b"}, (sql.SQL("{} = 'a'").format(ours),), returning=ours) == [("b",)]
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


def test_dict_rows(pool: TinyPool) -> None:
    with PgSimple(pool, nt_cursor=False) as db:
        row = db.execute("SELECT 1 AS one, 2 AS two").fetchone()
        assert row is not None
        assert row["two"] == row[1] == 2  # type: ignore[call-overload]


# --- log --------------------------------------------------------------------------------------------------------------


def test_log_writes_queries_and_errors(pool: TinyPool) -> None:
    out = io.StringIO()
    with PgSimple(pool, log=out, log_fmt=lambda x: f">> {x if isinstance(x, str) else x.query}") as db:
        db.execute("SELECT %s", ["v"])
        with pytest.raises(psycopg2.errors.UndefinedTable):
            db.fetchall("no_such")
    first, second = out.getvalue().splitlines()[:2]
    assert first == ">> b\"SELECT 'v'\""
    assert second.startswith('>> execute() failed: relation "no_such" does not exist')


def test_log_without_a_format_and_with_a_logger(pool: TinyPool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), PgSimple(pool, log=logging.getLogger("mine")) as db:
        db.execute("SELECT 'é%'")
        with pytest.raises(psycopg2.errors.SyntaxError):
            db.execute("SELEC")
    assert [(r.name, r.levelname) for r in caplog.records] == [("mine", "DEBUG"), ("mine", "ERROR")]
    assert caplog.records[0].getMessage() == "SELECT 'é%'"


def test_without_a_log_the_format_is_not_called(pool: TinyPool) -> None:
    with PgSimple(pool, log_fmt=lambda x: pytest.fail("called")) as db:
        db.execute("SELECT 1")


def test_a_format_may_skip_and_knows_when_the_query_began(pool: TinyPool) -> None:
    out, times = io.StringIO(), []
    with PgSimple(pool, log=out, log_fmt=lambda x: times.append(x.timestamp)) as db:
        db.execute("SELECT 1")
    assert out.getvalue() == ""
    assert times[0] > 1e9


def test_a_failing_log_does_not_hide_the_statements_error(pool: TinyPool) -> None:
    def broken(what: Any) -> str:
        raise RuntimeError("log is full")

    with PgSimple(pool, log=io.StringIO(), log_fmt=broken) as db, pytest.raises(psycopg2.errors.SyntaxError):
        db.execute("SELEC")


# --- transactions and the way back ------------------------------------------------------------------------------------


@pytest.fixture
def table(db: PgSimple) -> str:
    db.create("t", "id int UNIQUE DEFERRABLE INITIALLY DEFERRED")
    db.commit()
    return "t"


def count(db: PgSimple) -> int:
    rows = len(db.fetchall("t"))
    db.rollback()
    return rows


def test_with_commits_and_returns(pool: TinyPool, db: PgSimple, table: str) -> None:
    with PgSimple(pool) as inner:
        assert inner.is_open
        assert pool.in_use == 2
        inner.insert(table, {"id": 1})
    assert not inner.is_open
    assert pool.in_use == 1
    assert pool.returned == [{"close": False, "fail_silently": False}]
    assert count(db) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, psycopg2.DataError])
def test_with_rolls_back_for_any_exception(
    pool: TinyPool, db: PgSimple, table: str, error: type[BaseException]
) -> None:
    def work() -> None:
        with PgSimple(pool) as inner:
            inner.insert(table, {"id": 1})
            raise error("stop")

    with pytest.raises(error, match="stop"):
        work()
    assert pool.in_use == 1
    assert pool.returned[0]["close"] is False
    assert count(db) == 0


def test_with_rolls_back_when_a_generator_is_dropped(pool: TinyPool, db: PgSimple, table: str) -> None:
    def work() -> Generator[None]:
        with PgSimple(pool) as inner:
            inner.insert(table, {"id": 1})
            yield

    generator = work()
    next(generator)
    generator.close()
    assert pool.in_use == 1
    assert count(db) == 0


def test_explicit_commit_and_rollback(pool: TinyPool, db: PgSimple, table: str) -> None:
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


def test_a_refused_commit_reaches_the_caller_and_returns_the_connection(
    pool: TinyPool, db: PgSimple, table: str
) -> None:
    def work() -> None:
        with PgSimple(pool) as inner:
            inner.insert(table, {"id": 1})
            inner.insert(table, {"id": 1})  # the constraint is deferred: refused at commit

    pool.put_error = PoolError("the pool is upset too")
    with pytest.raises(psycopg2.errors.UniqueViolation):
        work()
    pool.put_error = None
    assert pool.in_use == 1
    assert pool.returned == [{"close": False, "fail_silently": True}]
    assert count(db) == 0


def test_an_error_of_the_pool_reaches_the_caller_after_success_only(pool: TinyPool) -> None:
    pool.put_error = PoolError("no")
    with pytest.raises(PoolError), PgSimple(pool):
        pass
    with pytest.raises(ZeroDivisionError), PgSimple(pool):
        raise ZeroDivisionError
    pool.put_error = None


def kill(handle: PgSimple, killer: PgSimple) -> None:
    pid = handle.execute("SELECT pg_backend_pid() AS pid").fetchone()[0]  # type: ignore[index]
    killer.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])
    killer.rollback()


def test_a_dead_connection_reaches_the_caller_and_is_discarded(pool: TinyPool, db: PgSimple) -> None:
    def work() -> None:
        with PgSimple(pool) as inner:
            kill(inner, db)
            inner.execute("SELECT 1")

    with pytest.raises(psycopg2.OperationalError, match=r"server closed|terminating connection"):
        work()
    assert pool.in_use == 1
    assert pool.returned == [{"close": True, "fail_silently": True}]


def test_a_commit_on_a_dead_connection_reaches_the_caller(pool: TinyPool, db: PgSimple) -> None:
    with pytest.raises(psycopg2.OperationalError), PgSimple(pool) as inner:
        kill(inner, db)
    assert pool.in_use == 1


def test_is_open_sees_a_connection_that_broke(pool: TinyPool, db: PgSimple) -> None:
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
    assert pool.in_use == 1


def test_close_is_idempotent_and_final(pool: TinyPool) -> None:
    handle = PgSimple(pool)
    assert handle.is_open
    assert "open" in repr(handle)
    handle.close()
    handle.close()
    assert not handle.is_open
    assert "closed" in repr(handle)
    assert len(pool.returned) == 1
    uses: list[Any] = [handle.commit, handle.rollback, lambda: handle.execute("SELECT 1"), handle.__enter__]
    uses += [lambda: handle.fetchall("t"), lambda: handle.insert("t", {}), lambda: handle.drop("t")]
    for use in uses:
        with pytest.raises(psycopg2.InterfaceError, match="closed"):
            use()
    assert pool.in_use == 0


def test_close_inside_with_commits_nothing(pool: TinyPool, db: PgSimple, table: str) -> None:
    with PgSimple(pool) as inner:
        inner.insert(table, {"id": 1})
        inner.close()
    assert len(pool.returned) == 1
    assert count(db) == 0


def test_garbage_collection_returns_quietly(pool: TinyPool) -> None:
    handle = PgSimple(pool)
    handle.execute("SELECT 1")
    del handle
    gc.collect()
    assert pool.in_use == 0
    assert pool.returned == [{"close": False, "fail_silently": True}]
    with PgSimple(pool) as db:
        assert db._live().info.transaction_status == TRANSACTION_STATUS_IDLE


def test_garbage_in_a_cycle_returns_too(pool: TinyPool) -> None:
    handle: Any = PgSimple(pool)
    handle.myself = handle
    del handle
    gc.collect()
    assert pool.in_use == 0


def test_garbage_collection_never_raises(pool: TinyPool) -> None:
    PgSimple.__new__(PgSimple).__del__()  # __init__ never ran
    pool.put_error = KeyboardInterrupt()
    PgSimple(pool).__del__()
    PgSimple(pool)  # pytest turns an unraisable exception into an error
    gc.collect()
    pool.put_error = None
    assert pool.in_use == 0


def test_exhaustion_surfaces_as_pool_error(pool: TinyPool) -> None:
    with PgSimple(pool), PgSimple(pool), pytest.raises(PoolError):
        PgSimple(pool)
    assert pool.in_use == 0


def test_the_default_is_the_current_pool(pool: TinyPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "get_pool", lambda: pool)
    with PgSimple() as db:
        assert pool.in_use == 1
        db.execute("SELECT 1")
        assert db._live().info.transaction_status == TRANSACTION_STATUS_INTRANS
    assert pool.in_use == 0
