"""What wakes a thread: a descriptor, where it waits for others too, or a lock, where it waits for nothing else."""

from __future__ import annotations

import socket
import threading

from sharedpool.descriptors.owned import close_if_ours, identity, is_still


class Wakeup:
    """A datagram socket that is its own other end: what is sent on it can be read on it, by nobody else.

    Raise OSError when it cannot be had. Unlike an eventfd it can be told from all other files, whatever number it has.
    """

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._sock.setblocking(False)
            self._sock.bind("")  # the kernel finds a name: there is no file
            self._sock.connect(self._sock.getsockname())
            self._known = (identity(self._sock.fileno()),)
        except BaseException:
            self._sock.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor, which becomes readable when it was rung; -1 when closed."""
        return self._sock.fileno()

    def wake(self) -> None:
        """Wake who waits here. From any thread; too late is no harm."""
        if is_still(self.fileno(), self._known):
            try:
                self._sock.send(b"\0")
            except OSError:
                pass  # full: awake already; closed meanwhile: over

    def clear(self) -> None:
        """Take in that it was rung."""
        try:
            while is_still(self.fileno(), self._known):
                self._sock.recv(1)
        except OSError:
            pass  # all is read

    def close(self) -> None:
        """Close it, unless its number is somebody else's by now."""
        close_if_ours(self._sock, self._known)


class WaitLock:
    """A place to wait that takes no descriptor: woken by other threads of this process alone."""

    number = -1

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wake(self) -> None:
        """Wake who waits here, or the next who comes to wait."""
        try:
            self._lock.release()
        except RuntimeError:
            pass  # rung already

    def wait(self, timeout_s: float) -> None:
        """Block until `wake` was called, at most `timeout_s` seconds."""
        self._lock.acquire(
            timeout=min(max(0.0, timeout_s), 1000.0)
        )  # a lock's timeout has an upper bound
