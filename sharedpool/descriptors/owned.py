"""Descriptors and their owners: who may close a number, and whether it still names the same file.

A number alone proves nothing. A program may close descriptors that are not its own (a daemon
closes all of them), and the files that it opens next get their numbers.
"""

from __future__ import annotations

import _socket
import os
import socket

# A file's device and inode. The kernel gives every socket one of its own.
Identity = tuple[int, int]
NOTHING: Identity = (-1, -1)
# For every send on a stream in a user's process. If that does not ignore SIGPIPE, a send to a
# closed socket would kill it.
NO_SIGNAL = int(getattr(socket, "MSG_NOSIGNAL", 0))


def identity(number: int) -> Identity:
    """Return the identity of the file with this number, or `NOTHING`.

    A system call of about a microsecond.
    """
    try:
        status = os.fstat(number)
    except OSError:
        return NOTHING
    return status.st_dev, status.st_ino


def is_still(number: int, known: tuple[Identity, ...]) -> bool:
    """Return True if the file with this number is one of the known ones."""
    try:
        status = os.fstat(number)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) in known


class Owned(_socket.socket):  # not `socket.socket`, for which gevent puts one of its own
    """The only owner of a socket, from `Owned(fileno=...)` on; `detach()` hands the number on.

    Dropped by an interrupt in any line, it is closed. C code does that, which no interrupt divides.
    """

    __slots__ = ("__weakref__",)


def close_if_ours(owner: _socket.socket, known: tuple[Identity, ...]) -> None:
    """Close a socket. If another file has its number by now, only forget it."""
    number = owner.fileno()
    if number >= 0 and not is_still(number, known):
        owner.detach()
    owner.close()
