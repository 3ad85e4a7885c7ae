"""`sharedpool broker`: run a broker in the foreground."""

from __future__ import annotations

import logging
import os
from typing import Any

import click
from click.core import ParameterSource

from sharedpool.broker.core.group_terms import check_terms
from sharedpool.broker.launch import config_file
from sharedpool.broker.launch.config_file import ConfigFile
from sharedpool.broker.launch.run import serve
from sharedpool.broker.server.server import Server
from sharedpool.broker.server.systemd import activated
from sharedpool.broker.settings import BrokerSettings
from sharedpool.cli.logs import log_option, log_to_stderr
from sharedpool.cli.options import broker_options, settings_from
from sharedpool.discovery.address import default_address
from sharedpool.discovery.lock_file import AlreadyRunning
from sharedpool.errors import ConfigError, SharedPoolError

logger = logging.getLogger("sharedpool.broker")

_STRONGER_THAN_FILE = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def _read_config(ctx: click.Context, param: click.Parameter, path: str | None) -> ConfigFile | None:
    """Read the file, and make its options the defaults of the command's other options."""
    if path is None:
        return None
    try:
        file = config_file.read(path)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    ctx.default_map = file.options
    return file


@click.command()
@click.option(
    "--config",
    metavar="FILE",
    envvar="SHAREDPOOL_CONFIG",
    show_envvar=True,
    is_eager=True,
    callback=_read_config,
    show_default="none",
    help="A TOML file with these options (max_conn = 20) and the tables [groups.NAME]"
    " (min, max, priority) and [pools.NAME] (max_conn). The command line and the environment"
    " override it. SIGHUP has it read again.",
)
@broker_options()
@log_option
@click.pass_context
def broker(ctx: click.Context, /, config: ConfigFile | None, log_format: str, **given: Any) -> None:
    """Run a broker in the foreground, with its log on stderr, until SIGTERM or SIGINT.

    The broker then drains: it grants nothing more and has idle connections closed. It ends when the
    last lease is back, or after --drain-timeout. A second signal ends it at once. Connections that
    workers hold live on.

    Workers find the broker by SHAREDPOOL_BROKER=ADDRESS or config_pool(broker=ADDRESS).

    Under systemd the broker tells when it serves (Type=notify), and listens at the socket of its
    socket unit, if there is one.

    Exit status 0 after a stop, 1 when the address is in use or cannot be bound, 2 for a wrong
    option.
    """
    log_to_stderr(log_format)
    try:
        listener = activated()
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    settings = _settings(ctx, config, given, listener)
    address = settings.address

    def reread() -> BrokerSettings:
        assert config is not None
        try:
            return _settings(ctx, config_file.read(config.path), given, listener)
        except click.UsageError as error:
            raise ConfigError(error.message) from None

    try:
        server = Server(settings, reread if config is not None else None)
    except AlreadyRunning as error:
        raise click.ClickException(f"{error}: use another --bind, or stop that one") from None
    except SharedPoolError as error:
        raise click.ClickException(str(error)) from None
    hint = f"workers find it with: export SHAREDPOOL_BROKER={address}"
    if log_format == "text":
        click.echo(hint, err=True)
    else:
        logger.info("%s", hint)
    serve(server, reloads=config is not None)


def _settings(
    ctx: click.Context,
    file: ConfigFile | None,
    given: dict[str, Any],
    listener: tuple[int, str] | None,
) -> BrokerSettings:
    """Return the settings that follow from the options and the file. Raise click's usage error.

    `listener` is the socket that the broker was started with, and its address.
    """
    if file is not None:
        # `given` has the file's values as they were at the start: take them as they are now.
        weaker = {
            name for name in given if ctx.get_parameter_source(name) not in _STRONGER_THAN_FILE
        }
        given = given | {name: file.options.get(name) for name in weaker}
        if given["max_conn"] is None:
            raise click.UsageError(f"max_conn: not in {file.path} any more")
    groups, limits = (file.groups, file.limits) if file is not None else ({}, {})
    try:
        if given["bind"] and listener is not None and listener[1] != given["bind"]:
            raise ConfigError(
                f"--bind {given['bind']}: the service manager's socket is at {listener[1]}"
            )
        address = given["bind"] or (listener[1] if listener is not None else default_address())
        check_terms(groups, given["max_conn"])
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    return settings_from(
        given,
        address,
        "--bind",
        groups=groups,
        limits=limits,
        notify=os.environ.get("NOTIFY_SOCKET", ""),
        listener=None if listener is None else listener[0],
    )


@click.command(name="check-config")
@click.argument("file", metavar="FILE")
def check_config(file: str) -> None:
    """Check a broker's configuration FILE and print what it sets.

    Exit status 2 when something is wrong: all mistakes are printed.
    """
    try:
        found = config_file.read(file)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    for name, value in found.options.items():
        shown = "(given)" if name == "dsn" else value  # a dsn may hold a password
        click.echo(f"{name}: {shown}")
    if "max_conn" not in found.options:
        click.echo("max_conn: not in the file, so give --max-conn or SHAREDPOOL_MAX_CONN")
    for name, group in found.groups.items():
        most = "no limit of its own" if group.max_conn is None else f"at most {group.max_conn}"
        click.echo(f"group {name!r}: {group.reserved} reserved, {most}, priority {group.priority}")
    for name, limit in found.limits.items():
        click.echo(f"pool {name!r}: at most {limit}")
