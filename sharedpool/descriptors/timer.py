"""What wakes a thread that waits for descriptors at a later time, and does not wake it for being set."""

from __future__ import annotations

import ctypes
import os

_CLOCK_MONOTONIC, _FLAGS = 1, os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)


class _Spec(ctypes.Structure):
    """Linux's itimerspec: when, and how often; seconds and nanoseconds."""

    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "after_s", "after_ns")]


class Timer:
    """A timer of the kernel's (timerfd_create(2)), for one moment. Raise OSError where it cannot be had."""

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
            raise OSError("no timer can be had")
        self.armed = False

    def fileno(self) -> int:
        """Return the descriptor, which becomes readable at that moment."""
        return int(self._number)

    def arm(self, after_s: float, *, anew: bool = False) -> None:
        """Set it, unless it is set; `anew`: set it in any case."""
        if anew or not self.armed:
            self.armed = True
            self._write(after_s)

    def disarm(self) -> None:
        """Set it to no time."""
        if self.armed:
            self.armed = False
            self._write(0.0)

    def clear(self) -> None:
        """Take in that the moment has come."""
        self.armed = False
        self._write(
            0.0
        )  # which makes it unreadable; to read it would be to read whatever has its number by now

    def _write(self, after_s: float) -> None:
        """Set the time; fails, and does nothing, where the number is something else's by now."""
        spec = _Spec(0, 0, int(after_s), int(after_s % 1 * 1e9))
        self._set(self._number, 0, ctypes.byref(spec), None)

    def close(self) -> None:
        """Close it, unless its number is something else's by now."""
        number, self._number = self._number, -1
        if _is_timer(number):
            os.close(number)


def _is_timer(number: int) -> bool:
    """Say whether a timer has this number: by its inode it is not told from a poller or an event counter."""
    try:
        return os.readlink(f"/proc/self/fd/{number}") == "anon_inode:[timerfd]"
    except OSError:
        return False
