"""Where a process id means something: this boot of this machine, and this PID namespace."""

from __future__ import annotations

import os
from io import FileIO

_BOOT = "/proc/sys/kernel/random/boot_id"


def pid_namespace_id() -> str:
    """Return the same text in two processes only if they have the same pids; empty where the kernel does not say.

    A host's name is no such proof: containers of one pod share it, and so does a machine with its clone.
    """
    try:
        with FileIO(_BOOT) as file:
            boot = file.read(100).decode().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def pid_namespace(place: str) -> str:
    """Return the PID namespace of a place, as `lsns` and `ls -l /proc/PID/ns/pid` have it."""
    return place.rpartition(" ")[2]
