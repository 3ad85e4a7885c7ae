"""Names of modules, files and members in texts: mypy sees none of them, and a
renaming misses them."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.documents import ROOT

DOTTED = re.compile(r"(?<![\w./@-])sharedpool(?:\.[A-Za-z_]\w*)+")
FILE = re.compile(r"`([\w/]+\.py)`")
MEMBER = re.compile(r"`([A-Z]\w+)\.(\w+)")
TEXTS = {".py", ".md", ".toml", ".ini", ".yaml", ".service", ".socket", ".conf", ".html", ".js"}
# Files and tables that are called after the project, and names that are made up.
NO_NAMES = {
    "sharedpool.service",
    "sharedpool.socket",
    "sharedpool.toml",
    "sharedpool.user",
    "sharedpool.test",
    "sharedpool.start_brocker",
    "sharedpool.limits",
    "sharedpool.shares",
}


def sources() -> Iterator[tuple[Path, str]]:
    """Return the project's files of text, without what tools leave in hidden folders."""
    for path in sorted(ROOT.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(ROOT).parts[:-1])
        if path.suffix in TEXTS and (not hidden or ".github" in path.parts):
            yield path.relative_to(ROOT), path.read_text()


TREE = {path: text for path, text in sources() if path.name != Path(__file__).name}
PYTHON = {path: text for path, text in TREE.items() if path.suffix == ".py"}


def resolves(name: str) -> bool:
    """Return True if a dotted name is a module of the package, or something in one."""
    parts = name.split(".")
    depth = max(
        depth
        for depth in range(1, len(parts) + 1)
        if (ROOT.joinpath(*parts[:depth])).is_dir()
        or ROOT.joinpath(*parts[:depth]).with_suffix(".py").exists()
    )
    if depth == len(parts):
        return True
    found = importlib.import_module(".".join(parts[:depth]))
    for part in parts[depth:]:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def members(owners: set[str]) -> dict[str, set[str]]:
    """Return the names in each of these classes, if the project has it."""
    found: dict[str, set[str]] = {}
    for text in PYTHON.values():
        if owners.isdisjoint(re.findall(r"\bclass (\w+)", text)):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.name in owners:
                names = found.setdefault(node.name, set())
                for each in ast.walk(node):
                    if isinstance(each, ast.FunctionDef):
                        names.add(each.name)
                    elif isinstance(each, ast.Attribute):
                        names.add(each.attr)
                    elif isinstance(each, ast.Name):
                        names.add(each.id)
    return found


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("sharedpool.broker.core", True),
        ("sharedpool.broker.core.slots", True),
        ("sharedpool.broker.core.slots.Slots.move", True),
        ("sharedpool.config_pool", True),
        ("sharedpool.nowhere", False),
        ("sharedpool.broker.core.slots.Nothing", False),
    ],
)
def test_a_name_is_looked_up_as_python_would(name: str, there: bool) -> None:
    assert resolves(name) is there


def test_every_dotted_name_is_one_of_the_package() -> None:
    names = {name for text in TREE.values() for name in DOTTED.findall(text)}
    assert len(names) > 100
    assert sorted(name for name in names - NO_NAMES if not resolves(name)) == []


def test_every_exception_is_still_needed() -> None:
    names = {name for text in TREE.values() for name in DOTTED.findall(text)}
    assert sorted(name for name in NO_NAMES if name not in names or resolves(name)) == []


def test_every_file_that_a_comment_names_exists() -> None:
    paths = [f"/{path}" for path in PYTHON]
    named = [(str(path), name) for path, text in PYTHON.items() for name in FILE.findall(text)]
    assert len(named) > 50
    assert [
        (path, name) for path, name in named if not any(p.endswith(f"/{name}") for p in paths)
    ] == []


def test_every_member_that_a_comment_names_exists() -> None:
    named = [
        (str(path), owner, name)
        for path, text in PYTHON.items()
        for owner, name in MEMBER.findall(text)
    ]
    known = members({owner for _, owner, _ in named})
    assert len(known) > 20
    # An owner that is not known is a class of a library.
    assert [each for each in named if each[2] not in known.get(each[1], {each[2]})] == []
