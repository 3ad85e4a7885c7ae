"""Whether the other side has closed a connection, or the connection has failed.

A socket shows the same end (POLLRDHUP, end of file) in two cases: the other side has closed it, or
it has failed here, by a reset or a time-out. A reset may come from a firewall in between. After a
failure the backend may live on.
"""

from __future__ import annotations

import _socket
import array
import fcntl
import socket
import struct
import termios

# TCP states of Linux (include/net/tcp_states.h) in which the other side's FIN has been received.
_TIME_WAIT, _CLOSE, _CLOSE_WAIT, _LAST_ACK, _CLOSING = 6, 7, 8, 9, 11
_FIN_RECEIVED = (_TIME_WAIT, _CLOSE_WAIT, _LAST_ACK, _CLOSING)
_TCP_INQ = 36  # both the option and the ancillary message (include/uapi/linux/tcp.h)
_INT = struct.Struct("i")


class Borrowed(_socket.socket):  # not `socket.socket`, which gevent replaces
    """A socket object on a descriptor of another owner. It never closes the descriptor.

    A `detach()` after each use would not do, as an interrupt before it would leave the object to a
    closing finalizer.
    """

    __del__ = _socket.socket.detach  # written in C, so no interrupt falls into it


def borrow(fd: int) -> Borrowed:
    """Return a socket object on a stream of any family, to send and receive only.

    It takes the three system calls less that ask for the socket's real family, type and protocol.
    """
    return Borrowed(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd)


def other_side_closed(fd: int) -> bool:
    """Return True if the other side has closed a socket on which POLLRDHUP was seen. Linux only.

    For TCP only a FIN proves that. Return False where the kernel cannot tell (before Linux 5.1,
    once both sides are closed). Does not block.
    """
    try:
        sock = Borrowed(fileno=fd)
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return True  # a unix socket neither fails nor loses anything
        state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        return state in _FIN_RECEIVED or (state == _CLOSE and _has_fin(sock))
    except OSError:
        return False


def _has_fin(sock: Borrowed) -> bool:
    """Return True if a TCP socket reached its last state by the other side's FIN.

    A reset or a time-out leaves an error, but the kernel tells that only once, perhaps to the
    reader of another duplicate. A FIN counts as one byte that is never read (tcp_inq_hint in
    Linux's tcp.c). So after a FIN the kernel reports one more byte than can be read.
    """
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_INQ, 1)
    unread = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, unread)
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
    data, messages, _, _ = sock.recvmsg(unread[0] + 1, socket.CMSG_SPACE(_INT.size), flags)
    for level, kind, value in messages:
        if (level, kind) == (socket.IPPROTO_TCP, _TCP_INQ):
            # Nothing more arrives. If another duplicate's reader takes bytes meanwhile, the answer
            # is a wrong False, which is safe.
            return int(_INT.unpack(value)[0]) > len(data)
    return False
