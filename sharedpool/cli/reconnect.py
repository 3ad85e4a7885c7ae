"""`sharedpool reconnect`: have every worker replace its connections."""

from __future__ import annotations

import click

from sharedpool.cli.asking import broker_option, find_brokers, from_each, line_to
from sharedpool.wire.messages import PROTOCOL_VERSION
from sharedpool.wire.reports import Reconnect, Reconnected


@click.command()
@broker_option
@click.option("--pool", "name", default="", help="Only this pool.  [default: all]")
def reconnect(address: str | None, name: str) -> None:
    """Have every worker replace its connections: what is open now is closed at its next checkout or checkin.

    For a new password, a new certificate, or a server that moved. Nothing in use is broken; a connection that lies idle
    is closed at once. Doing it again does no harm.

    Without an address: at every broker in the user's runtime directory. Exit status 1 when there is no such pool, 3
    when no broker answers.
    """

    def ask(address: str) -> Reconnected:
        with line_to(address) as line:
            return line.ask(Reconnect(PROTOCOL_VERSION, name), Reconnected)

    answers = from_each(find_brokers(address), ask)
    done = [generation for answer in answers for generation in answer.pools]
    for each in done:
        click.echo(
            f"pool {each.pool!r}: generation {each.generation}: {each.connections} connections are replaced at their"
            " next checkout or checkin"
        )
    if not done and name:
        known = ", ".join(repr(pool) for answer in answers for pool in answer.known) or "none"
        raise click.ClickException(f"no pool {name!r} at this broker; there are: {known}")
    if not done:
        click.echo("no pool is in use: nothing to replace")
