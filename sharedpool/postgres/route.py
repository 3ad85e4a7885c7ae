"""Whether something is between a connection and its backend, such as a proxy or a pooler.

The end of a socket proves the backend's end only if the backend itself holds the other end. A
proxy's end may come long before: HAProxy closes both sides during a query, others close the
server's side later.

What the server says of the connection is compared with the socket:

- TCP: both addresses and both ports must be the same at either end. Two connections in one network
  cannot share all four, so a proxy's two connections differ. An address translation (a container's
  published port, a cluster's service) changes one of the four and is taken for a proxy. A proxy
  that forges both addresses is not noticed.
- A unix socket has no addresses, but the kernel tells which process listens: the postmaster, the
  backend's parent. That is checked in /proc. It cannot be where the processes are not visible: in
  another container that shares the socket's directory, with `hidepid`, or on other systems than
  Linux.

If the answer is unknown, something counts as in between. Then the broker asks the server.
"""

from __future__ import annotations

import socket
import struct
from io import FileIO
from pathlib import Path

from sharedpool.postgres.peer_closed import Borrowed

_UCRED = struct.Struct("3i")  # pid, uid, gid
_SO_PEERCRED: int = getattr(socket, "SO_PEERCRED", 0)
# The start of a backend's process title (PostgreSQL's ps_status.c), which no proxy's child has.
_TITLE = b"postgres: "
_POSTMASTER = (b"postgres", b"postmaster")
_IPV4_IN_IPV6 = bytes(10) + b"\xff\xff"
# More than the status of a process has, and more than is needed of its command line.
_MAX_BYTES = 16384

Address = tuple[str, int]


def is_direct(fd: int, pid: int, ends: tuple[Address, Address] | None) -> bool:
    """Return True if backend `pid` holds the other end of a socket, with nothing in between.

    `ends` are the addresses of client and server as the server knows them; None for a unix socket.
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


def _address(host: str, port: int) -> tuple[bytes, int]:
    """Return an address to compare: without the interface's name, IPv4 in its own form.

    Raise OSError for what is no address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.inet_pton(family, host.partition("%")[0]).removeprefix(_IPV4_IN_IPV6), port


def is_to_postmaster(fd: int) -> bool:
    """Return True if PostgreSQL itself listens at the other end of a unix socket; False if unknown.

    This is for a refused connect, where no backend can be asked for its client.
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
    """Return True if `pid` is a backend and a child of the process that listens on a unix socket.

    The server may run in a PID namespace below ours. Then the child has that pid there.
    """
    if not _SO_PEERCRED:
        return False
    listener, _, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERCRED, _UCRED.size))
    if listener <= 0:
        return False  # in a namespace that is not visible from ours
    if _is(pid, pid, parent=listener):
        return True
    if len(_family(listener)[1]) == 1:
        return False  # the server is in our namespace, and `pid` is not its child
    children = Path(f"/proc/{listener}/task/{listener}/children").read_text().split()
    return any(_is(int(child), pid) for child in children)


def _is(process: int, pid: int, parent: int | None = None) -> bool:
    """Return True if a process here is the backend that its server knows as `pid`.

    With `parent` it must also be a child of that process, and the server in our PID namespace. (A
    child's namespace is never above its parent's.)
    """
    try:
        above, pids = _family(process)
        if parent is not None and (above != parent or len(pids) != 1):
            return False
        return pids[-1] == pid and _read(f"/proc/{process}/cmdline").startswith(_TITLE)
    except OSError:
        return False  # a process that has ended meanwhile


def _family(pid: int) -> tuple[int, list[int]]:
    """Return the pid of a process's parent, and the process's pids from our namespace inwards."""
    status = _read(f"/proc/{pid}/status")
    parent = status.partition(b"\nPPid:")[2].partition(b"\n")[0]
    own = status.partition(b"\nNSpid:")[2].partition(b"\n")[0]
    return int(parent), [int(number) for number in own.split()] or [pid]


def _read(path: str) -> bytes:
    """Read the start of a file in /proc, with half the system calls of `Path.read_bytes`."""
    with FileIO(path) as file:
        return file.read(_MAX_BYTES)
