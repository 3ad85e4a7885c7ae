"""Close a connection to whoever still refers to it after its checkin, or has one of its cursors.

psycopg2 looks at a connection's `closed` before all that the connection, its cursors and its large objects do, and
raises InterfaceError. To Python `closed` is read-only; here is the same member of psycopg2's structure, writable. It
costs a few nanoseconds, where a new object for every checkout would cost more than the checkout.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import psycopg2
from psycopg2 import extensions

from sharedpool.worker.connection.pooled import PooledConnection

# psycopg2's own values. SHUT is that of an orderly close, so that a large object ends quietly; of a connection that is
# BROKEN psycopg2 still cleans up.
OPEN, SHUT, BROKEN = 0, 1, 2
_T_LONG, _T_STRING = 2, 5  # CPython's descrobject.h


class _Member(ctypes.Structure):
    """CPython's PyMemberDef."""

    _fields_ = [
        ("name", ctypes.c_char_p), ("type", ctypes.c_int), ("offset", ctypes.c_ssize_t), ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    ]  # fmt: skip


def _found(name: str, kind: int) -> _Member | None:
    """Return psycopg2's definition of a connection's member, or None where it is not what this module knows."""
    descriptor: Any = vars(extensions.connection).get(name)
    if sys.implementation.name != "cpython" or type(descriptor).__name__ != "member_descriptor":
        return None
    # PyMemberDescrObject: after the head, whose and which it is, its qualified name, its definition.
    words = (ctypes.c_void_p * 4).from_address(id(descriptor) + object.__basicsize__)
    if (words[0], words[1]) != (id(extensions.connection), id(descriptor.__name__)) or not words[3]:
        return None
    member = _Member.from_address(words[3])
    fits = object.__basicsize__ < member.offset < extensions.connection.__basicsize__
    return member if (member.name, member.type) == (name.encode(), kind) and fits else None


def _writable() -> tuple[Any, _Member] | None:
    found = _found("closed", _T_LONG)
    if found is None:
        return None
    member = _Member(b"sharedpool_gate", _T_LONG, found.offset, 0, None)
    make = ctypes.pythonapi.PyDescr_NewMember
    make.argtypes, make.restype = [ctypes.py_object, ctypes.c_void_p], ctypes.py_object
    return make(
        extensions.connection, ctypes.addressof(member)
    ), member  # which must live as long as the descriptor


def _has_lock() -> bool:
    """Say whether the structure begins with glibc's pthread_mutex_t, whose first word is 0 when nobody holds it."""
    dsn = _found("dsn", _T_STRING)
    try:
        glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):
        glibc = False
    return glibc and dsn is not None and dsn.offset - object.__basicsize__ in (40, 48)


_MADE = _writable()
_HAS_LOCK = _has_lock()
# A class's attribute: writing OPEN or SHUT to a connection's does it. Elsewhere a plain attribute, without effect.
MEMBER: Any = OPEN if _MADE is None else _MADE[0]


def is_closed_for_good(conn: PooledConnection) -> bool:
    """Say whether a connection is closed for good, and not merely to who has put it back."""
    if not conn.closed:
        return False
    try:
        return conn.closed != SHUT or conn.pgconn_ptr is None
    except psycopg2.Error:
        return True


def reopen(conn: PooledConnection) -> None:
    """Open the gate to a connection, unless it is closed for good."""
    if conn.closed and not is_closed_for_good(conn):
        conn.sharedpool_closed_flag = OPEN


def mark_broken(conn: PooledConnection) -> None:
    """Shut the gate to a connection that is to be closed for good: psycopg2 would take one that is SHUT for closed."""
    if not is_closed_for_good(conn):
        conn.sharedpool_closed_flag = BROKEN


def is_busy(conn: PooledConnection) -> bool:
    """Say whether another thread is in the middle of something on a connection: psycopg2 would wait for it.

    Seen from outside, without taking psycopg2's lock: an interrupt could not let go of it.
    """
    return conn.get_transaction_status() == extensions.TRANSACTION_STATUS_ACTIVE or is_locked(conn)


def is_locked(conn: PooledConnection) -> bool:
    """Say whether another thread has psycopg2's lock of a connection."""
    return _HAS_LOCK and ctypes.c_int.from_address(id(conn) + object.__basicsize__).value != 0
