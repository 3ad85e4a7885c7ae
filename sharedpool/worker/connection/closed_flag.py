"""Close a connection object to its former user, who may still refer to it or to its cursors.

Before every operation of a connection, its cursors and its large objects, psycopg2 checks the
connection's `closed` and raises InterfaceError if it is set. To Python `closed` is read-only. This
module makes a writable descriptor of the same member of psycopg2's structure. To write it takes
some nanoseconds; to make a new object for every checkout would take longer than the checkout.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import psycopg2
from psycopg2 import extensions

from sharedpool.worker.connection.pooled import PooledConnection

# psycopg2's own values. SHUT is what an orderly close sets, so large objects end quietly. After
# BROKEN psycopg2 still cleans up.
OPEN, SHUT, BROKEN = 0, 1, 2
_T_LONG, _T_STRING = 2, 5  # CPython's descrobject.h


class _Member(ctypes.Structure):
    """CPython's PyMemberDef."""

    _fields_ = [
        ("name", ctypes.c_char_p), ("type", ctypes.c_int), ("offset", ctypes.c_ssize_t),
        ("flags", ctypes.c_int), ("doc", ctypes.c_char_p),
    ]  # fmt: skip


def _found(name: str, kind: int) -> _Member | None:
    """Return psycopg2's definition of a member; None if it is not as this module knows it."""
    descriptor: Any = vars(extensions.connection).get(name)
    if sys.implementation.name != "cpython" or type(descriptor).__name__ != "member_descriptor":
        return None
    # PyMemberDescrObject has after its head: type, name, qualified name, PyMemberDef.
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
    # `member` is returned too, as it must live as long as the descriptor.
    return make(extensions.connection, ctypes.addressof(member)), member


def _has_lock() -> bool:
    """Return True if psycopg2's structure begins with glibc's pthread_mutex_t.

    Its first word is 0 while no thread holds it.
    """
    dsn = _found("dsn", _T_STRING)
    try:
        glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):
        glibc = False
    return glibc and dsn is not None and dsn.offset - object.__basicsize__ in (40, 48)


_MADE = _writable()
_HAS_LOCK = _has_lock()
# The value of the class attribute `sharedpool_closed_flag`: writing OPEN or SHUT to a connection's
# attribute sets its `closed`. Where that is impossible, it is a plain attribute without effect.
MEMBER: Any = OPEN if _MADE is None else _MADE[0]


def is_closed_for_good(conn: PooledConnection) -> bool:
    """Return True if a connection is closed for good, and not just to its former user."""
    if not conn.closed:
        return False
    try:
        return conn.closed != SHUT or conn.pgconn_ptr is None
    except psycopg2.Error:
        return True


def reopen(conn: PooledConnection) -> None:
    """Open a connection to its next user, unless it is closed for good."""
    if conn.closed and not is_closed_for_good(conn):
        conn.sharedpool_closed_flag = OPEN


def mark_broken(conn: PooledConnection) -> None:
    """Set BROKEN on a connection that is to be closed for good.

    psycopg2 would do nothing to close one that is SHUT, since it looks closed.
    """
    if not is_closed_for_good(conn):
        conn.sharedpool_closed_flag = BROKEN


def is_busy(conn: PooledConnection) -> bool:
    """Return True if another thread is using a connection, so that psycopg2 would wait for it.

    psycopg2's lock is looked at and not taken, since an interrupt could leave it locked.
    """
    return conn.get_transaction_status() == extensions.TRANSACTION_STATUS_ACTIVE or is_locked(conn)


def is_locked(conn: PooledConnection) -> bool:
    """Return True if another thread holds psycopg2's lock on a connection."""
    return _HAS_LOCK and ctypes.c_int.from_address(id(conn) + object.__basicsize__).value != 0
