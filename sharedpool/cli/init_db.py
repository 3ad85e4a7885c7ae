"""`sharedpool init-db`: make the tables in which hosts share limits."""

from __future__ import annotations

from contextlib import closing

import click
import psycopg2
from psycopg2.extensions import parse_dsn

from sharedpool.broker.launch.run import control_dsn
from sharedpool.broker.postgres.share_schema import SCHEMA_SQL, create
from sharedpool.errors import ConfigError
from sharedpool.postgres.conninfo import connect_directly


@click.command("init-db")
@click.option(
    "--dsn",
    metavar="DSN",
    show_default="DATABASE_DSN, DATABASE_URL, libpq's environment",
    help="The database that the workers use, as a role that may create a schema in it.",
)
@click.option("--print", "only_print", is_flag=True, help="Print the SQL, and run nothing.")
def init_db(dsn: str | None, only_print: bool) -> None:
    """Make the tables by which the brokers of several hosts share one limit.

    Brokers make them by themselves where their role may create a schema in the database. Elsewhere
    an administrator runs this command once, or the SQL that it prints. Every role that uses
    sharedpool may then use the tables, and sees its own rows only. Running it again does no harm.

    Exit status 0 when the tables are there, 1 when the server refuses, 2 for a wrong option.
    """
    if only_print:
        click.echo(SCHEMA_SQL, nl=False)
        return
    try:
        where = control_dsn(dsn)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    if where is None:
        raise click.UsageError("no database: give --dsn, or set DATABASE_DSN or DATABASE_URL")
    try:
        defaults = {} if "connect_timeout" in parse_dsn(where) else {"connect_timeout": "10"}
        with closing(connect_directly(where, **defaults)) as conn:
            create(conn)
            info = conn.info
            click.echo(f"database {info.dbname!r}: brokers of all hosts can share limits here")
    except psycopg2.Error as error:
        raise click.ClickException(str(error).strip()) from None
