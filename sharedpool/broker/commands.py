"""What the ledger decides; the server carries it out."""

from __future__ import annotations

from dataclasses import dataclass

from sharedpool.wire.messages import Backend, Token, ToWorker


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message` to `session`."""

    session: bytes
    message: ToWorker


@dataclass(frozen=True, slots=True)
class Watch:
    """Tell the ledger (`session_died`) when the process behind `session` ends."""

    session: bytes


@dataclass(frozen=True, slots=True)
class Fence:
    """Make this backend impossible, verify it, then tell the ledger (`fenced`)."""

    token: Token
    pool: str
    backend: Backend | None
    why: str


@dataclass(frozen=True, slots=True)
class Forget:
    """The session is over: stop watching its process."""

    session: bytes


@dataclass(frozen=True, slots=True)
class Log:
    """One event for the log; `level` is a `logging` level."""

    level: int
    text: str


Command = Send | Watch | Fence | Forget | Log
