"""Packets with descriptors, over SEQPACKET sockets: what `socket.send_fds` and `recv_fds` do, in fewer steps."""

from __future__ import annotations

import socket
import struct

_INT = struct.Struct("i")
_MOST = 8  # in one packet; our own have one at most
_CLOSE_ON_EXEC = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
CUT_SHORT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)


def send_with(line: socket.socket, packet: bytes, fd: int) -> None:
    """Send a packet with a descriptor; the receiver gets a duplicate. Raise OSError."""
    line.sendmsg((packet,), ((socket.SOL_SOCKET, socket.SCM_RIGHTS, _INT.pack(fd)),))


def receive(line: socket.socket, limit_bytes: int) -> tuple[bytes, list[int], bool]:
    """Return a packet, its descriptors (the caller's now, closed on exec), and whether it has come whole.

    Raise OSError. Blocks unless the socket is not to.
    """
    packet, ancillary, flags, _ = line.recvmsg(limit_bytes, socket.CMSG_SPACE(_MOST * _INT.size), _CLOSE_ON_EXEC)
    fds = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += [fd for (fd,) in _INT.iter_unpack(data[: len(data) - len(data) % _INT.size])]
    return packet, fds, not flags & CUT_SHORT
