"""Descriptors and their owners: who may close a number, and whether what it names is still what it was.

A number alone proves nothing. A program may close descriptors that are not its own (a daemon closes all that it has),
and what it opens next gets their numbers.
"""

from __future__ import annotations

import _socket
import os
import socket

# A file's device and inode. The kernel gives every socket one of its own.
Identity = tuple[int, int]
NOTHING: Identity = (-1, -1)
# For every send on a stream in a user's process: where SIGPIPE is not ignored the end of the other side would kill it.
NO_SIGNAL = int(getattr(socket, "MSG_NOSIGNAL", 0))


def identity(number: int) -> Identity:
    """Return what is open under a number; `NOTHING` when nothing is. A system call, about a microsecond."""
    try:
        status = os.fstat(number)
    except OSError:
        return NOTHING
    return status.st_dev, status.st_ino


def is_still(number: int, known: tuple[Identity, ...]) -> bool:
    """Say whether what is open under a number is one of those that were known."""
    try:
        status = os.fstat(number)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) in known


class Owned(_socket.socket):  # not `socket.socket`, for which gevent puts one of its own
    """A socket's only owner, from `Owned(fileno=...)` on: dropped, by an interrupt in whatever line, it is closed.

    That is done by C, which no interrupt falls into. `detach()` hands the number on.
    """

    __slots__ = ("__weakref__",)


def close_if_ours(owner: _socket.socket, known: tuple[Identity, ...]) -> None:
    """Close a socket, if it is still what it was; else its number is somebody else's, and is only forgotten."""
    number = owner.fileno()
    if number >= 0 and not is_still(number, known):
        owner.detach()
    owner.close()
