"""Statements that an interrupt must not divide stand in one line: a formatter may not wrap them.

A comment that begins with "One line" marks each. An exception of a signal handler may come between
two lines of a statement; there a descriptor would have no owner, and stay open.
"""

from __future__ import annotations

import ast
from pathlib import Path

import sharedpool

_PACKAGE = Path(sharedpool.__file__).parent
_MARK = "# One line"


def _marked() -> list[tuple[str, str]]:
    """Return where each mark is, and the line of code after its comment."""
    found = []
    for path in sorted(_PACKAGE.rglob("*.py")):
        lines = [line.strip() for line in path.read_text().splitlines()]
        for number, line in enumerate(lines):
            if line.startswith(_MARK):
                code = next(each for each in lines[number:] if not each.startswith("#"))
                found.append((f"{path.relative_to(_PACKAGE)}:{number + 1}", code))
    return found


def test_a_statement_that_must_be_one_line_is_one() -> None:
    marked = _marked()
    assert len(marked) >= 3
    for place, code in marked:
        assert _is_complete(code), f"{place}: {code}"


def _is_complete(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True
