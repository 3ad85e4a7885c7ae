"""The documents' tables of options are complete, and what the documents show to be run does what
they say."""

import functools
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import psycopg2
import pytest

import sharedpool
from sharedpool.cli import _COMMANDS, main
from tests.support import automatic_broker, documents
from tests.support.documents import EXAMPLES, ON_CALL, README
from tests.support.processes import LONG, BackendSampler

# Given where to connect, not how the pool works: one row for all of them.
WHERE = {"dsn", "db_url", "connect_kwargs"}
# Flags and addresses that the text explains where it shows the command.
ASIDE = {"help", "address", "as_json", "command"}


def test_every_argument_of_config_pool_is_listed_with_its_default() -> None:
    listed = {
        name: default
        for name, default, _ in documents.rows(ON_CALL, "| argument | default | meaning |")
    }
    parameters = inspect.signature(sharedpool.config_pool).parameters
    named = {
        re.split(r"\W", name.strip("`"))[0]: default.strip('`"') for name, default in listed.items()
    }
    assert named.keys() - WHERE == parameters.keys() - WHERE
    assert any("`dsn`, `db_url`, keywords" in name for name in listed)
    for name in parameters.keys() - WHERE:
        default = parameters[name].default
        shown = (
            default.__name__
            if isinstance(default, type)
            else f"{default:g}"
            if name == "timeout"
            else str(default)
        )
        assert named[name] == shown, name


def option_row(option: click.Option, commands: str) -> list[str]:
    """Return the row of the table that an option's declaration makes. An empty `commands`: all."""
    value = option.metavar
    if isinstance(option.type, click.Choice):
        value = "/".join(option.type.choices)
    default = option.show_default if isinstance(option.show_default, str) else option.default
    if isinstance(default, float):
        default = f"{default:g}"
    return [
        f"`{option.opts[0]} {value}`",
        f"`{option.envvar}`",
        "required" if option.required else str(default),
        f"{commands}{option.help}",
    ]


def test_the_table_of_a_brokers_options_is_as_they_are_declared() -> None:
    context = click.Context(main)
    found = {}
    for name in ("broker", "run"):
        command = main.get_command(context, name)
        assert command is not None
        found[name] = {each.opts[0]: each for each in command.params if each.name not in ASIDE}
    assert found["run"].keys() < found["broker"].keys()
    declared = [
        option_row(option, "" if flag in found["run"] else "`broker` only. ")
        for flag, option in found["broker"].items()
        if isinstance(option, click.Option)
    ]
    assert documents.rows(ON_CALL, "| option | variable | default | meaning |") == declared


@pytest.mark.parametrize("command", _COMMANDS)
def test_every_command_and_option_is_told_to_operators(command: str) -> None:
    told = documents.text(ON_CALL)
    assert f"sharedpool {command}" in told
    found = main.get_command(click.Context(main), command)
    assert found is not None
    if command != "demo":  # whose --help explains what nobody needs
        for option in found.params:
            if isinstance(option, click.Option):
                assert option.opts[0] in told, option.opts[0]


@pytest.fixture
def books(database: str, runtime_dir: Path) -> Iterator[str]:
    """A database with the table that the documents' pieces use, and no broker."""
    with closing(psycopg2.connect(database)) as conn, conn, conn.cursor() as cursor:
        cursor.execute("CREATE TABLE books (id serial, name text, price int)")
    with automatic_broker.seen_off():
        yield database


def test_the_quick_start_is_one_pool_however_often_it_is_started(
    books: str, runtime_dir: Path
) -> None:
    (script,) = documents.blocks(documents.section(README, "Quick start"), "python")
    count, limit = (40, 20) if LONG else (12, 6)
    assert "max_conn=20" in script
    script = script.replace("max_conn=20", f"max_conn={limit}")
    url = 'db_url="postgres://app:secret@localhost/app"'
    assert url in script
    script = script.replace(url, f"dsn={books!r}").replace(
        "timeout=5", "timeout=60"
    )  # many at once, on any machine
    start = functools.partial(
        subprocess.Popen, [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    )
    with BackendSampler(books, "sharedpool default [%") as sampler:
        started = [start() for _ in range(count)]
        said = [process.communicate(timeout=100)[0] for process in started]
    assert said == ["(0,)\n"] * count
    assert 1 <= sampler.peak <= limit
    (log,) = (runtime_dir / "sharedpool").glob("*.log")
    assert log.read_text().count("enforces") == 1


def test_the_lines_on_pgsimple_work_as_they_stand(books: str) -> None:
    (lines,) = documents.blocks(documents.section(EXAMPLES, "PgSimple"), "python")
    pool = sharedpool.config_pool(dsn=books)
    found: dict[str, Any] = {"pool": pool, "sharedpool": sharedpool}
    try:
        exec(lines, found)
        assert [tuple(book) for book in found["books"]] == [(found["row"].id, "x")]
        with sharedpool.PgSimple() as db:  # takes get_pool()
            assert tuple(db.fetchone("books")) == (found["row"].id, "y", 3)
    finally:
        pool.release_all()
