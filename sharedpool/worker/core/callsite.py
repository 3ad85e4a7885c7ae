"""Where a connection was checked out: for `debug_checkouts`."""

from __future__ import annotations

import sys
from types import CodeType

# Code objects and line numbers, innermost first. Frames would keep their local variables alive.
Stack = tuple[tuple[CodeType, int], ...]

_DEEPEST = 12
_LONGEST = 100  # bytes of an entry: heartbeats carry them
# What lies between a user's line and the pool.
_BETWEEN = frozenset({"sharedpool", "contextlib", "sqlalchemy", "django"})


def capture() -> Stack:
    """Return the stack of this thread without the layers between the pool and its user. Some microseconds."""
    frame = sys._getframe(1)
    inner = frame
    found: list[tuple[CodeType, int]] = []
    while frame is not None and len(found) < _DEEPEST:
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] not in _BETWEEN:
            found.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment] # the stub does not know that the outermost has none
    return tuple(found) or (
        (inner.f_code, inner.f_lineno),
    )  # a command of one of those, all by itself


def shown_stack(stack: Stack) -> list[str]:
    """Return a stack as it is shown: file, line and function of each call."""
    return [_shown(f"{code.co_filename}:{line} in {code.co_qualname}") for code, line in stack]


def _shown(text: str) -> str:
    """Return `text` as it can go on the wire and to a terminal: file names need be neither UTF-8 nor printable."""
    plain = (
        text
        if text.isprintable()
        else "".join(char if char.isprintable() else "?" for char in text)
    )
    raw = plain.encode("utf-8", "replace")
    return (
        raw.decode()
        if len(raw) <= _LONGEST
        else "…" + raw[3 - _LONGEST :].decode("utf-8", "ignore")
    )
