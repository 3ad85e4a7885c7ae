"""What a pool keeps on each of its connections. Most modules here need only this class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from psycopg2 import extensions

from sharedpool.descriptors.owned import Identity
from sharedpool.wire.values import Backend


class PooledConnection(extensions.connection):
    """A connection of a pool, as all modules know it.

    Its real class is `Connection` (`connection.py`).
    """

    # --- the checkout

    # The lease under which it is checked out. The first checkin takes it off, so a second one finds
    # nothing. It is a slot of the class that `pooled_class` makes. An entry in the object's
    # dictionary would cost a tenth of a checkout and checkin.
    sharedpool_lent: Any
    sharedpool_local: Any = None  # the process's `LocalPool`
    # The lease in which the user's `close()` last checked it in.
    sharedpool_returned: Any = None
    # The client-side settings that a checkin restores, and whether the user has set one.
    sharedpool_session: tuple[Any, ...] = ()
    sharedpool_touched = False
    sharedpool_erred = False  # the last transaction failed
    sharedpool_finalized = False  # `__del__` was called, which Python does only once
    sharedpool_closed_flag: int  # see `closed_flag.py`
    # What the user gets in its place, while it is not checked out, and what made that: see
    # `wrapper.py`.
    sharedpool_wrapper: Any = None
    sharedpool_wrapper_ref: Callable[[], Any] | None = None
    sharedpool_connect: object = None

    # --- its descriptors

    # A duplicate of its socket. It is a bare number: a socket object in a garbage cycle with the
    # connection would be closed before the connection's own finalizer ran.
    sharedpool_witness = -1
    # libpq's descriptor, once it is known: see `closing.descriptor_of`.
    sharedpool_number = -1
    # What these two are, and were before. Their numbers may come to belong to something else.
    sharedpool_known: tuple[Identity, ...] = ()
    sharedpool_pid = 0  # the process that they belong to; 0 before the connect

    # --- its server and its end

    sharedpool_started = 0.0  # when the connect began
    sharedpool_timeout_s: float | None = None  # libpq's limit for the connect, if it is known
    # No proxy is between it and the backend. None until that is found out.
    sharedpool_direct: bool | None = None
    # The server's role at the connect: see `state.turned_read_only`.
    sharedpool_server: tuple[bytes | None, ...] = ()
    sharedpool_gone = False  # the backend was seen to end
    sharedpool_peer_closed = False  # the other side was seen to close the connection

    # --- the hand-over (`handover.py`)

    sharedpool_movable = False
    sharedpool_encoding = ""  # the server's `client_encoding` at the start
    # The parameters of the session that the object was made for: see `handover.parameters`.
    sharedpool_made_with = b""
    sharedpool_emptied = False  # libpq has nothing left of the session that was given away
    # The server's name and login, encoded, once another process has to know them.
    sharedpool_names: bytes | None = None
    sharedpool_native = True  # libpq itself has opened the present session
    sharedpool_adopted: Backend | None = None  # the session's backend, if libpq has not opened it

    @property
    def sharedpool_lease(self) -> Any:
        """The lease under which it is checked out, or None."""
        return getattr(self, "sharedpool_lent", None)

    @property
    def sharedpool_self(self) -> PooledConnection:
        """The connection itself, also when a wrapper is asked."""
        return self

    def sharedpool_close(self) -> None:
        """Close the connection without waiting for its backend; see `Connection`."""
        raise NotImplementedError
