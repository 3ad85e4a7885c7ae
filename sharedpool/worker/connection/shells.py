"""One pool's *shells* in a process: connection objects without a session, to adopt sessions into.

A connection object becomes a shell when its session is given away (`handover.vacate`). Where none
is in stock, a shell is built: libpq connects to a server of our own that says what PostgreSQL says
at a start (`stub_server.py`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import psycopg2
from psycopg2 import extensions

from sharedpool.descriptors.available import FOR_A_SHELL, require
from sharedpool.descriptors.owned import is_still
from sharedpool.wire.desk import Live
from sharedpool.worker.connection import renewal, stub_server
from sharedpool.worker.connection.closing import abandon, descriptor_of, keep_forever
from sharedpool.worker.connection.connection import pooled_class
from sharedpool.worker.connection.handover import decode_parameters, role_in, vacate
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.server_facts import decode
from sharedpool.worker.connection.stub_server import StubServer

# Settings from the user's environment or service file that the stub does not offer, by libpq
# version.
_KEYWORDS = {
    "connect_timeout": str(round(stub_server.LIMIT_S)), "hostaddr": "", "requirepeer": "",
    "target_session_attrs": "any", "sslmode": "disable", "sslrootcert": "",
    "gssencmode": "disable", "channel_binding": "disable",
    **({"require_auth": ""} if extensions.libpq_version() >= 160000 else {}),
    **({"sslnegotiation": "postgres"} if extensions.libpq_version() >= 170000 else {}),
}  # fmt: skip


def _keeps_nothing(factory: object) -> bool:
    """Return True if a class's objects keep nothing of a session: they can be used for another."""
    if factory in (None, extensions.connection):
        return True
    from psycopg2 import extras  # half a megabyte, and loaded already if this is a class of it

    return factory in (
        extras.DictConnection,
        extras.RealDictConnection,
        extras.NamedTupleConnection,
    )


class Shells:
    """The shells in stock, by the session parameters that their libpq knows.

    As many are kept as connections were held at once since the last `trim`: each of those may
    leave, and another come in its place.
    """

    def __init__(self, keywords: Mapping[str, Any]) -> None:
        """Take the classes of connection and cursor from `keywords`, psycopg2's own."""
        self._cursor_factory = keywords.get("cursor_factory")
        self._factory = pooled_class(keywords.get("connection_factory"))
        # False for a user's own class, whose code runs whenever a shell is built.
        self.are_known = _keeps_nothing(keywords.get("connection_factory"))
        self._lock = threading.Lock()
        self._stock: OrderedDict[bytes, list[PooledConnection]] = OrderedDict()
        self._needed = 1

    def __len__(self) -> int:
        # Counted anew: an interrupt between a number and the list would leave it wrong for ever.
        return sum(map(len, self._stock.values()))

    def take(self, live: Live, held: int) -> PooledConnection:
        """Return a shell for a session; it looks like a connection just opened.

        Takes less than a millisecond if one has to be built. `held` is the number of connections in
        this process, this one included. Raise `psycopg2.Error` or `OSError` if none can be built,
        and `SharedPoolError`, or an `OSError` that says so, if only descriptors are lacking.
        """
        parameters = decode_parameters(live.parameters)
        while (shell := self._pop(live.parameters, held)) is not None:
            if not is_still(descriptor_of(shell), shell.sharedpool_known):
                keep_forever(shell)
                continue
            if renewal.renew(shell, parameters, self._cursor_factory):
                break
            abandon(shell)
        else:
            try:
                shell = self._build(parameters, live)
            except psycopg2.Error:
                # libpq's error does not tell whether it lacked descriptors.
                require(FOR_A_SHELL, "an empty connection")
                raise
            renewal.at_start(shell)
        shell.sharedpool_made_with = live.parameters
        shell.sharedpool_encoding = parameters.get("client_encoding", "")
        shell.sharedpool_server = role_in(live.parameters)
        return shell

    def _pop(self, parameters: bytes, held: int) -> PooledConnection | None:
        with self._lock:
            self._needed = max(self._needed, held)
            stock = self._stock.get(parameters)
            return stock.pop() if stock else None

    def keep(self, shell: PooledConnection, parameters: bytes) -> None:
        """Put a vacated connection in stock, if it can be used again.

        It cannot if it is of a user's own class, or if half a message is left in its buffer. Nor
        can it if libpq's `parameters` differ from those that it was made with.
        """
        if (
            not (self.are_known and shell.sharedpool_emptied)
            or parameters != shell.sharedpool_made_with
        ):
            abandon(shell)
            return
        with self._lock:
            self._stock.setdefault(parameters, []).append(shell)
            self._stock.move_to_end(parameters)
            if len(self) > self._needed:
                self._trim(self._needed)

    def trim(self, held: int) -> None:
        """Drop shells that were not needed since the last call; `held` connections are held now."""
        with self._lock:
            self._trim(self._needed)
            self._needed = max(1, held)
            for empty in [key for key, stock in self._stock.items() if not stock]:
                del self._stock[empty]

    def _trim(self, most: int) -> None:
        while len(self) > most:
            oldest, stock = next(iter(self._stock.items()))
            if stock:
                abandon(stock.pop())
            else:
                del self._stock[oldest]

    def _build(self, parameters: dict[str, str], live: Live) -> PooledConnection:
        names = decode(live.names)
        shell = self._factory.__new__(self._factory)
        # Before __init__, in which a user's class may ask for them.
        shell.sharedpool_adopted, shell.sharedpool_names = live.backend, live.names
        with StubServer(parameters) as stub:
            server = {
                "host": stub.host,
                "port": str(stub.port),
                "options": names.options,
                **_KEYWORDS,
            }
            dsn = extensions.make_dsn(user=names.user, dbname=names.dbname, **server)
            # Not by `psycopg2.connect`: no wrapper is to see, or trace, this as a connect.
            try:
                shell.__init__(dsn)  # type: ignore[misc]
                self._check(shell, stub)
            except BaseException:
                shell.sharedpool_close()
                raise
        if self._cursor_factory is not None:
            shell.cursor_factory = self._cursor_factory
        vacate(shell)
        return shell

    def _check(self, shell: PooledConnection, stub: StubServer) -> None:
        """Raise if a user's class has used the stub as a real server: its object may be wrong."""
        name = self._factory.__name__.removeprefix("Pooled")
        if shell.closed or shell.status != extensions.STATUS_READY:
            raise psycopg2.InterfaceError(
                f"the connection class {name} executes statements while it connects;"
                " move them to configure="
            )
        if extensions.ConnectionInfo(shell).host != stub.host:
            raise psycopg2.InterfaceError(
                f"the connection class {name} connects to another host than it was given"
            )
