"""What the threads of this process are at: whether one that runs our code has a lease in its hands."""

from __future__ import annotations

import sys
from pathlib import Path
from threading import get_ident

from sharedpool.worker import green
from sharedpool.worker.lease import Lease

_PACKAGE = str(Path(__file__).resolve().parents[1])


def leases_in_hand() -> set[Lease] | None:
    """Return the leases that are in variables of other threads' calls of ours; None of greenlets.

    One that a thread has taken this very moment may be missing: look twice, some time apart.
    """
    if green.patched() or not hasattr(sys, "_current_frames"):
        return None
    found: set[Lease] = set()
    for thread, innermost in sys._current_frames().items():
        frame = innermost if thread != get_ident() else None  # who asks looks at all of them
        while frame is not None:
            if frame.f_code.co_filename.startswith(_PACKAGE):
                found.update(value for value in list(frame.f_locals.values()) if isinstance(value, Lease))
            frame = frame.f_back
    return found
