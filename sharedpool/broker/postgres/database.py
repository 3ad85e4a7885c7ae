"""Which database the control connection is in: while it is there nobody can drop, rename or copy that database.

What it asks and ends is the cluster's: any database will do. A broker that nobody has given a `--dsn` to goes to the
maintenance database, where it may, else to its pool's own. Never to template1: a session there blocks CREATE DATABASE.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import psycopg2
from psycopg2.extensions import connection, make_dsn, parse_dsn

from sharedpool.postgres.conninfo import connect_directly

logger = logging.getLogger("sharedpool.broker")

MAINTENANCE = "postgres"


class Database:
    """The way to the server. `dsn` is taken as it is, unless `maintenance`."""

    def __init__(self, dsn: str, *, maintenance: bool) -> None:
        self._dsns = [dsn]
        if maintenance and parse_dsn(dsn).get("dbname") != MAINTENANCE:
            self._dsns.insert(0, make_dsn(dsn, dbname=MAINTENANCE))

    @property
    def current(self) -> str:
        """The conninfo string of the database that is used, or tried first."""
        return self._dsns[0]

    def connect(self, defaults: Mapping[str, Any]) -> connection:
        """Connect to the first database that lets us in; from then on it is the first. Raise psycopg2's last error.

        Blocks for up to `connect_timeout` a database.
        """
        *others, last = self._dsns
        refusal = ""
        for dsn in others:
            try:
                return connect_directly(dsn, **defaults)
            except psycopg2.OperationalError as error:
                refusal = str(error).strip()
            except UnicodeDecodeError as error:  # in place of it, for words in another encoding
                refusal = error.object.decode("utf-8", "replace").strip()
        conn = connect_directly(last, **defaults)
        if others:
            text = "control connection: in database %r, since %r does not let us in (%s): nobody can drop it meanwhile"
            logger.info(text, conn.info.dbname, parse_dsn(others[0])["dbname"], refusal)
            self._dsns.reverse()
        return conn
