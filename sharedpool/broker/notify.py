"""Tell systemd, or whoever gave us NOTIFY_SOCKET, how we are doing (sd_notify(3))."""

from __future__ import annotations

import logging
import os
import socket

logger = logging.getLogger("sharedpool.broker")


def notify(address: str, state: str) -> None:
    """Send `state` ("READY=1") to the datagram socket at `address`, a path or @ and a name; empty: to nobody."""
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | getattr(socket, "SOCK_CLOEXEC", 0)) as supervisor:
            supervisor.connect(b"\0" + os.fsencode(address[1:]) if address.startswith("@") else address)
            supervisor.sendall(state.encode())
    except OSError as error:
        logger.warning("cannot say %s to NOTIFY_SOCKET %s: %s", state, address, error)
