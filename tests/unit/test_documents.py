"""The documents are true of the program: links, tables, commands and names lead somewhere, and
nothing is missing."""

import ast
import inspect
import re
import shlex
from pathlib import Path
from typing import get_args

import click
import pytest

import sharedpool
from sharedpool import errors
from sharedpool.broker.core.slot_states import TRANSITIONS
from sharedpool.broker.metrics import prometheus
from sharedpool.cli import _COMMANDS, main
from sharedpool.wire import desk, messages
from tests.bench import pictures
from tests.support import documents
from tests.support.documents import ARCHITECTURE, DOCUMENTS, EXAMPLES, ON_CALL, README, ROOT

LINES, WORDS = 220, 1800


def test_the_readme_is_short_enough_to_be_read() -> None:
    text = documents.text(README)
    assert len(text.splitlines()) <= LINES
    assert len(text.split()) <= WORDS


# --- links


def anchors(document: str) -> set[str]:
    """The names of a document's headings, as code hosts make them."""
    headings = re.findall(
        r"^#+ (.*)$", documents.without_code(documents.text(document)), flags=re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_document_is_known_to_the_tests() -> None:
    ours = {"README.md", "examples", "sharedpool", "tests", ".github", "CHANGELOG.md"}
    found = {
        str(path.relative_to(ROOT))
        for place in ours
        for path in [ROOT / place, *(ROOT / place).rglob("*.md")]
    }
    assert {name for name in found if name.endswith(".md")} == set(DOCUMENTS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    found = re.findall(r"\]\(([^)\s]+)\)", documents.without_code(documents.text(document)))
    assert found
    for link in found:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(str(target.resolve().relative_to(ROOT))), link


def test_every_document_is_reached_from_the_readme() -> None:
    reached, new = set(), {README}
    while new:
        reached |= new
        links = [
            (ROOT / document).parent / link.partition("#")[0]
            for document in new
            for link in re.findall(r"\]\(([^)\s]+)\)", documents.text(document))
            if not link.startswith(("https://", "#"))
        ]
        new = {
            str(path.resolve().relative_to(ROOT)) for path in links if path.suffix == ".md"
        } - reached
    assert reached == set(DOCUMENTS)


# --- code


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_in_a_document_can_be_compiled_and_names_what_there_is(document: str) -> None:
    for code in documents.blocks(documents.text(document), "python"):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            match node:
                case ast.ImportFrom(module=str(module), names=imported) if module.startswith(
                    "sharedpool."
                ):
                    source = ast.parse(
                        (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
                    )
                    defined = {
                        each.name
                        for each in source.body
                        if isinstance(each, ast.ClassDef | ast.FunctionDef)
                    }
                    assert {alias.name for alias in imported} <= defined | {"*"}
                case ast.Attribute(value=ast.Name(id="sharedpool"), attr=name):
                    assert hasattr(sharedpool, name), name
                case ast.Attribute(value=ast.Name(id="pool"), attr=name):
                    assert hasattr(sharedpool.Pool, name) or name == "max_conn", name
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="sharedpool"), attr="config_pool"),
                    keywords=given,
                ):
                    takes = inspect.signature(sharedpool.config_pool).parameters.keys() | {
                        "host",
                        "dbname",
                        "user",
                    }
                    assert {keyword.arg for keyword in given} <= takes | {"password"}


def commands(document: str) -> list[list[str]]:
    """The `sharedpool` command lines of a document: in pieces of shell, and in its text."""
    text = documents.text(document)
    lines = [line for code in documents.blocks(text, "sh") for line in code.splitlines()]
    lines += [piece for piece in documents.quoted(text) if not piece.startswith("sharedpool.")]
    parts = [
        shlex.split(part, comments=True) for line in lines for part in re.split(r"&&|\|", line)
    ]
    named = [part for part in parts if part and Path(part[0]).name == "sharedpool"]
    return [
        part[1 : part.index("--")] if "--" in part else part[1:] for part in named if len(part) > 1
    ]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_a_document_are_commands(document: str) -> None:
    for words in commands(document):
        if words[0] not in _COMMANDS and not words[0].islower():
            continue  # the name of a pool: `sharedpool NAME [xxxxxxxx]`
        command: click.Command | None = main
        context = click.Context(main)
        rest = list(words)
        while isinstance(command, click.Group) and rest:
            command = command.get_command(context, rest.pop(0))
        assert command is not None, words
        known = {name for option in command.params for name in option.opts}
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known, words


def test_there_are_commands_to_look_at() -> None:
    assert [words[0] for words in commands(README)].count("pause") == 1
    assert {words[0] for words in commands(ON_CALL)} >= {
        "run",
        "broker",
        "who",
        "set",
        "kill",
        "check-config",
    }


# --- nothing is missing


def test_every_error_is_explained() -> None:
    named = {
        name
        for row in documents.rows(ON_CALL, "| error | when |")
        for name in documents.quoted(row[0])
    }
    ours = {
        name
        for name, each in vars(errors).items()
        if isinstance(each, type) and each.__module__ == errors.__name__
    }
    assert named == ours - {"SharedPoolError"}  # their parent


def test_every_metric_is_listed() -> None:
    listed = {
        name
        for row in documents.rows(ON_CALL, "| metric | meaning |")
        for name in documents.quoted(row[0])
    }
    source = inspect.getsource(prometheus)
    named = {
        f"db_client_connection_{name}" for name in re.findall(r'_PREFIX \+ "(\w+)",\s+"', source)
    }
    named |= {
        f"db_client_connection_{name}" for name in re.findall(r'"(\w+_time_seconds)"', source)
    }
    assert listed == named | set(re.findall(r'\(\s*"(sharedpool_\w+)"', source))


def test_every_variable_of_the_environment_is_explained() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "sharedpool").rglob("*.py"))
    used = set(re.findall(r"\bSHAREDPOOL_[A-Z_]*[A-Z]\b", sources))
    assert used <= set(re.findall(r"\bSHAREDPOOL_[A-Z_]*[A-Z]\b", documents.text(ON_CALL)))


def test_every_example_is_in_the_table() -> None:
    links = set(re.findall(r"\]\(([^)#\s]+)\)", documents.text(EXAMPLES)))
    covered = {link.removesuffix("/") for link in links}
    for path in (ROOT / "examples").rglob("*"):
        name = str(path.relative_to(ROOT / "examples"))
        if path.is_dir() or "__pycache__" in name or name.startswith(("pictures/", "README")):
            continue
        assert any(name == each or name.startswith(f"{each}/") for each in covered), name


def test_the_states_of_a_slot_are_those_of_the_program() -> None:
    told = documents.rows(ARCHITECTURE, "| state | meaning | it may become |")
    states = {row[0]: set(re.findall(r"`([A-Z]+)`", row[2])) for row in told}
    assert states == {f"`{old.name}`": {new.name for new in to} for old, to in TRANSITIONS.items()}


def test_every_message_is_in_the_figure() -> None:
    told = documents.section(ARCHITECTURE, "Messages")
    words = set(re.findall(r"\b[A-Z][A-Z_]+\b", told))
    unions = (messages.ToBroker, messages.ToWorker, desk.ToDesk, desk.FromDesk | desk.Moved)
    tags = {each.__struct_config__.tag.upper() for union in unions for each in get_args(union)}
    assert tags <= words
    assert words - tags <= {"TTL", "STATUS", "ORDER"}


def test_every_folder_of_tests_is_explained() -> None:
    told = {
        cell
        for row in documents.rows("tests/README.md", "| folder | what it proves | time |")
        for cell in row[:1]
    }
    folders = {
        path.name
        for path in (ROOT / "tests").iterdir()
        if path.is_dir() and any(path.glob("test_*.py"))
    }
    assert {re.sub(r"\W", "", cell.split("]")[0]) for cell in told} >= folders


def test_every_folder_of_the_program_is_on_the_map() -> None:
    told = set(re.findall(r"\]\(([^)#\s]+)\)", documents.section(ARCHITECTURE, "Map of the code")))
    package = ROOT / "sharedpool"
    folders = {str(path.parent.relative_to(package)) for path in package.rglob("*.py")} - {"."}
    assert folders - {"integrations/django"} == {name for name in told if (package / name).is_dir()}


# --- pictures


def test_the_plot_is_of_the_tables_figures() -> None:
    text = pictures.README.read_text()
    throughputs, latencies = pictures.contended(text)
    assert (len(throughputs), len(latencies)) == (6, 3)
    assert pictures.PICTURE.read_text() == pictures.draw(throughputs, latencies), (
        "run python tests/bench/pictures.py"
    )


def test_the_readmes_figures_are_the_tables() -> None:
    told = documents.section(README, "Is it for you?")
    faults, bench = (
        documents.text("tests/faults/README.md"),
        documents.text("tests/bench/README.md"),
    )
    throughputs, latencies = pictures.contended(bench)
    words = " ".join(told.split())
    few, some, many = (each.ratio for each in throughputs[:3])
    slow, slower, slowest = (each.ratio for each in latencies)
    assert f"reach {few}, {some} and {many} × PgBouncer's throughput" in words
    assert f"at {slow}, {slower} and {slowest} × its p99" in words
    assert f"{min(few, some, many)} to {max(few, some, many)} × PgBouncer" in words
    assert f"reach {throughputs[-1].ratio} × PgBouncer's throughput" in words  # under TLS
    for figure in ("0.76 µs", "0.69 µs", "7.2 MB", "40 MB"):
        assert figure in told
        assert figure in bench
    assert "32,400 faults" in told
    assert "32,400 faults" in faults
