"""What a connection tells its user of the server, when another process has opened its session.

libpq knows here only the stub server that the shell was built with (`stub_server.py`). So the facts
come along with the session.
"""

from __future__ import annotations

from typing import Any

import msgspec
import psycopg2
from psycopg2 import extensions

from sharedpool.postgres import libpq
from sharedpool.postgres.conninfo import SECRET
from sharedpool.worker.connection.pooled import PooledConnection


class ServerFacts(msgspec.Struct, frozen=True, array_like=True):
    """A session's server and login, as the process that opened it knew them. No secrets."""

    user: str
    dbname: str
    host: str
    port: int
    options: str
    used_password: bool
    dsn: str
    parameters: dict[str, str]


_encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(ServerFacts).decode


def facts_of(conn: PooledConnection) -> bytes:
    """Return the facts on a connection that this process has opened, encoded."""
    info = extensions.ConnectionInfo(conn)
    # Not from psycopg2: it would refuse, as the connection is closed to its former user.
    parameters = {
        name: value for name, value in libpq.parameters_of(conn).items() if not SECRET.search(name)
    }
    dsn = conn.dsn
    given = extensions.parse_dsn(dsn)
    # psycopg2 hides the password alone.
    if hidden := [name for name in given if name != "password" and SECRET.search(name)]:
        dsn = extensions.make_dsn(**(given | dict.fromkeys(hidden, "xxx")))
    host, port, options = info.host or "", info.port or 0, info.options or ""
    return _encode(
        ServerFacts(
            info.user, info.dbname, host, port, options, info.used_password, dsn, parameters
        )
    )


class AdoptedInfo(extensions.ConnectionInfo):
    """psycopg2's `ConnectionInfo` for a connection whose session another process has opened."""

    def __init__(self, conn: PooledConnection, names: ServerFacts) -> None:
        super().__init__(conn)
        self._conn, self._names = conn, names

    @property
    def backend_pid(self) -> int:
        """The process id of the server's process for this session."""
        return self._conn.get_backend_pid()

    @property
    def dsn_parameters(self) -> dict[str, str]:
        """The parameters that it was opened with, defaults included, without secrets."""
        return dict(self._names.parameters)

    @property
    def password(self) -> str:
        """The password, if the pool's settings have one that does not change."""
        local = self._conn.sharedpool_local
        return (
            ""
            if local is None
            else extensions.parse_dsn(local.config.conninfo.dsn).get("password", "")
        )

    @property
    def needs_password(self) -> bool:
        """Whether the server asked for a password and got none. It has not: the session is open."""
        return False


def _named(name: str) -> property:
    def get(info: AdoptedInfo) -> Any:
        return getattr(info._names, name)

    return property(get, doc=getattr(extensions.ConnectionInfo, name).__doc__)


for _name in ("user", "dbname", "host", "port", "options", "used_password"):
    setattr(AdoptedInfo, _name, _named(_name))


def refuse_cancel(conn: PooledConnection) -> None:
    """Raise the error that psycopg2 raises if nothing can be cancelled."""
    if conn.closed:
        raise psycopg2.InterfaceError("connection already closed")
    if conn.status == extensions.STATUS_PREPARED:
        raise psycopg2.ProgrammingError(
            "cancel cannot be used with a prepared two-phase transaction"
        )
