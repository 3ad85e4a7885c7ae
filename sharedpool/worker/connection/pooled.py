"""What a pool keeps on each of its connections, so that the modules beside `connection.py` need not import it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from psycopg2 import extensions

from sharedpool.descriptors.owned import Identity
from sharedpool.wire.messages import Backend


class PooledConnection(extensions.connection):
    """A connection of a pool, as all modules know it. Its class is `Connection` (`connection.py`)."""

    # Set while it is checked out, taken off by the first checkin: a second one finds nothing. A slot of the class that
    # `pooled_class` makes: a checkout and a checkin cost a tenth less than with an entry of the object's dictionary.
    sharedpool_lent: Any
    sharedpool_local: Any = None
    sharedpool_returned: Any = None  # the lease in which its user's `close()` checked it in last
    # A bare descriptor: a socket object in one garbage cycle with us would be closed before our own finalizer ran.
    sharedpool_witness = -1
    # What libpq's descriptor and the witness are, and what they were before: a number may become somebody else's.
    sharedpool_known: tuple[Identity, ...] = ()
    sharedpool_number = -1  # libpq's descriptor, once it is known: see `closing.descriptor_of`
    sharedpool_session: tuple[Any, ...] = ()
    sharedpool_pid = 0
    sharedpool_gone = sharedpool_closed = False
    sharedpool_direct: bool | None = (
        None  # whether nobody is between it and the backend; None until it is described
    )
    sharedpool_finalized = False
    sharedpool_erred = False  # its last transaction failed
    sharedpool_started = 0.0  # when its connect began
    sharedpool_timeout_s: float | None = None  # libpq's own, if it is known
    sharedpool_server: tuple[
        bytes | None, ...
    ] = ()  # what it was when we connected: see `turned_read_only`
    sharedpool_touched = False  # its user has set what a checkin restores
    # What its user gets in place of it, while it is not checked out, and who made that: see `wrapper.py`.
    sharedpool_wrapper: Any = None
    sharedpool_wrapper_ref: Callable[[], Any] | None = None
    sharedpool_connect: object = None
    # For the hand-over (`handover.py`).
    sharedpool_movable = False
    sharedpool_encoding = ""
    sharedpool_made_with = (
        b""  # the parameters of the session that its object was made for: see `handover.parameters`
    )
    sharedpool_emptied = False  # a shell: its libpq has nothing left of the session that it had
    sharedpool_names: bytes | None = (
        None  # what it says of its server, once that has to be known elsewhere
    )
    sharedpool_native = True  # libpq itself has opened the session that it is on
    sharedpool_adopted: Backend | None = None  # the backend, if it has not
    sharedpool_closed_flag: int  # see `closed_flag.py`

    @property
    def sharedpool_lease(self) -> Any:
        """The lease under which it is checked out, None while it is not."""
        return getattr(self, "sharedpool_lent", None)

    @property
    def sharedpool_self(self) -> PooledConnection:
        """The connection itself, also when it is asked of what wraps it."""
        return self

    def sharedpool_close(self) -> None:
        """Close it as psycopg2 does, which only asks its backend to leave, if its descriptor is still its own."""
        raise NotImplementedError
