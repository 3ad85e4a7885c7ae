"""Where a connection was checked out: for `debug_checkouts`."""

from __future__ import annotations

import sys
from types import CodeType

# Code objects and line numbers, innermost first. Frames would keep their local variables alive.
Stack = tuple[tuple[CodeType, int], ...]

_MAX_CALLS = 12
_MAX_BYTES = 100  # of one call: heartbeats carry them
# Packages between a user's line and the pool.
_SKIPPED = frozenset({"sharedpool", "contextlib", "sqlalchemy", "django"})


def capture() -> Stack:
    """Return this thread's stack without the calls inside the pool and its integrations.

    Takes some microseconds.
    """
    frame = sys._getframe(1)
    inner = frame
    found: list[tuple[CodeType, int]] = []
    while frame is not None and len(found) < _MAX_CALLS:
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] not in _SKIPPED:
            found.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment] # the outermost frame has None
    # Nothing is left for a command of one of those packages, such as Django's.
    return tuple(found) or ((inner.f_code, inner.f_lineno),)


def shown_stack(stack: Stack) -> list[str]:
    """Return file, line and function of each call, as text."""
    return [_shown(f"{code.co_filename}:{line} in {code.co_qualname}") for code, line in stack]


def _shown(text: str) -> str:
    """Return `text` printable, valid UTF-8, and cut at its start to `_MAX_BYTES`.

    File names may be neither printable nor valid UTF-8.
    """
    printable = "".join(char if char.isprintable() else "?" for char in text)
    raw = printable.encode("utf-8", "replace")
    if len(raw) <= _MAX_BYTES:
        return raw.decode()
    return "…" + raw[3 - _MAX_BYTES :].decode("utf-8", "ignore")
