"""systemd's `sd_notify` and socket activation, which other supervisors offer as well."""

from __future__ import annotations

import logging
import os
import socket

from sharedpool.errors import ConfigError

logger = logging.getLogger("sharedpool.broker")

_FIRST_FD = 3


def notify(address: str, state: str) -> None:
    """Send `state`, such as "READY=1", to the supervisor's datagram socket: see sd_notify(3).

    `address` is a path, or @ and a name in the abstract namespace; if it is empty nothing is sent.
    An error is logged.
    """
    if not address:
        return
    try:
        with socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | getattr(socket, "SOCK_CLOEXEC", 0)
        ) as supervisor:
            supervisor.connect(
                b"\0" + os.fsencode(address[1:]) if address.startswith("@") else address
            )
            supervisor.sendall(state.encode())
    except OSError as error:
        logger.warning("cannot send %s to NOTIFY_SOCKET %s: %s", state, address, error)


def activated() -> tuple[int, str] | None:
    """Return the listening socket that this process was started with, and its address.

    See sd_listen_fds(3). Return None if there is none. Raise `ConfigError` if a broker cannot
    listen at it.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    if (count := os.environ.get("LISTEN_FDS")) != "1":
        raise ConfigError(f"LISTEN_FDS: the broker listens at one socket, not at {count}")
    os.set_inheritable(_FIRST_FD, False)
    listener = socket.socket(fileno=_FIRST_FD)
    try:
        name = listener.getsockname()
        families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
        if listener.type != socket.SOCK_STREAM or listener.family not in families:
            raise ConfigError(
                "LISTEN_FDS: the socket must be a stream at a path or a port (ListenStream=)"
            )
        if listener.family == socket.AF_UNIX:
            return _FIRST_FD, f"ipc://{os.fsdecode(name)}"
        host = f"[{name[0]}]" if listener.family == socket.AF_INET6 else name[0]
        return _FIRST_FD, f"tcp://{host}:{name[1]}"
    finally:
        listener.detach()
