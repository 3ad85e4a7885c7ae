"""README's tables of options are complete: they name what `config_pool` and the commands take, and their defaults."""

import inspect
import re
from pathlib import Path

import click
import pytest

import sharedpool
from sharedpool.cli import _COMMANDS, main

README = (Path(__file__).parents[2] / "README.md").read_text()
# Given where to connect, not how the pool works: one row for all of them.
WHERE = {"dsn", "db_url", "connect_kwargs"}
# Flags and addresses that the text explains where it shows the command.
ASIDE = {"help", "address", "as_json", "command"}


def rows(header: str) -> list[list[str]]:
    """The rows of the table with that header, as cells."""
    lines = README.split(header + "\n")[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_argument_of_config_pool_is_listed_with_its_default() -> None:
    listed = {name: default for name, default, _ in rows("| argument | default | meaning |")}
    parameters = inspect.signature(sharedpool.config_pool).parameters
    named = {re.split(r"\W", name.strip("`"))[0]: default.strip('`"') for name, default in listed.items()}
    assert named.keys() - WHERE == parameters.keys() - WHERE
    assert any("`dsn`, `db_url`, keywords" in name for name in listed)
    for name in parameters.keys() - WHERE:
        default = parameters[name].default
        shown = default.__name__ if isinstance(default, type) else f"{default:g}" if name == "timeout" else str(default)
        assert named[name] == shown, name


@pytest.mark.parametrize("command", ["broker", "run"])
def test_every_option_of_a_broker_is_listed_with_its_variable(command: str) -> None:
    listed = {option.split()[0].strip("`"): (variable.strip("`"), text) for option, variable, text in
              rows("| option | variable | meaning |")}  # fmt: skip
    context = click.Context(main)
    found = main.get_command(context, command)
    other = main.get_command(context, "run" if command == "broker" else "broker")
    assert found is not None
    assert other is not None
    shared = {parameter.name for parameter in other.params}
    options = [each for each in found.params if isinstance(each, click.Option) and each.name not in ASIDE]
    for option in options:
        variable, text = listed[option.opts[0]]
        assert variable == option.envvar
        assert ("`broker` only" in text) == (option.name not in shared), option.name
    if command == "broker":
        assert listed.keys() == {option.opts[0] for option in options}


@pytest.mark.parametrize("command", _COMMANDS)
def test_every_command_and_option_is_in_readme(command: str) -> None:
    assert f"sharedpool {command}" in README
    found = main.get_command(click.Context(main), command)
    assert found is not None
    if command != "demo":  # whose --help explains what nobody needs
        for option in found.params:
            if isinstance(option, click.Option):
                assert option.opts[0] in README, option.opts[0]
