"""The threads of this process: their names, and the leases in their local variables."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from threading import get_ident

from sharedpool.worker import greenlets
from sharedpool.worker.core.lease import Lease

_PACKAGE = str(Path(__file__).resolve().parents[1])


def leases_in_hand() -> set[Lease] | None:
    """Return the leases in local variables of this package's functions, over all other threads.

    None if that cannot be known: greenlets have no frames of their own to look at. A lease that a
    thread has taken this very moment may be missing, so look twice, some time apart.
    """
    if greenlets.patched() or not hasattr(sys, "_current_frames"):
        return None
    found: set[Lease] = set()
    for thread, innermost in sys._current_frames().items():
        frame = innermost if thread != get_ident() else None  # this thread looks at all leases
        while frame is not None:
            if frame.f_code.co_filename.startswith(_PACKAGE):
                found.update(
                    value for value in list(frame.f_locals.values()) if isinstance(value, Lease)
                )
            frame = frame.f_back
    return found


def thread_names() -> dict[int, str]:
    """Return the names of this process's threads by identifier."""
    return {
        thread.ident: utf8(thread.name)
        for thread in threading.enumerate()
        if thread.ident is not None
    }


def utf8(text: str) -> str:
    """Return `text` without what UTF-8 cannot encode, such as parts of file names."""
    return text.encode("utf-8", "replace").decode()
