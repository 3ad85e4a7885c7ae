"""Whether a process may open as many descriptors as it needs: libzmq ends the process when it finds none free."""

from __future__ import annotations

import _socket
import errno
import resource
import select
from typing import Any

from sharedpool.errors import SharedPoolError

# libzmq's own, of one context with one socket, and what the first moments of a connection take.
FOR_A_CONTEXT = 14
# Of one more socket, and its connection.
FOR_A_SOCKET = 6
# A connection to the server and its witness.
FOR_A_CONNECTION = 2
# A connection object that is made without a server: what plays the server, and both ends of the connection to that.
FOR_A_SHELL = 4
_SHORT = (errno.EMFILE, errno.ENFILE)


def require(count: int, purpose: str) -> None:
    """Make sure that so many descriptors can be opened now; a few microseconds each.

    Raise `SharedPoolError`, which says what to do.
    """
    taken: list[
        Any
    ] = []  # objects that close what they have: an interrupt in whatever line leaves nothing open
    # Half as dear as a socket; other systems have none, nor does a program that gevent has patched.
    cheapest = getattr(select, "epoll", _socket.socket)
    try:
        while len(taken) < count:
            taken.append(cheapest())
    except OSError as error:
        if error.errno not in _SHORT:
            raise
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        whose = (
            f"{limit} that this process may have open"
            if error.errno == errno.EMFILE
            else "whole system's"
        )
        raise SharedPoolError(
            f"{purpose} needs {count} descriptors, and fewer are free of the {whose}: close files, or raise the limit"
            " (`ulimit -n`, LimitNOFILE=)"
        ) from error
    finally:
        for each in taken:
            each.close()


def is_shortage(error: BaseException) -> bool:
    """Say whether an error tells that no descriptor was free, which may be over in a moment."""
    return isinstance(error, OSError) and error.errno in _SHORT
