"""The scope of a broker: no two brokers of one scope may serve at the same time.

Where brokers cannot share a limit, an advisory lock in PostgreSQL sees to that
(`broker/postgres/leadership.py`).
"""

from __future__ import annotations

import os
import socket

from sharedpool.discovery.pid_namespace import pid_namespace_id


def scope_of(address: str) -> str:
    """Return the scope of a broker that was given this address, on this host."""
    return f"{address} {_here()}"


def automatic_scope(digest: str) -> str:
    """Return the scope of this user's automatic broker for one server and role.

    Each container has a broker of its own, because containers share no runtime directory.
    """
    return f"automatic {digest} uid {os.geteuid()} {_here()}"


def _here() -> str:
    return pid_namespace_id() or socket.gethostname()
