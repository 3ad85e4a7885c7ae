"""Free descriptors: make sure that enough can be opened.

libzmq ends the process if it finds none free.
"""

from __future__ import annotations

import _socket
import errno
import resource
import select
from typing import Any

from sharedpool.errors import SharedPoolError

# A ZeroMQ context with one socket, and the first moments of its connection.
FOR_A_CONTEXT = 14
# One more ZeroMQ socket, and its connection.
FOR_A_SOCKET = 6
# A connection to the server, and its witness.
FOR_A_CONNECTION = 2
# A connection object that is made without a server: the stub server, and both ends of its
# connection.
FOR_A_SHELL = 4
_SHORT = (errno.EMFILE, errno.ENFILE)


def require(count: int, purpose: str) -> None:
    """Raise `SharedPoolError` if fewer than `count` descriptors can be opened now.

    Takes a few microseconds for each.
    """
    taken: list[Any] = []  # objects that close their descriptors: an interrupt leaves none open
    # epoll objects cost half as much as sockets. Other systems have none, and gevent removes them.
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
            f"{purpose} needs {count} descriptors, and fewer are free of the {whose}:"
            " close files, or raise the limit (`ulimit -n`, LimitNOFILE=)"
        ) from error
    finally:
        for each in taken:
            each.close()


def is_shortage(error: BaseException) -> bool:
    """Return True if an error means that no descriptor was free, which may pass."""
    return isinstance(error, OSError) and error.errno in _SHORT
