"""What psycopg2 does not show of the libpq that it is linked with."""

from __future__ import annotations

import ctypes
import functools

import psycopg2
from psycopg2.extensions import connection


class _Option(ctypes.Structure):
    """libpq's PQconninfoOption (libpq-fe.h)."""

    _fields_ = [
        *((name, ctypes.c_char_p) for name in ("keyword", "envvar", "compiled", "val", "label", "dispchar")),
        ("dispsize", ctypes.c_int),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the libpq that psycopg2 itself is linked with, or None where its symbols cannot be reached."""
    try:
        # dlsym on the extension module searches its dependencies too, the wheel's bundled libpq among them.
        lib = ctypes.CDLL(psycopg2._psycopg.__file__)
        lib.PQconnectStart.argtypes, lib.PQconnectStart.restype = [ctypes.c_char_p], ctypes.c_void_p
        lib.PQconninfo.argtypes, lib.PQconninfo.restype = [ctypes.c_void_p], ctypes.POINTER(_Option)
        lib.PQerrorMessage.argtypes, lib.PQerrorMessage.restype = [ctypes.c_void_p], ctypes.c_char_p
        lib.PQconninfoFree.argtypes, lib.PQconninfoFree.restype = [ctypes.POINTER(_Option)], None
        lib.PQfinish.argtypes, lib.PQfinish.restype = [ctypes.c_void_p], None
        lib.PQsocket.argtypes, lib.PQsocket.restype = [ctypes.c_void_p], ctypes.c_int
    except (AttributeError, OSError):
        return None
    return lib


def options(lib: ctypes.CDLL, conn: int) -> dict[str, str] | None:
    """Return the options of a PGconn that have a value, or None when libpq gives none."""
    options = lib.PQconninfo(conn)
    if not options:
        return None
    found: dict[str, str] = {}
    index = 0
    while (option := options[index]).keyword is not None:
        if option.val is not None:
            found[option.keyword.decode()] = option.val.decode("utf-8", "surrogateescape")
        index += 1
    lib.PQconninfoFree(options)
    return found


def socket_of_failed(conn: connection) -> int | None:
    """Return the socket of a connection that could not be opened: -1 if it has none, None if there is no telling.

    libpq leaves it open until PQfinish (fe-connect.c, PQconnectPoll's error_return), psycopg2 says "closed" already.
    """
    lib = library()
    if lib is None:
        return None
    try:
        pointer = conn.pgconn_ptr
    except psycopg2.Error:
        return None
    return int(lib.PQsocket(pointer)) if pointer else -1
