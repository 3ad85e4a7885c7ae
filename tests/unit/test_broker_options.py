"""The options of a broker: each is declared once, and every way to give it follows from that."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from sharedpool.broker.launch import config_file
from sharedpool.broker.launch.automatic import DEFAULT_LINGER_S, with_linger
from sharedpool.broker.settings import OPTIONS, BrokerSettings, Kind, Option
from sharedpool.cli.broker import broker
from sharedpool.cli.options import settings_from
from sharedpool.cli.run import run
from sharedpool.errors import ConfigError

VALUES = {Kind.COUNT: 3, Kind.SECONDS: 4.5, Kind.TEXT: "127.0.0.1:9187"}
ADDRESS = "ipc:///run/sharedpool/broker.sock"


def test_the_commands_have_every_option_by_its_flag_and_variable() -> None:
    declared = {(option.flag, option.variable) for option in OPTIONS}
    shared = {(option.flag, option.variable) for option in OPTIONS if not option.broker_only}
    for command, expected in ((broker, declared), (run, shared)):
        assert declared & {(each.opts[0], each.envvar) for each in command.params} == expected


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_what_a_file_gives_reaches_the_field(option: Option, tmp_path: Path) -> None:
    value = "dbname=app" if option.name == "dsn" else VALUES[option.kind]
    path = tmp_path / "sharedpool.toml"
    path.write_text(f"{option.name} = {value!r}\n")
    options = {"dsn": "dbname=app"} | config_file.read(path).options
    settings = settings_from(options, ADDRESS, "--bind")
    if option.name == "bind":  # the command decides between it and a socket that it was given
        assert settings.address == ADDRESS
    else:
        assert getattr(settings, option.field) == value


def test_what_is_not_given_has_the_fields_default() -> None:
    given = {option.name: None for option in OPTIONS} | {"dsn": "dbname=app"}
    assert settings_from(given, ADDRESS, "--bind") == BrokerSettings(ADDRESS, dsn="dbname=app")


def test_a_wrong_address_is_a_usage_error_that_names_its_option() -> None:
    with pytest.raises(click.UsageError, match="--metrics"):
        settings_from({"dsn": "dbname=app", "metrics": "nowhere"}, ADDRESS, "--bind")


def test_an_automatic_broker_takes_two_options_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for option in OPTIONS:
        monkeypatch.delenv(option.variable, raising=False)
    plain = BrokerSettings(ADDRESS)
    assert with_linger(plain) == BrokerSettings(ADDRESS, linger_s=DEFAULT_LINGER_S)
    for option in OPTIONS:
        monkeypatch.setenv(option.variable, "7")
    assert with_linger(plain) == BrokerSettings(ADDRESS, ttl_s=7.0, linger_s=7.0)
    monkeypatch.setenv("SHAREDPOOL_TTL", "-1")
    with pytest.raises(ConfigError, match="SHAREDPOOL_TTL: '-1' is not a positive number"):
        with_linger(plain)
