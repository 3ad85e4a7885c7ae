"""Close a connection to whoever still refers to it after its checkin, or has one of its cursors.

psycopg2 looks at a connection's `closed` before all that the connection, its cursors and its large objects do, and
raises InterfaceError. To Python `closed` is read-only; here is the same member of psycopg2's structure, writable. It
costs a few nanoseconds, where a new object for every checkout would cost more than the checkout.
"""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING, Any

import psycopg2
from psycopg2 import extensions

if TYPE_CHECKING:
    from sharedpool.worker.connection import PooledConnection

OPEN, SHUT = 0, 1  # psycopg2's own values: 1 is that of an orderly close, so that a large object ends quietly
_T_LONG = 2  # CPython's descrobject.h


class _Member(ctypes.Structure):
    """CPython's PyMemberDef."""

    _fields_ = [
        ("name", ctypes.c_char_p), ("type", ctypes.c_int), ("offset", ctypes.c_ssize_t), ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    ]  # fmt: skip


def _found() -> _Member | None:
    """Return psycopg2's definition of `closed`, or None where it is not what this module knows."""
    descriptor: Any = vars(extensions.connection).get("closed")
    if sys.implementation.name != "cpython" or type(descriptor).__name__ != "member_descriptor":
        return None
    # PyMemberDescrObject: after the head, whose and which it is, its qualified name, its definition.
    words = (ctypes.c_void_p * 4).from_address(id(descriptor) + object.__basicsize__)
    if (words[0], words[1]) != (id(extensions.connection), id(descriptor.__name__)) or not words[3]:
        return None
    member = _Member.from_address(words[3])
    fits = object.__basicsize__ < member.offset < extensions.connection.__basicsize__
    return member if (member.name, member.type) == (b"closed", _T_LONG) and fits else None


def _writable() -> tuple[Any, _Member] | None:
    found = _found()
    if found is None:
        return None
    member = _Member(b"sharedpool_gate", _T_LONG, found.offset, 0, None)
    make = ctypes.pythonapi.PyDescr_NewMember
    make.argtypes, make.restype = [ctypes.py_object, ctypes.c_void_p], ctypes.py_object
    return make(extensions.connection, ctypes.addressof(member)), member  # which must live as long as the descriptor


_MADE = _writable()
# A class's attribute: writing OPEN or SHUT to a connection's does it. Elsewhere a plain attribute, without effect.
MEMBER: Any = OPEN if _MADE is None else _MADE[0]
WORKS = _MADE is not None


def is_over(conn: PooledConnection) -> bool:
    """Say whether a connection is closed for good, and not merely to who has put it back."""
    if not conn.closed:
        return False
    try:
        return conn.closed != SHUT or conn.pgconn_ptr is None
    except psycopg2.Error:
        return True


def reopen(conn: PooledConnection) -> None:
    """Open the gate of a connection that is to be closed for good; without effect on one that is."""
    if conn.closed and not is_over(conn):
        conn.sharedpool_gate = OPEN
