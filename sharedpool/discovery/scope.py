"""The scope of a broker: no two brokers of one scope may serve at the same time.

An advisory lock in PostgreSQL sees to that (`broker/postgres/leadership.py`).
"""

from __future__ import annotations

import ipaddress
import os
import socket

from sharedpool.discovery.pid_namespace import pid_namespace_id


def scope_of(address: str) -> str:
    """Return the scope of a broker that was given this address.

    A tcp address that other hosts can reach names one broker wherever that runs. Loopback addresses
    and paths name a broker of this host. (A path has a lock file, too, but that can be deleted.)
    """
    if not address.startswith("tcp://"):
        return f"{address} {_here()}"
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        ip = ipaddress.ip_address(host)
        local = ip.is_loopback or ip.is_unspecified
    except ValueError:
        local = host in ("*", "localhost")
    return f"{address} {_here()}" if local else address


def automatic_scope(digest: str) -> str:
    """Return the scope of this user's automatic broker for one server and role.

    Each container has a broker of its own, because containers share no runtime directory.
    """
    return f"automatic {digest} uid {os.geteuid()} {_here()}"


def _here() -> str:
    return pid_namespace_id() or socket.gethostname()
