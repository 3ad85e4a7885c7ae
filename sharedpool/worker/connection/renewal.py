"""Make an empty shell equal to a connection just opened, whatever it was used for before.

What psycopg2 keeps of a connection on the client's side (struct connectionObject in its
connection.h), and what makes each as new:

  encoding, codecs (cdecoder, pyencoder, pydecoder)
                        compared: `set_client_encoding` changes them, no reset does
  equote (how strings are quoted)
                        fixed at the connect: the shell was made with the same parameters
  autocommit, isolevel, readonly, deferrable
                        `set_session`; if that would send SQL, the shell is refused
  entered (in a `with` block)
                        `__exit__`
  tpc_xid, status       compared: `__exit__` commits, which a two-phase transaction forbids
  notices, notifies     `set_session` takes in what is pending of both; then new lists
  cursor_factory        set
  string_types, binary_types (typecasters)
                        emptied
  attributes of the Python object
                        removed
  closed, async         compared
  dsn, libpq's own idea of the server
                        replaced: `server_facts.py`
  cancel (the key)      the broker cancels: `Connection.cancel`
  server_version, protocol
                        the same: `Shells` keeps each shell by the parameters it was made with
  mark (counts transactions)
                        only an old cursor looks at it, which is refused: `closed_flag.py`

An object of a user's own class is never used again, since it may keep anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import psycopg2
from psycopg2 import extensions

from sharedpool.worker.connection import closed_flag
from sharedpool.worker.connection.closing import is_referred_to
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.state import is_unused, record_settings


def renew(shell: PooledConnection, parameters: Mapping[str, str], cursor_factory: Any) -> bool:
    """Make a shell as new for a session with these parameters; return False if it must be dropped.

    No I/O: its socket leads nowhere. The caller sets what the pool keeps on it.
    """
    if closed_flag.is_closed_for_good(shell) or is_referred_to(shell):
        return False  # the user's code keeps something about this object
    known, number = shell.sharedpool_known, shell.sharedpool_number
    shell.__dict__.clear()
    shell.sharedpool_known, shell.sharedpool_number = known, number
    shell.sharedpool_native = False
    shell.sharedpool_closed_flag = closed_flag.OPEN
    plain = cast(Any, extensions.connection)
    encoding = encoding_for(parameters.get("client_encoding", ""))
    try:
        plain.__exit__(shell, None, None, None)
        plain.set_session(shell, "default", "default", "default", False)
        plain.cursor_factory.__set__(shell, cursor_factory)
        shell.notices, shell.notifies = [], []
        shell.string_types.clear()
        shell.binary_types.clear()
    except psycopg2.Error:
        return False
    shell.sharedpool_closed_flag = closed_flag.SHUT  # until it is checked out
    shell.sharedpool_session = (False, None, None, None, cursor_factory, encoding)
    # Checked last, since a former user that still has a reference may use the shell meanwhile: what
    # cannot be set, and what may not have been. `is_unused` also fails if libpq has lost its
    # socket.
    return bool(shell.encoding == encoding) and is_unused(shell) and not shell.async_


@lru_cache(maxsize=64)
def encoding_for(parameter: str) -> str:
    """Return psycopg2's name for a server's `client_encoding`."""
    return "".join(filter(str.isalnum, parameter)).upper()


def at_start(shell: PooledConnection) -> None:
    """Record the settings that a checkin restores."""
    record_settings(shell)
