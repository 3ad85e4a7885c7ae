"""The broker's memory beyond its own death: every lease it has granted and not seen free, in a file beside its lock.

One JSON line per event, written before the grant is sent: a lease (again when its backend is known), or that a token's
slot is free; a session that is let into a lane, or has left it. The incarnations of PostgreSQL that its control
connection has seen are there too: without them a broker that is started after a server's restart could not tell what
that has ended. A broker that is killed loses nothing that was written, since the page cache is the kernel's; a machine
that goes down takes the workers along. A last line cut short is one whose grant never left.

A journal begun by a broker that found none is `partial` until that broker knows all that may be held: when it dies
before, its successor must not believe it either.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import msgspec

from sharedpool.broker.core.commands import Entry, Member, ServerIncarnation
from sharedpool.wire.messages import Token

logger = logging.getLogger("sharedpool.broker")

# Rewritten when it has grown by this much: live leases are few.
_COMPACT_BYTES = 1 << 20
_VERSION = 2
# Of the servers seen before that many others, no lease is left.
_SERVERS_KEPT = 16


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
    """One broker's journal. The address's lock must be held.

    `entries` are the leases that the former broker left, `members` who was in its lanes; `intact` is False when there
    is no telling whether that is all: the file was missing or cannot be read. `servers` are the servers that were seen,
    the newest last.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.intact = True
        self._live: dict[Token | bytes, bytes] = {}  # by lease, or by session
        self.members: list[Member] = []
        self.servers: list[ServerIncarnation] = []
        self.entries = self._load()
        self._partial = not self.intact
        self._fd = -1
        self._size = 0
        self._unwritten: list[bytes] = []
        self._compact()

    def _load(self) -> list[Entry]:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            self.intact = False
            return []
        with open(fd, "rb") as file:
            if os.fstat(fd).st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "it belongs to somebody else", str(self._path))
            data = file.read()
        found: dict[Token, Entry] = {}
        members: dict[bytes, Member] = {}
        whole, _, _ = data.rpartition(b"\n")
        lines = whole.split(b"\n")
        try:
            first = _decoder.decode(lines[0])
            if first.version != _VERSION:
                raise msgspec.DecodeError("another version's")
            self.intact = not first.partial
            for text in lines[1:]:
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
        except msgspec.DecodeError:
            self.intact = False  # what was read is still true
        self._live = {token: _encode(_Line(lease=entry)) for token, entry in found.items()}
        self._live |= {
            session: _encode(_Line(member=member)) for session, member in members.items()
        }
        self.members = list(members.values())
        return list(found.values())

    def mark_complete(self) -> None:
        """Note that all leases there may be are in the journal."""
        if self._partial and self._fd >= 0:
            self._partial = False
            self._rewrite()

    def record(self, entry: Entry) -> None:
        """Note a lease, or more about it; `flush` before anybody is told."""
        line = self._live[entry.token] = _encode(_Line(lease=entry))
        self._unwritten.append(line)

    def erase(self, token: Token) -> None:
        """Note that a slot is free; `flush` before anybody is told."""
        if self._live.pop(token, None) is not None:
            self._unwritten.append(_encode(_Line(free=token)))

    def admit(self, member: Member) -> None:
        """Note who is let into a lane; `flush` before he is."""
        line = self._live[member.session] = _encode(_Line(member=member))
        self._unwritten.append(line)

    def dismiss(self, session: bytes) -> None:
        """Note that a session is in no lane any more."""
        if self._live.pop(session, None) is not None:
            self._unwritten.append(_encode(_Line(left=session)))

    def record_server(self, server: ServerIncarnation) -> None:
        """Note that the control connection was on this server."""
        if self.servers[-1:] != [server]:
            self._note(server)
            self._unwritten.append(_encode(_Line(server=server)))
            self.flush()

    def _note(self, server: ServerIncarnation) -> None:
        self.servers = [*(known for known in self.servers if known != server), server][
            -_SERVERS_KEPT:
        ]

    def mend(self) -> bool:
        """Write all anew if somebody has deleted the file, and keep it young; return whether that was so.

        Raise OSError when it cannot be.
        """
        if self._fd < 0:
            return False  # it could not be written, and was given up
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
        """Write what was noted, in one go."""
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
            # A broker that can grant but not remember: its successor must not believe what is there.
            logger.error(
                "cannot write %s (%s): a restarted broker will wait before it grants",
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
            logger.warning("cannot rewrite %s (%s): what is there still counts", self._path, error)
            self._size = 0  # the next try comes after as much again

    def _compact(self) -> None:
        """Write what counts into a new file and put that in the old one's place; raise `OSError` when it is not all."""
        fresh = self._path.with_suffix(".new")
        servers = [_encode(_Line(server=server)) for server in self.servers]
        data = b"".join([_encode(_Line(_VERSION, self._partial)), *servers, *self._live.values()])
        fd = os.open(
            fresh,
            os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW,
            0o600,
        )
        try:
            if os.write(fd, data) != len(
                data
            ):  # a full disk takes what it can, and says no more than this
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
        """Let go of the file. `for_good`: no broker will come after."""
        self.flush()
        if for_good:
            self._path.unlink(missing_ok=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _encode(line: _Line) -> bytes:
    return _encoder.encode(line) + b"\n"
