"""Nothing is decided by reading an error's text: servers and libpq speak many languages, and reword
what they say.

What may be shown may not be searched or compared. This walks the package's syntax trees: whatever
comes out of an exception as text is *prose*, and stays it through assignments and calls inside its
module.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sharedpool

PACKAGE = Path(sharedpool.__file__).parent
# What hands out an error's words.
WORDS = frozenset(
    {
        "args",
        "pgerror",
        "diag",
        "message_primary",
        "message_detail",
        "message_hint",
        "strerror",
        "reason",
    }
)
SHOWN_BY = frozenset({"str", "repr", "format", "one_line", "_text"})
# What decides by a text, or takes one apart.
READERS = frozenset(
    {
        "startswith",
        "endswith",
        "find",
        "rfind",
        "index",
        "rindex",
        "count",
        "partition",
        "rpartition",
        "removeprefix",
    }
    | {"removesuffix", "search", "match", "fullmatch", "findall", "finditer", "isascii", "sub"}
)
# Where reading is right, by module and function, and why.
ALLOWED = {
    (
        "postgres/conninfo.py",
        "_without_quotes",
    ): "cuts out what libpq quotes, for the text that is shown; decides nothing else",
    (
        "broker/launch/config_file.py",
        "_convert",
    ): "msgspec's words about our own file, for the text that is shown",
    (
        "postgres/libpq.py",
        "codes",
    ): "SQLSTATEs, which libpq was told to write in the place of words",
}


class Reader(ast.NodeVisitor):
    """Finds in one function where prose is read.

    `prose`: names that hold some; `errors`: names of exceptions.
    """

    def __init__(self, prose: set[str], errors: set[str]) -> None:
        self.prose, self.errors = prose, errors
        self.found: list[int] = []
        self.passed: set[tuple[str, int]] = (
            set()
        )  # functions that are handed prose, and as which argument

    def is_prose(self, node: ast.AST) -> bool:
        match node:
            case ast.Name(id=name):
                return name in self.prose
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in self.errors:
                return attribute in WORDS
            case ast.Attribute(
                attr="pgerror" | "message_primary" | "message_detail" | "message_hint"
            ):
                return True
            case ast.Call(func=ast.Name(id=function), args=[argument, *_]) if function in SHOWN_BY:
                return self.is_error(argument) or self.is_prose(argument)
            case ast.Call(func=ast.Attribute(attr="PQerrorMessage" | "PQresultErrorMessage")):
                return True
            case ast.Call(func=ast.Attribute(value=inner), args=arguments):
                return self.is_prose(inner) or any(map(self.is_prose, arguments))
            case ast.Call(func=ast.Name(), args=arguments):
                return any(map(self.is_prose, arguments))
            case ast.FormattedValue(value=inner):
                return self.is_error(inner) or self.is_prose(inner)
            case (
                ast.JoinedStr()
                | ast.BinOp()
                | ast.BoolOp()
                | ast.IfExp()
                | ast.Subscript()
                | ast.NamedExpr()
            ):
                return any(map(self.is_prose, ast.iter_child_nodes(node)))
        return False

    def is_error(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id in self.errors

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.name:
            self.errors.add(node.name)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if self.is_prose(node.value):
            self.prose |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if (
            node.value is not None
            and self.is_prose(node.value)
            and isinstance(node.target, ast.Name)
        ):
            self.prose.add(node.target.id)
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        if self.is_prose(node.value):
            self.prose.add(node.target.id)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if any(map(self.is_prose, [node.left, *node.comparators])):
            self.found.append(node.lineno)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        read = [node.func.value, *node.args] if isinstance(node.func, ast.Attribute) else []
        if (
            isinstance(node.func, ast.Attribute)
            and node.func.attr in READERS
            and any(map(self.is_prose, read))
        ):
            self.found.append(node.lineno)
        if isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            self.passed |= {
                (name, place) for place, argument in enumerate(node.args) if self.is_prose(argument)
            }
        self.generic_visit(node)

    def visit_Match(self, node: ast.Match) -> None:
        if self.is_prose(node.subject):
            self.found.append(node.lineno)
        self.generic_visit(node)


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield node


def read(function: Function, handed: set[tuple[str, int]]) -> Reader:
    """Look at one function until nothing new is found in it; `handed`: see `Reader.passed`."""
    arguments = [
        each
        for each in [*function.args.posonlyargs, *function.args.args]
        if each.arg not in ("self", "cls")
    ]
    errors = {
        each.arg
        for each in [*arguments, *function.args.kwonlyargs]
        if each.annotation is not None
        and any(word in ast.unparse(each.annotation) for word in ("Error", "Exception"))
    }
    prose = {each.arg for place, each in enumerate(arguments) if (function.name, place) in handed}
    while True:
        reader = Reader(set(prose), set(errors))
        reader.visit(function)
        if reader.prose == prose and reader.errors == errors:
            return reader
        prose, errors = reader.prose, reader.errors


def prose_in(source: str) -> list[tuple[str, int]]:
    """Return where a module decides by prose: functions and lines."""
    tree = ast.parse(source)
    handed: set[tuple[str, int]] = set()
    while True:
        readers = [(function.name, read(function, handed)) for function in functions(tree)]
        more = set().union(*(reader.passed for _, reader in readers)) if readers else set()
        if more <= handed:
            return sorted({(name, line) for name, reader in readers for line in reader.found})
        handed |= more


def test_nothing_is_decided_by_an_errors_words() -> None:
    found, used = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = str(path.relative_to(PACKAGE))
        for function, line in prose_in(path.read_text()):
            if (module, function) in ALLOWED:
                used.add((module, function))
            else:
                found.append(f"{module}:{line} in {function}()")
    assert not found, "an error's words are read here: use its SQLSTATE, its class or its errno"
    assert used == ALLOWED.keys(), "what is allowed and not needed any more"


@pytest.mark.parametrize(
    "body",
    [
        "if 'timeout' in str(error): pass",
        "if PATTERN.search(str(error)): pass",
        "if re.search('gone', f'{error}'): pass",
        "text = ' '.join(str(error).split())\n        return text.startswith('FATAL')",
        "return error.args[0] == 'no'",
        "return 'down' in (error.pgerror or '')",
        "return error.diag.message_primary == 'x'",
        "return judge(str(error))",
        "late = 'expired' in str(error) or True",
        "match str(error):\n            case 'no': pass",
        "return [word for word in WORDS if word in str(error)]",
        "if (text := str(error)) and text.endswith('!'): pass",
    ],
)
def test_a_function_that_reads_an_errors_text_is_found(body: str) -> None:
    judge = "def judge(text):\n    return 'FATAL' in text\n"
    source = f"{judge}def look(x):\n    try:\n        x()\n"
    source += f"    except ValueError as error:\n        {body}\n"
    assert prose_in(source)


@pytest.mark.parametrize(
    "body",
    [
        "raise RuntimeError(str(error)) from error",
        "text = str(error)[:500]\n        log(text)",
        "return error.pgcode == '57P01'",
        "return isinstance(error, KeyError)",
        "return error.errno in (1, 2)",
        "if str(error): log('it said something')",
    ],
)
def test_a_function_that_only_shows_an_errors_text_is_allowed(body: str) -> None:
    assert not prose_in(
        f"def look(x):\n    try:\n        x()\n    except ValueError as error:\n        {body}\n"
    )
