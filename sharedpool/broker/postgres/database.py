"""Which database the control connection uses: nobody can drop, rename or copy it meanwhile.

All that the broker asks and does concerns the whole server, so any database will do. A broker that
was started without `--dsn` uses the maintenance database if it is let in, otherwise its pool's own.
It never uses template1, where a session blocks CREATE DATABASE.
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
    """The databases to try; `maintenance`: the maintenance database before that of `dsn`."""

    def __init__(self, dsn: str, *, maintenance: bool) -> None:
        self._dsns = [dsn]
        if maintenance and parse_dsn(dsn).get("dbname") != MAINTENANCE:
            self._dsns.insert(0, make_dsn(dsn, dbname=MAINTENANCE))

    @property
    def current(self) -> str:
        """The conninfo string of the database that is used, or tried first."""
        return self._dsns[0]

    def connect(self, defaults: Mapping[str, Any]) -> connection:
        """Connect to the first database that lets us in; it is tried first from then on.

        Blocks for up to `connect_timeout` per database. Raise psycopg2's error for the last one.
        """
        *others, last = self._dsns
        refusal = ""
        for dsn in others:
            try:
                return connect_directly(dsn, **defaults)
            except psycopg2.OperationalError as error:
                refusal = str(error).strip()
            except UnicodeDecodeError as error:  # psycopg2 raises it for a text in another encoding
                refusal = error.object.decode("utf-8", "replace").strip()
        conn = connect_directly(last, **defaults)
        if others:
            text = (
                "control connection: in database %r, since %r does not let us in (%s): nobody can"
                " drop it meanwhile"
            )
            logger.info(text, conn.info.dbname, parse_dsn(others[0])["dbname"], refusal)
            self._dsns.reverse()
        return conn
