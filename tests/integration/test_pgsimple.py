"""PgSimple on a real server: pg_simple's own examples, and the log."""

import datetime
import io
import logging
from typing import Any

import psycopg2
import pytest
from psycopg2 import sql

from sharedpool import PgSimple, Pool
from tests.integration.pgsimple_handles import books, broker, db, make_pool, module_dsn, names, pool

__all__ = ["books", "broker", "db", "make_pool", "module_dsn", "pool"]  # pytest finds them here


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
