"""Wake a waiting thread: by a descriptor if it waits for others too, else by a lock."""

from __future__ import annotations

import socket
import threading

from sharedpool.descriptors.owned import close_if_ours, identity, is_still


class Wakeup:
    """A datagram socket that is connected to itself. Raise OSError if it cannot be made.

    Unlike an eventfd it can be told from all other files, whatever number it has.
    """

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._sock.setblocking(False)
            self._sock.bind("")  # the kernel chooses an abstract address
            self._sock.connect(self._sock.getsockname())
            self._known = (identity(self._sock.fileno()),)
        except BaseException:
            self._sock.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor, readable after `wake`; -1 once closed."""
        return self._sock.fileno()

    def wake(self) -> None:
        """Wake the thread that waits here. May be called by any thread, and too late."""
        if is_still(self.fileno(), self._known):
            try:
                self._sock.send(b"\0")
            except OSError:
                pass  # full: it wakes anyway; closed: it does not wait any more

    def clear(self) -> None:
        """Handle a wake-up: the descriptor is no longer readable."""
        try:
            while is_still(self.fileno(), self._known):
                self._sock.recv(1)
        except OSError:
            pass  # everything is read

    def close(self) -> None:
        """Close the socket, unless another file has its number by now."""
        close_if_ours(self._sock, self._known)


class WaitLock:
    """A place to wait without a descriptor: only threads of this process can wake it."""

    place = -1  # in the lane: none

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wake(self) -> None:
        """Wake the thread that waits here, or the next one that will."""
        try:
            self._lock.release()
        except RuntimeError:
            pass  # woken already

    def wait(self, timeout_s: float) -> None:
        """Block until `wake` was called, at most `timeout_s` seconds."""
        # A lock's timeout has an upper bound.
        self._lock.acquire(timeout=min(max(0.0, timeout_s), 1000.0))
