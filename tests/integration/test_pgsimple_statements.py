"""PgSimple's statements: fields, where, order, hostile names."""

from typing import Any

import psycopg2
import pytest
from psycopg2 import sql

from sharedpool import PgSimple, Pool
from tests.integration.pgsimple_handles import books, broker, db, make_pool, module_dsn, pool

__all__ = ["books", "broker", "db", "make_pool", "module_dsn", "pool"]  # pytest finds them here

HOSTILE = ['we"ird; drop', "50%s", "Ünïcode 数", "select", "it's", "a%(b)s"]


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
