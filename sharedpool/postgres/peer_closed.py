"""Who has ended a connection: the other side, or only this one.

A socket shows its end (POLLRDHUP, end of file) when the other side has closed it, and just so when it has died here: a
RST, be it from a firewall between the two, or a time-out. A backend may live on behind the latter.
"""

from __future__ import annotations

import _socket
import array
import fcntl
import socket
import struct
import termios

# Linux's TCP states (include/net/tcp_states.h) in which the other side's FIN has been received.
_TIME_WAIT, _CLOSE, _CLOSE_WAIT, _LAST_ACK, _CLOSING = 6, 7, 8, 9, 11
_FIN_RECEIVED = (_TIME_WAIT, _CLOSE_WAIT, _LAST_ACK, _CLOSING)
_TCP_INQ = 36  # both the option and the ancillary message (include/uapi/linux/tcp.h)
_INT = struct.Struct("i")


class Borrowed(_socket.socket):  # not `socket.socket`, for which gevent puts one of its own
    """A socket object on a descriptor that belongs to somebody else: used, but never closed.

    `detach()` alone would not do: an interrupt just before it leaves the object to its finalizer, which closes.
    """

    __del__ = _socket.socket.detach  # the finalizer; C, so that no interrupt falls into it


def borrow(fd: int) -> Borrowed:
    """Return a socket object on a stream, whatever its family, that is only sent to and received from.

    Its kind is not asked for: that takes three system calls.
    """
    return Borrowed(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd)


def other_side_closed(fd: int) -> bool:
    """Say of a socket on which POLLRDHUP was seen whether the other side has closed it. Linux; does not block.

    For TCP only a FIN proves that. False where the kernel cannot tell (before Linux 5.1, once both sides are closed).
    """
    try:
        sock = Borrowed(fileno=fd)
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return True  # within one kernel nothing is lost
        state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        return state in _FIN_RECEIVED or (state == _CLOSE and _has_fin(sock))
    except OSError:
        return False


def _has_fin(sock: Borrowed) -> bool:
    """Say of a TCP socket in its last state how it came there: with the other side's FIN, or by a RST or a time-out.

    An error would tell, but is told only once, perhaps to another duplicate's reader. A FIN counts as one byte that is
    never read (tcp_inq_hint in Linux's tcp.c): there is more to come than can be read.
    """
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_INQ, 1)
    unread = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, unread)
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
    data, messages, _, _ = sock.recvmsg(unread[0] + 1, socket.CMSG_SPACE(_INT.size), flags)
    for level, kind, value in messages:
        if (level, kind) == (socket.IPPROTO_TCP, _TCP_INQ):
            # Nothing more is received. Read elsewhere meanwhile, there is less: that errs on the side of "no".
            return int(_INT.unpack(value)[0]) > len(data)
    return False
