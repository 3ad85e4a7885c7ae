"""One broker per address: an advisory lock that the kernel drops with its holder.

libzmq unlinks an ipc path that is already bound and takes it over, so the socket itself keeps nobody out. The lock file
also remembers the last epoch, so that tokens of two brokers can never be the same, and the *instance*, by which the
server shows whose connections are whose.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from sharedpool.errors import SharedPoolError

# `is_held` takes the lock for some microseconds; a broker that starts just then must not take that for another broker.
_PROBES_PASS_S = 0.5


class AlreadyRunning(SharedPoolError):
    """Another broker holds this address."""


class BrokerLock:
    """The lock on one address, held while the broker lives.

    `epoch` is this broker's number, `first` tells that no other had the file before, `instance` is the address's own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = _open(path)
        if not _take(self._fd):
            holder = _fields(self._fd)
            os.close(self._fd)
            pid = f" (process {holder[1]})" if len(holder) > 1 else ""
            raise AlreadyRunning(f"a broker{pid} already holds {path}")
        fields = _fields(self._fd)
        self.first = not (fields and fields[0].isdigit())
        # A first epoch that no broker had whose file is lost: milliseconds, for it may have begun in this very second.
        self.epoch = int(time.time() * 1000) if self.first else int(fields[0]) + 1
        self.instance = fields[2] if len(fields) > 2 else os.urandom(4).hex()
        self._write()

    def outgrow(self, epoch: int) -> None:
        """Have a number above this one, a former broker's: the file may be lost, and the clock may have gone back."""
        if epoch >= self.epoch:
            self.epoch = epoch + 1
            self._write()

    def _write(self) -> None:
        # Unlinked only where no other broker can come: a second inode under the same name would be a second lock.
        os.pwrite(self._fd, f"{self.epoch} {os.getpid()} {self.instance}\n".encode().ljust(64), 0)

    def is_ours(self) -> bool:
        """Say whether the file is still at its path, and keep cleaners of temporary directories from taking it."""
        os.utime(self._fd)
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def mend(self) -> bool:
        """Put the file back where it was deleted; return False if another broker has the address by now.

        Blocks for up to half a second. Raise OSError when it cannot be.
        """
        fd = _open(self.path)
        if not _take(fd):
            os.close(fd)
            return False
        os.close(self._fd)
        self._fd = fd
        self._write()
        return True

    def release(self, *, for_good: bool = False) -> None:
        """Let another broker have the address. `for_good`: nobody will, so the file goes too."""
        if for_good:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)


def is_held(path: Path) -> bool:
    """Say whether a broker lives at the address of this lock file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(fd, fcntl.LOCK_SH)
    finally:
        fcntl.flock(
            fd, fcntl.LOCK_UN
        )  # a child forked just now has a copy: closing ours would not unlock
        os.close(fd)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _take(fd: int) -> bool:
    """Lock a file for a broker, unless another has it."""
    deadline = time.monotonic() + _PROBES_PASS_S
    while not _try_lock(fd, fcntl.LOCK_EX):
        # A shared lock can be had beside those who only look (`is_held`), never beside a broker.
        if not _try_lock(fd, fcntl.LOCK_SH) or time.monotonic() >= deadline:
            return False
        fcntl.flock(fd, fcntl.LOCK_UN)
        time.sleep(0.01)
    return True


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _fields(fd: int) -> list[str]:
    return os.pread(fd, 64, 0).decode("ascii", "replace").split()
