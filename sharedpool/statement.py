"""The text of one SQL statement of `PgSimple`, with its parameters.

Names are quoted by `psycopg2.sql`, and values become parameters. psycopg2 always gets parameters,
so each % that is no placeholder is doubled.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from psycopg2.extensions import connection
from psycopg2.sql import Composable, Identifier

Name = str | Composable
Fields = str | Composable | Sequence[Name]
Where = str | Composable | Sequence[Any] | None
Order = str | Composable | Sequence[Name] | None

_WORD = r"[^\W\d][\w$]*"
_FIELD = re.compile(
    rf"\s*(?P<name>{_WORD}(?:\.{_WORD})*)(?P<all>\.\*)?(?:\s+AS\s+(?P<alias>{_WORD}))?\s*",
    re.IGNORECASE,
)


class Statement:
    """Makes the pieces of one statement, and collects its parameters in `params`.

    The pieces must be made in the order in which they stand in the statement. `conn` is
    psycopg2's own connection, which decides how names are quoted.
    """

    def __init__(self, conn: connection) -> None:
        self._conn = conn
        self.params: list[Any] = []

    def literal(self, part: str | Composable) -> str:
        """Return SQL that has no placeholders."""
        text = part if isinstance(part, str) else part.as_string(self._conn)
        return text.replace("%", "%%")

    def table(self, table: Name) -> str:
        """Return a table, which may have a schema before it ("app.books")."""
        if isinstance(table, str):
            table = Identifier(*(part.strip() for part in table.split(".")))
        return self.literal(table)

    def column(self, name: Name) -> str:
        """Return a column to write to."""
        return self.literal(Identifier(name) if isinstance(name, str) else name)

    def value(self, value: Any) -> str:
        """Return a placeholder for a value, or an expression."""
        if isinstance(value, Composable):
            return self.literal(value)
        self.params.append(value)
        return "%s"

    def field(self, field: Name, table: str | None = None, plain: bool = True) -> str:
        """Return one field, after its table (which is quoted already).

        With `plain` neither `*` nor an alias is allowed.
        """
        if isinstance(field, Composable):
            return self.literal(field)
        prefix = "" if table is None else f"{table}."
        if field.strip() == "*" and not plain:
            return f"{prefix}*"
        found = _FIELD.fullmatch(field)
        if (
            found is None
            or (plain and (found["all"] or found["alias"]))
            or (found["all"] and found["alias"])
        ):
            raise ValueError(
                f"{field!r} is not a plain name; pass psycopg2.sql.SQL({field!r}) for anything else"
            )
        text = prefix + self.literal(Identifier(*found["name"].split("."))) + (found["all"] or "")
        return f"{text} AS {self.literal(Identifier(found['alias']))}" if found["alias"] else text

    def fields(self, fields: Fields, table: str | None = None) -> str:
        """Return a list of fields ("id, name AS title", or a sequence)."""
        parts = fields.split(",") if isinstance(fields, str) else as_list(fields)
        if not parts:
            raise ValueError('fields is empty; "*" selects every column')
        return ", ".join(self.field(part, table, plain=False) for part in parts)

    def returning(self, fields: Fields | None) -> str:
        """Return the RETURNING clause."""
        return "" if fields is None else f" RETURNING {self.fields(fields)}"

    def where(self, where: Where) -> str:
        """Return the WHERE clause."""
        if not where:
            return ""
        condition, *rest = as_list(where)
        if not isinstance(condition, str | Composable) or len(rest) > 1:
            raise ValueError('where must be "condition" or ("condition", [parameters])')
        if not rest or rest[0] is None:
            return f" WHERE {self.literal(condition)}"
        if isinstance(rest[0], Mapping):
            raise ValueError("where takes its parameters as a list or tuple for %s, not by name")
        self.params.extend(as_list(rest[0]))
        # This condition has placeholders, so its % must not be doubled.
        if isinstance(condition, Composable):
            condition = condition.as_string(self._conn)
        return f" WHERE {condition}"

    def order(self, order: Order) -> str:
        """Return the ORDER BY clause."""
        if not order:
            return ""
        field, *rest = as_list(order)
        direction = " ".join(str(word).upper() for word in rest)
        if direction not in ("", "ASC", "DESC"):
            raise ValueError(f'order must be [field] or [field, "ASC" | "DESC"], not {order!r}')
        return f" ORDER BY {self.field(field)} {direction}"


def as_list(value: Any) -> list[Any]:
    """Return a list or tuple as a list, and anything else as a list of one."""
    return list(value) if isinstance(value, list | tuple) else [value]
