"""The scope of a broker: what no two brokers may count to at the same time (`broker/postgres/leadership.py`)."""

from __future__ import annotations

import ipaddress
import os
import socket

from sharedpool.discovery.pid_namespace import pid_namespace_id


def scope_of(address: str) -> str:
    """Return the scope of a broker that somebody has given this address.

    By tcp an address that others reach is the same broker wherever it runs; one that only this host knows by this name
    is this host's. So is a path: a lock file lies beside it, but somebody may delete that.
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
    """Return the scope of the automatic broker of one server and role: this user's, on this machine.

    In another container there is another one: they have no directory in common in which to find each other.
    """
    return f"automatic {digest} uid {os.geteuid()} {_here()}"


def _here() -> str:
    return pid_namespace_id() or socket.gethostname()
