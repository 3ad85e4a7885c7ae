"""Which of the server's backends belong to no lease."""

from __future__ import annotations

from collections.abc import Iterable

from sharedpool.broker.core.slots import Slots
from sharedpool.wire.values import Backend


def strangers_among(slots: Slots, backends: Iterable[Backend]) -> list[Backend]:
    """Return the backends that no lease is known to have.

    A start time of 0 could not be read; where either side has none, the pid alone counts.
    """
    known = [lease.backend for lease in slots.leases.values() if lease.backend is not None]
    pids = {backend.pid for backend in known}
    exact = {(backend.pid, backend.start_us) for backend in known}
    without_start = {backend.pid for backend in known if not backend.start_us}

    def is_known(backend: Backend) -> bool:
        if not backend.start_us:
            return backend.pid in pids
        return (backend.pid, backend.start_us) in exact or backend.pid in without_start

    return [backend for backend in backends if not is_known(backend)]
