"""Whether anybody is between a connection and its backend: a proxy, a pooler, an address translation.

The end of a socket is the backend's end only where the other end of it is the backend's own. A proxy's end may come
long before that: HAProxy closes both sides while a query goes on, others close the server's side later.

What the server says of the connection is compared with the socket:

- TCP: both addresses and both ports must be the same at either end. Two connections of one network cannot have all four
  in common, so a proxy cannot; an address translation (a container's published port, a cluster's service) changes one,
  and is taken for a proxy. A proxy that forges its client's address and its server's is not found out.
- A unix socket has no addresses, but the kernel tells who listens: the postmaster, whose child the backend is. That is
  looked for in /proc. Where it cannot be seen (another container that shares the socket's directory, processes hidden
  by `hidepid`, other systems than Linux), nobody knows.

What is not known counts as "somebody is in between": then the broker asks the server.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from io import FileIO
from pathlib import Path

from sharedpool.postgres.peer_closed import Borrowed

_UCRED = struct.Struct("3i")  # pid, uid, gid
_SO_PEERCRED: int = getattr(socket, "SO_PEERCRED", 0)
# What a backend calls itself in its process title (PostgreSQL's ps_status.c): no proxy's child is taken for one.
_TITLE = b"postgres: "
_POSTMASTER = (b"postgres", b"postmaster")
# More than a process's status has, and more than what matters of its command line.
_MOST_BYTES = 16384

Address = tuple[str, int]


def is_direct(fd: int, pid: int, ends: tuple[Address, Address] | None) -> bool:
    """Say whether the other end of a socket is held by backend `pid`, and nobody else is in between.

    `ends` are the client's and the server's address and port as the server knows them; None for a unix socket.
    """
    sock = Borrowed(fileno=fd)
    try:
        if sock.family == socket.AF_UNIX:
            return ends is None and _is_child_of_listener(sock, pid)
        if ends is None:
            return False
        ours = (_address(*sock.getsockname()[:2]), _address(*sock.getpeername()[:2]))
        return ours == (_address(*ends[0]), _address(*ends[1]))
    except (OSError, ValueError):
        return False


def _address(host: str, port: int) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    """Return an address to be compared: a host may listen for IPv4 on an IPv6 socket, and name the interface."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return mapped or ip, port


def is_to_postmaster(fd: int) -> bool:
    """Say whether PostgreSQL itself listens at the other end of a unix socket; False for any other, and if unknown.

    For a connect that was refused: there is no backend to ask who its client is.
    """
    sock = Borrowed(fileno=fd)
    try:
        if sock.family != socket.AF_UNIX or not _SO_PEERCRED:
            return False
        listener, _, _ = _UCRED.unpack(
            sock.getsockopt(socket.SOL_SOCKET, _SO_PEERCRED, _UCRED.size)
        )
        program = _read(f"/proc/{listener}/cmdline").partition(b"\0")[0]
    except OSError:
        return False
    return program.rpartition(b"/")[2] in _POSTMASTER


def _is_child_of_listener(sock: Borrowed, pid: int) -> bool:
    """Say whether `pid` is a backend and a child of the process that listens at a unix socket's other end.

    The server may count its processes in a PID namespace below ours: then the child has that pid there.
    """
    if not _SO_PEERCRED:
        return False
    listener, _, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERCRED, _UCRED.size))
    if listener <= 0:
        return False  # in a namespace that we do not see into
    if _is(pid, pid, parent=listener):
        return True
    if len(_family(listener)[1]) == 1:
        return False  # it counts as we do, and that is no child of it
    children = Path(f"/proc/{listener}/task/{listener}/children").read_text().split()
    return any(_is(int(child), pid) for child in children)


def _is(process: int, pid: int, parent: int | None = None) -> bool:
    """Say whether our process of that number is the backend that its server knows as `pid`.

    With `parent`: and its child, the server counting as we do. No child's namespace is above its parent's.
    """
    try:
        above, pids = _family(process)
        if parent is not None and (above != parent or len(pids) != 1):
            return False
        return pids[-1] == pid and _read(f"/proc/{process}/cmdline").startswith(_TITLE)
    except OSError:
        return False  # another one, that has ended meanwhile


def _family(pid: int) -> tuple[int, list[int]]:
    """Return the pid of a process's parent, and its own pids, from our namespace inwards."""
    status = _read(f"/proc/{pid}/status")
    parent = status.partition(b"\nPPid:")[2].partition(b"\n")[0]
    own = status.partition(b"\nNSpid:")[2].partition(b"\n")[0]
    return int(parent), [int(number) for number in own.split()] or [pid]


def _read(path: str) -> bytes:
    """Return the beginning of a file of /proc; with half the system calls of `Path.read_bytes`."""
    with FileIO(path) as file:
        return file.read(_MOST_BYTES)
