"""Packets with descriptors, over unix sockets: `socket.send_fds` and `recv_fds` in fewer steps."""

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
_MOST = 8  # descriptors in a packet; ours have fewer
_SPACE = socket.CMSG_SPACE(_MOST * _INT.size)
_FLAGS = int(getattr(socket, "MSG_CMSG_FLAGS", 0))
CUT_SHORT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)


def send_with(line: _socket.socket, packet: bytes, fd: int) -> None:
    """Send a packet with a descriptor; the receiver gets a duplicate. Raise OSError."""
    line.sendmsg((packet,), ((socket.SOL_SOCKET, socket.SCM_RIGHTS, _INT.pack(fd)),))


def send_with_to(sock: _socket.socket, packet: bytes, fd: int, address: str) -> None:
    """Send a packet with a descriptor, as one datagram to an address. Raise OSError."""
    sock.sendmsg((packet,), ((socket.SOL_SOCKET, socket.SCM_RIGHTS, _INT.pack(fd)),), 0, address)


def send_with_all(line: socket.socket, packet: bytes, fds: Sequence[int]) -> None:
    """Send a packet with descriptors; the receiver gets duplicates. Raise OSError."""
    numbers = b"".join(map(_INT.pack, fds))
    line.sendmsg((packet,), ((socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers),))


def receive(line: socket.socket, limit_bytes: int) -> tuple[bytes, list[int], bool]:
    """Return a packet, its descriptors, and whether it is whole.

    The descriptors are the caller's, and closed on exec. Blocks if the socket does. Raise OSError.
    """
    packet, ancillary, flags, _ = line.recvmsg(limit_bytes, _SPACE, _FLAGS)
    fds = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += [fd for (fd,) in _INT.iter_unpack(data[: len(data) - len(data) % _INT.size])]
    return packet, fds, not flags & CUT_SHORT


# Steps from what recvmsg returns to sockets, all in C: the data of each ancillary message, the
# numbers in it, their owners. Every owner is called a unix stream socket: the kind makes no
# difference to what is done with it, and asking for it takes two system calls.
_data, _numbers = partial(map, itemgetter(2)), partial(map, _INT.iter_unpack)
_joined = chain.from_iterable
_owned = partial(starmap, partial(Owned, socket.AF_UNIX, socket.SOCK_STREAM, 0))


def receive_sockets(line: _socket.socket, max_bytes: int) -> tuple[bytes, list[Owned]]:
    """Return a packet from another process and the sockets that came with it. Raise OSError."""
    # One line, all of it in C, so that an interrupt finds a socket either unread or with an owner.
    socks = [*_owned(_joined(_numbers(_data((got := line.recvmsg(max_bytes, _SPACE, _FLAGS))[1]))))]
    return got[0], socks
