"""One broker per address: an advisory lock, which the kernel releases when its holder ends.

The socket alone excludes no second broker, because libzmq unlinks a bound ipc path and takes it
over. The file also stores the last epoch, so that two brokers never grant the same token. And it
stores the *instance*: the id of the address in the `application_name` of its workers' connections.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from sharedpool.errors import SharedPoolError

# `is_held` takes the lock for some microseconds. A starting broker must not take that for another
# broker, so it tries for this long.
_PROBES_PASS_S = 0.5


class AlreadyRunning(SharedPoolError):
    """Another broker holds this address."""


class BrokerLock:
    """The lock on one address, held while the broker lives. Raise `AlreadyRunning` if it is taken.

    `epoch` is the number of this broker, higher than that of every former one. `first`: there was
    no former broker, or its file is lost. `instance` is the id of the address.
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
        # If a former broker's file is lost, this epoch must still be higher than its epochs.
        # Milliseconds, because that broker may have started in this very second.
        self.epoch = int(time.time() * 1000) if self.first else int(fields[0]) + 1
        self.instance = fields[2] if len(fields) > 2 else os.urandom(4).hex()
        self._write()

    def outgrow(self, epoch: int) -> None:
        """Raise our epoch above that of a former broker.

        Ours may be lower if the former file is lost and the clock has been set back.
        """
        if epoch >= self.epoch:
            self.epoch = epoch + 1
            self._write()

    def _write(self) -> None:
        # In place: a second file under the same name would be a second lock.
        os.pwrite(self._fd, f"{self.epoch} {os.getpid()} {self.instance}\n".encode().ljust(64), 0)

    def is_ours(self) -> bool:
        """Return True if our file is still at its path.

        Also update its time, so that cleaners of temporary directories leave it alone.
        """
        os.utime(self._fd)
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def recreate(self) -> bool:
        """Create the file again after it was deleted.

        Return False if another broker has the address by now. Block for up to half a second. Raise
        OSError if the file cannot be created.
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
        """Release the lock. `for_good`: also delete the file, since no later broker needs it."""
        if for_good:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)


def is_held(path: Path) -> bool:
    """Return True if a broker runs at the address of this lock file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(fd, fcntl.LOCK_SH)
    finally:
        # Closing would not unlock if a child was forked meanwhile: it has a copy of the descriptor.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _take(fd: int) -> bool:
    """Lock the file for a broker. Return False if another broker has locked it."""
    deadline = time.monotonic() + _PROBES_PASS_S
    while not _try_lock(fd, fcntl.LOCK_EX):
        # A shared lock is possible beside the one of `is_held`, but not beside a broker's.
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
