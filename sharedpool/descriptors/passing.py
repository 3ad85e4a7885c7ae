"""Packets with descriptors, over SEQPACKET sockets: what `socket.send_fds` and `recv_fds` do, in fewer steps."""

from __future__ import annotations

import _socket
import socket
import struct
from collections.abc import Sequence
from functools import partial
from itertools import chain, starmap
from operator import itemgetter

from sharedpool.descriptors.owned import Owned

_INT = struct.Struct("i")
_MOST = 8  # in one packet; our own have one at most
_SPACE = socket.CMSG_SPACE(_MOST * _INT.size)
_CLOEXEC = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
CUT_SHORT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)


def send_with(line: _socket.socket, packet: bytes, fd: int) -> None:
    """Send a packet with a descriptor; the receiver gets a duplicate. Raise OSError."""
    line.sendmsg((packet,), ((socket.SOL_SOCKET, socket.SCM_RIGHTS, _INT.pack(fd)),))


def send_with_to(sock: _socket.socket, packet: bytes, fd: int, address: str) -> None:
    """The same as one datagram to an address."""
    sock.sendmsg((packet,), ((socket.SOL_SOCKET, socket.SCM_RIGHTS, _INT.pack(fd)),), 0, address)


def send_with_all(line: socket.socket, packet: bytes, fds: Sequence[int]) -> None:
    """Send a packet with descriptors; the receiver gets duplicates. Raise OSError."""
    numbers = b"".join(map(_INT.pack, fds))
    line.sendmsg((packet,), ((socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers),))


def receive(line: socket.socket, limit_bytes: int) -> tuple[bytes, list[int], bool]:
    """Return a packet, its descriptors (the caller's now, closed on exec), and whether it has come whole.

    Raise OSError. Blocks unless the socket is not to.
    """
    packet, ancillary, flags, _ = line.recvmsg(limit_bytes, _SPACE, _CLOEXEC)
    fds = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += [fd for (fd,) in _INT.iter_unpack(data[: len(data) - len(data) % _INT.size])]
    return packet, fds, not flags & CUT_SHORT


# Of what recvmsg returns: the data of each ancillary message; the numbers in it; their owners. Of which kind a socket
# is makes no difference to what is done with it, and asking takes two system calls.
_data, _numbers, _join = (
    partial(map, itemgetter(2)),
    partial(map, _INT.iter_unpack),
    chain.from_iterable,
)
_own = partial(starmap, partial(Owned, socket.AF_UNIX, socket.SOCK_STREAM, 0))


def receive_sockets(line: _socket.socket, limit_bytes: int) -> tuple[bytes, list[Owned]]:
    """Return a packet that another process has sent and the sockets that came with it. Raise OSError.

    One line, all of it C: an interrupt finds a socket in the packet or with its owner.
    """
    socks = [*_own(_join(_numbers(_data((got := line.recvmsg(limit_bytes, _SPACE, _CLOEXEC))[1]))))]
    return got[0], socks
