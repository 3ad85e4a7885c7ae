"""`sharedpool broker`: run a broker in the foreground."""

from __future__ import annotations

import os
from dataclasses import replace

import click

from sharedpool.broker.launch import serve
from sharedpool.broker.lock import AlreadyRunning
from sharedpool.broker.server import Server
from sharedpool.broker.systemd import activated
from sharedpool.cli.options import SECONDS, broker_options, log_to_stderr, settings_from
from sharedpool.errors import ConfigError, SharedPoolError
from sharedpool.wire.address import default_address


@click.command()
@broker_options
@click.option(
    "--bind",
    envvar="SHAREDPOOL_BIND",
    show_envvar=True,
    help="Address: ipc:///path/to.sock or tcp://host:port.  [default: broker.sock in the user's runtime directory]",
)
@click.option(
    "--linger",
    type=SECONDS,
    envvar="SHAREDPOOL_LINGER",
    show_envvar=True,
    help="Leave when nobody has used it for so many seconds.  [default: stay]",
)
@click.option(
    "--drain-timeout",
    type=SECONDS,
    default=10.0,
    show_default=True,
    envvar="SHAREDPOOL_DRAIN_TIMEOUT",
    show_envvar=True,
    help="How long to wait for leases to come back after SIGTERM or SIGINT.",
)
def broker(
    max_conn: int,
    expiration: float | None,
    max_checkout: float | None,
    dsn: str | None,
    ttl: float,
    metrics: str | None,
    bind: str | None,
    linger: float | None,
    drain_timeout: float,
) -> None:
    """Run a broker in the foreground, logging to stderr, until SIGTERM or SIGINT.

    Then it drains: it lends nothing any more, has idle connections closed, and ends when the last lease is back, or
    after --drain-timeout; a second signal ends it at once. No connection that a worker holds is broken by its end.

    Under systemd it says when it serves (Type=notify), and listens at the socket it was started with, if any.

    Workers find it by SHAREDPOOL_BROKER=ADDRESS, or config_pool(broker=ADDRESS). Exit status 0 after a stop, 1 when
    another broker has the address or it cannot be bound, 2 for a wrong option.
    """
    log_to_stderr()
    try:
        listener, given = activated() or (None, "")
        if bind and given not in ("", bind):
            raise ConfigError(f"--bind {bind}: the socket that the broker was started with is {given}")
        address = bind or given or default_address()
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    settings = settings_from(address, "--bind", max_conn, expiration, max_checkout, dsn, ttl, metrics, linger)
    notify = os.environ.get("NOTIFY_SOCKET", "")
    server = Server(replace(settings, drain_timeout_s=drain_timeout, notify=notify, listener=listener))
    try:
        server.bind()
    except AlreadyRunning as error:
        raise click.ClickException(f"{error}: use another --bind, or stop that one") from None
    except SharedPoolError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"workers find it with: export SHAREDPOOL_BROKER={address}", err=True)
    serve(server)
