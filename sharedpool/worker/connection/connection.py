"""The class of a pool's connections: a psycopg2 connection that notices a few of its user's acts.

It notices a `close`, a change of the settings that a checkin restores, and its own end. Opening a
connection is in `opening.py`, looking at its state in `state.py`, and closing it in `closing.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import psycopg2
from psycopg2 import extensions

from sharedpool.postgres.libpq import socket_of_failed
from sharedpool.wire.values import Phase
from sharedpool.worker.connection import closed_flag, server_facts
from sharedpool.worker.connection.closing import (
    close_confirmed,
    close_witness,
    disown,
    keep_forever,
    owns_descriptor,
    unregister,
    unregister_all,
)
from sharedpool.worker.connection.pooled import PooledConnection


class Connection(PooledConnection):
    """A psycopg2 connection that a pool lends out."""

    # Tracing agents tell the database, and name the methods, by these.
    __module__, __qualname__ = extensions.connection.__module__, extensions.connection.__qualname__

    sharedpool_closed_flag: int = closed_flag.MEMBER

    def close(self) -> None:
        """Close the connection and wait until its backend has exited, for a second at most.

        A connection from `Pool.connect` is checked in instead. Closing it again does nothing.
        """
        lease, returned = self.sharedpool_lease, self.sharedpool_returned
        if self.sharedpool_pid not in (0, os.getpid()):
            disown(self)  # inherited in a fork that Python has not seen: the parent's session
        elif lease is not None and lease.at_close is not None:
            self.sharedpool_returned = lease
            lease.at_close(self)
            return
        elif lease is None and (
            self.closed == closed_flag.SHUT
            or (returned is not None and returned.phase is Phase.IDLE)
        ):
            return  # it was checked in: it belongs to the pool, or to its next user
        close_confirmed([self])

    def sharedpool_close(self) -> None:
        """Close the connection without waiting for its backend to exit.

        Do nothing to its descriptor if that belongs to something else by now.
        """
        self.sharedpool_wrapper = None  # the wrapper refers to this connection
        if owns_descriptor(self):
            number = socket_of_failed(self) or -1
            closed_flag.mark_broken(self)
            super().close()
            unregister(number)
        else:
            keep_forever(self)

    def sharedpool_touch(self) -> None:
        """Record that the user changes a setting that a checkin restores.

        Raise `psycopg2.InterfaceError` if the connection is not checked out.
        """
        if self.closed == closed_flag.SHUT and self.sharedpool_local is not None:
            raise psycopg2.InterfaceError("connection already closed")
        self.sharedpool_touched = True
        if self.sharedpool_lease is not None:
            self.sharedpool_lease.fast_checkin = False

    def set_session(self, *args: Any, **kwargs: Any) -> None:
        """Set the session's characteristics: see psycopg2."""
        self.sharedpool_touch()
        super().set_session(*args, **kwargs)

    def set_isolation_level(self, level: int | None) -> None:
        """Set the isolation level: see psycopg2."""
        self.sharedpool_touch()
        super().set_isolation_level(level)

    def set_client_encoding(self, encoding: str) -> None:
        """Change the encoding of what is sent and received: see psycopg2."""
        self.sharedpool_touch()
        super().set_client_encoding(encoding)

    def reset(self) -> None:
        """Return to the session's defaults: see psycopg2."""
        self.sharedpool_touch()
        super().reset()

    def get_backend_pid(self) -> int:
        """Return the process id of the server's process for this session."""
        return (
            super().get_backend_pid()
            if self.sharedpool_adopted is None
            else self.sharedpool_adopted.pid
        )

    def _adopted_names(self) -> server_facts.ServerFacts | None:
        encoded = None if self.sharedpool_adopted is None else self.sharedpool_names
        return None if encoded is None else server_facts.decode(encoded)

    @property
    def info(self) -> extensions.ConnectionInfo:
        """What psycopg2 knows of the connection."""
        known = self._adopted_names()
        return super().info if known is None else server_facts.AdoptedInfo(self, known)

    @property
    def dsn(self) -> str:
        """The connection string, without the password."""
        known = self._adopted_names()
        return super().dsn if known is None else known.dsn

    def get_dsn_parameters(self) -> dict[str, str]:
        """Return the parameters of the connection, defaults included: see psycopg2."""
        known = self._adopted_names()
        return (
            super().get_dsn_parameters() if known is None or self.closed else dict(known.parameters)
        )

    def __repr__(self) -> str:
        text = super().__repr__()
        return text if self.sharedpool_adopted is None else text.replace(super().dsn, self.dsn)

    def cancel(self) -> None:
        """Cancel the query that the session is executing.

        If another process has opened the session, the broker cancels for it. Raise
        `psycopg2.InterfaceError` then if the connection is not checked out, since another process
        may be using the session.
        """
        if self.sharedpool_native:
            super().cancel()
            return
        server_facts.refuse_cancel(self)
        if self.sharedpool_lease is None:
            raise psycopg2.InterfaceError("cannot cancel: the connection was returned to its pool")
        self.sharedpool_local.cancel_query(self.sharedpool_lease.token)

    # At the interpreter's end `os` may be gone, hence the argument.
    def __del__(self, getpid: Callable[[], int] = os.getpid) -> None:
        if self.sharedpool_pid != getpid():
            return  # never opened, or inherited
        if self.sharedpool_lease is None:
            close_witness(self)
            if owns_descriptor(self):
                # Else psycopg2 might take it for closed, and leave the descriptor open.
                closed_flag.mark_broken(self)
            else:
                keep_forever(self)
            unregister_all(self)
        else:
            # Dropped while checked out. A finalizer may take no lock: the link's thread takes the
            # connection back. It is not lent out again, as Python calls __del__ only once.
            unregister_all(self)
            self.sharedpool_finalized = True
            self.sharedpool_local.dropped.append(self)
            self.sharedpool_local.wake_link()


def _watched(name: str) -> property:
    """Return a property for psycopg2's attribute `name` that notices when it is set.

    So most checkins need not compare the settings.
    """

    def get(conn: Connection) -> Any:
        return getattr(super(Connection, conn), name)

    def set_(conn: Connection, value: object) -> None:
        conn.sharedpool_touch()
        _inherited(cast(Any, type(conn)), name).__set__(conn, value)

    return property(get, set_, doc=getattr(extensions.connection, name).__doc__)


@lru_cache(maxsize=128)
def _inherited(kind: type[PooledConnection], name: str) -> Any:
    """Return the attribute that `Connection` hides: psycopg2's, or the user's own class's."""
    after = kind.__mro__[kind.__mro__.index(Connection) + 1 :]
    return next(cls.__dict__[name] for cls in after if name in cls.__dict__)


for _name in ("autocommit", "isolation_level", "readonly", "deferrable", "cursor_factory"):
    setattr(Connection, _name, _watched(_name))


@lru_cache(maxsize=32)
def pooled_class(factory: type[extensions.connection] | None) -> type[PooledConnection]:
    """Return the class of a pool's connections: `Connection` mixed into the user's factory."""
    factory = factory or extensions.connection
    bases = (Connection,) if factory is extensions.connection else (Connection, factory)
    members = {
        "__module__": factory.__module__,
        "__qualname__": factory.__qualname__,
        "__slots__": ("sharedpool_lent",),
    }
    return cast(type[PooledConnection], type(f"Pooled{factory.__name__}", bases, members))


def take_lease(conn: PooledConnection) -> Any:
    """Take the lease off a connection; None if it has none. Of several threads only one gets it."""
    lease = conn.sharedpool_lease
    try:
        del conn.sharedpool_lent
    except AttributeError:
        return None
    return lease
