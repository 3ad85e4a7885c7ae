"""The space in which a process id is unique: one boot of one machine, and one PID namespace."""

from __future__ import annotations

import os
from io import FileIO

_BOOT = "/proc/sys/kernel/random/boot_id"


def pid_namespace_id() -> str:
    """Return a text that two processes share only if they see the same process ids.

    It is empty where the kernel does not tell. A host's name would not do: the containers of a pod
    share it, and so do a machine and its clone.
    """
    try:
        with FileIO(_BOOT) as file:
            boot = file.read(100).decode().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def pid_namespace(identity: str) -> str:
    """Return the namespace part of `pid_namespace_id`, as `lsns` shows it."""
    return identity.rpartition(" ")[2]
