"""The journal: every lease that was granted and is not known to be free, in a file beside the lock.

It lets the next broker know what is held. There is one JSON line per event, written before the
grant is sent:

- a lease (again when its backend is known), or that a token's slot is free;
- a session that is let into a lane, or has left it;
- an incarnation of PostgreSQL that the control connection has seen: without it a broker that is
  started after a server's restart could not tell which backends that has ended.

A killed broker loses nothing that was written, as the page cache is the kernel's. A machine that
goes down takes the workers along. A last line that is cut short is one whose grant was never sent.

A journal that begins without a former one is `partial` until its broker knows all that may be held.
If that broker dies earlier, the next one must not trust the journal either.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import msgspec

from sharedpool.broker.core.commands import Entry, Member, ServerIncarnation
from sharedpool.wire.values import Token

logger = logging.getLogger("sharedpool.broker")

# The file is rewritten when it has grown by this much. The live leases are few.
_COMPACT_BYTES = 1 << 20
_VERSION = 2
# Older servers than the last so many have no lease left. Each may have two names.
_SERVERS_KEPT = 32


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    version: int = 0
    partial: bool = False
    lease: Entry | None = None
    free: Token | None = None
    server: ServerIncarnation | None = None
    member: Member | None = None
    left: bytes | None = None


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(_Line)


class Journal:
    """One broker's journal. The address's lock must be held."""

    def __init__(self, path: Path) -> None:
        """Read the former broker's journal, and begin a new one. Raise OSError if that fails."""
        self._path = path
        self._live: dict[Token | bytes, bytes] = {}  # lines that count, by token or by session
        # False if leases may be missing: the file was not there, is partial, or cannot be read.
        self.intact = True
        self.members: list[Member] = []  # of the former broker's lanes
        self.servers: list[ServerIncarnation] = []  # that were seen, the newest last
        self.entries = self._load()
        self._partial = not self.intact
        self._fd = -1
        self._size = 0
        self._unwritten: list[bytes] = []
        self._compact()

    def _load(self) -> list[Entry]:
        """Read the former journal; return its leases, and set the other attributes."""
        found: dict[Token, Entry] = {}
        members: dict[bytes, Member] = {}
        try:
            first, *lines = self._read_lines()
            version = _decoder.decode(first)
            if version.version != _VERSION:
                raise msgspec.DecodeError("another version's")
            self.intact = not version.partial
            for text in lines:
                line = _decoder.decode(text)
                if line.lease is not None:
                    found[line.lease.token] = line.lease
                elif line.free is not None:
                    found.pop(line.free, None)
                elif line.member is not None:
                    members[line.member.session] = line.member
                elif line.left is not None:
                    members.pop(line.left, None)
                elif line.server is not None:
                    self._note(line.server)
        except FileNotFoundError:
            self.intact = False
        except msgspec.DecodeError:
            self.intact = False  # the lines before this one are still true
        for entry in found.values():
            self._live[entry.token] = _encode(_Line(lease=entry))
        for member in members.values():
            self._live[member.session] = _encode(_Line(member=member))
        self.members = list(members.values())
        return list(found.values())

    def _read_lines(self) -> list[bytes]:
        """Return the file's lines, without one that is cut short at its end."""
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with open(fd, "rb") as file:
            if os.fstat(fd).st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "it belongs to another user", str(self._path))
            data = file.read()
        whole, _, _ = data.rpartition(b"\n")
        return whole.split(b"\n")

    def mark_complete(self) -> None:
        """Record that the journal has every lease that may be held."""
        if self._partial and self._fd >= 0:
            self._partial = False
            self._rewrite()

    def record(self, entry: Entry) -> None:
        """Record a lease, or more about it; `flush` before the grant is sent."""
        line = self._live[entry.token] = _encode(_Line(lease=entry))
        self._unwritten.append(line)

    def erase(self, token: Token) -> None:
        """Record that a slot is free; `flush` before it is granted again."""
        if self._live.pop(token, None) is not None:
            self._unwritten.append(_encode(_Line(free=token)))

    def admit(self, member: Member) -> None:
        """Record that a session is let into a lane; `flush` before it is."""
        line = self._live[member.session] = _encode(_Line(member=member))
        self._unwritten.append(line)

    def dismiss(self, session: bytes) -> None:
        """Record that a session is in no lane any more."""
        if self._live.pop(session, None) is not None:
            self._unwritten.append(_encode(_Line(left=session)))

    def record_server(self, server: ServerIncarnation) -> None:
        """Record that the control connection was on this server."""
        if self.servers[-1:] != [server]:
            self._note(server)
            self._unwritten.append(_encode(_Line(server=server)))
            self.flush()

    def _note(self, server: ServerIncarnation) -> None:
        self.servers = [*(known for known in self.servers if known != server), server][
            -_SERVERS_KEPT:
        ]

    def recreate_if_deleted(self) -> bool:
        """Write the file again if it was deleted, else refresh its time stamps.

        Return True if it was deleted. Raise OSError if it cannot be written.
        """
        if self._fd < 0:
            return False  # the file was given up after a failed write
        os.utime(self._fd)
        try:
            if os.path.samestat(os.fstat(self._fd), os.stat(self._path)):
                return False
        except FileNotFoundError:
            pass
        self.flush()
        self._compact()
        return True

    def flush(self) -> None:
        """Write all recorded lines at once."""
        if not self._unwritten:
            return
        line = b"".join(self._unwritten)
        self._unwritten.clear()
        if self._fd < 0:
            return
        try:
            if os.write(self._fd, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            # This broker goes on granting. The file is removed, so that the next broker does not
            # trust a journal that lacks those leases.
            logger.error(
                "cannot write %s (%s): after a restart the broker will grant nothing for a while",
                self._path,
                error,
            )
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1
            return
        self._size += len(line)
        if self._size > _COMPACT_BYTES:
            self._rewrite()

    def _rewrite(self) -> None:
        try:
            self._compact()
        except OSError as error:
            logger.warning("cannot rewrite %s (%s): the old file stays in use", self._path, error)
            self._size = 0  # the next try is due after as many bytes again

    def _compact(self) -> None:
        """Write the lines that count into a new file, and rename it; raise OSError on failure."""
        fresh = self._path.with_suffix(".new")
        servers = [_encode(_Line(server=server)) for server in self.servers]
        data = b"".join([_encode(_Line(_VERSION, self._partial)), *servers, *self._live.values()])
        fd = os.open(
            fresh,
            os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW,
            0o600,
        )
        try:
            if os.write(fd, data) != len(data):  # the only sign of a full disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fresh.rename(self._path)
        except OSError as error:
            os.close(fd)
            fresh.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(fresh)) from error
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._size = fd, 0

    def close(self, *, for_good: bool = False) -> None:
        """Close the file, and remove it if `for_good`: no other broker will follow."""
        self.flush()
        if for_good:
            self._path.unlink(missing_ok=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _encode(line: _Line) -> bytes:
    return _encoder.encode(line) + b"\n"
