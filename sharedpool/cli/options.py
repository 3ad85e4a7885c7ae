"""Options that several subcommands share, and what they become: a `BrokerSettings`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from sharedpool.broker.launch.run import control_dsn
from sharedpool.broker.settings import BrokerSettings
from sharedpool.discovery import address as addresses
from sharedpool.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])


class Seconds(click.ParamType[float]):
    """A positive number of seconds."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            seconds = float(value)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds < 1e9:
            self.fail(f"{value!r} is not a positive number of seconds", param, ctx)
        return seconds


SECONDS = Seconds()


def broker_options(command: F) -> F:
    """Add the options that say what a broker enforces."""
    options = [
        click.option(
            "--max-conn",
            type=click.IntRange(min=1),
            required=True,
            envvar="SHAREDPOOL_MAX_CONN",
            show_envvar=True,
            help="Connections to PostgreSQL, over all pools and processes.",
        ),
        click.option(
            "--expiration",
            type=SECONDS,
            envvar="SHAREDPOOL_EXPIRATION",
            show_envvar=True,
            help="Longest time that a connection may lie idle; pools may ask for less.",
        ),
        click.option(
            "--max-checkout",
            type=SECONDS,
            envvar="SHAREDPOOL_MAX_CHECKOUT",
            show_envvar=True,
            help="Report a connection that is checked out for longer, with its holder.  [default: off]",
        ),
        click.option(
            "--dsn",
            envvar="SHAREDPOOL_DSN",
            show_envvar=True,
            help="Conninfo or URL for the one control connection, which confirms that dead workers' backends are gone."
            "  [default: DATABASE_DSN, DATABASE_URL, libpq's environment]",
        ),
        click.option(
            "--ttl",
            type=SECONDS,
            default=15.0,
            show_default=True,
            envvar="SHAREDPOOL_TTL",
            show_envvar=True,
            help="Silence after which a worker's connections are suspect; heartbeats come at least twice in it.",
        ),
        click.option(
            "--metrics",
            envvar="SHAREDPOOL_METRICS",
            show_envvar=True,
            help="Serve Prometheus metrics and a status page there: 127.0.0.1:9187.  [default: nowhere]",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def settings_from(
    address: str,
    source: str,
    max_conn: int,
    expiration: float | None,
    max_checkout: float | None,
    dsn: str | None,
    ttl: float,
    metrics: str | None,
    linger: float | None = None,
) -> BrokerSettings:
    """Return the settings; raise click's usage error where `ConfigError` tells of a wrong value."""
    try:
        addresses.check_address(address, source)
        if metrics:
            addresses.check_metrics_address(metrics, "--metrics")
        return BrokerSettings(
            address,
            max_conn,
            control_dsn(dsn),
            expiration,
            max_checkout or 0.0,
            ttl,
            linger,
            metrics=metrics or "",
        )
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
