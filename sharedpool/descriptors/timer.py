"""A timer with a descriptor: to set it does not wake the thread that waits for it."""

from __future__ import annotations

import ctypes
import os

_CLOCK_MONOTONIC, _FLAGS = 1, os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)


class _Spec(ctypes.Structure):
    """Linux's itimerspec."""

    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "after_s", "after_ns")]


class Timer:
    """A one-shot timer of the kernel (timerfd_create(2)). Raise OSError if there is none."""

    def __init__(self) -> None:
        try:
            libc = ctypes.PyDLL(None)  # nothing that is called here blocks
            self._set, self._number = (
                libc.timerfd_settime,
                libc.timerfd_create(_CLOCK_MONOTONIC, _FLAGS),
            )
        except (AttributeError, OSError) as error:
            raise OSError("the system has no timerfd") from error
        if self._number < 0:
            raise OSError("no timer can be made")
        self.armed = False

    def fileno(self) -> int:
        """Return the descriptor, which becomes readable when the time is over."""
        return int(self._number)

    def arm(self, after_s: float, *, anew: bool = False) -> None:
        """Set the timer, unless it is set; `anew` sets it in any case."""
        if anew or not self.armed:
            self.armed = True
            self._write(after_s)

    def disarm(self) -> None:
        """Stop the timer."""
        if self.armed:
            self.armed = False
            self._write(0.0)

    def clear(self) -> None:
        """Handle the end of the time: the descriptor is no longer readable.

        The timer is set anew for that. To read it would be to read another file, if that has the
        number by now.
        """
        self.armed = False
        self._write(0.0)

    def _write(self, after_s: float) -> None:
        """Set the time. The system call does nothing if another file has the number by now."""
        spec = _Spec(0, 0, int(after_s), int(after_s % 1 * 1e9))
        self._set(self._number, 0, ctypes.byref(spec), None)

    def close(self) -> None:
        """Close the timer, unless another file has its number by now."""
        number, self._number = self._number, -1
        if _is_timer(number):
            os.close(number)


def _is_timer(number: int) -> bool:
    """Return True if a timer has this number. All anonymous inodes have one inode number."""
    try:
        return os.readlink(f"/proc/self/fd/{number}") == "anon_inode:[timerfd]"
    except OSError:
        return False
