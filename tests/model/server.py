"""A PostgreSQL server: connects that wait to be accepted, backends from fork to exit, restarts.

A backend's way: QUEUED (in the kernel's backlog, not forked yet) → FORKED (not to be seen for a
moment) → STARTING (authenticates; holds its lock, so that a survey shows it) → OPEN (listed, with
its application_name). It ends when it is terminated, or, unless it is in the middle of a query,
some time after nobody holds its client's end of the socket open or a holder has shut it down.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from sharedpool.broker.core.commands import SurveyResult
from sharedpool.broker.core.leases import QUEUE_LIMIT_S
from sharedpool.broker.core.quarantine import SETTLE_S
from sharedpool.wire.values import Backend, Token

_LOGIN_LIMIT_S = 60.0
_PIDS = 60  # few, so that they come again


class Stage(IntEnum):
    """How far a backend has come."""

    QUEUED = 0
    FORKED = 1
    STARTING = 2
    OPEN = 3


@dataclass(eq=False, slots=True)
class Proc:
    """One connect and the backend it becomes.

    `token` is the lease it was begun under: what the broker cannot know.

    `holders` are those who keep the client's end of the socket open: the worker (its session's id),
    packets with a duplicate, and "custody". `cut`: one of them has shut it down. `dirty`: a
    transaction is open.
    """

    backend: Backend
    pool: str
    tag: str
    owner: bytes
    token: Token
    stage: Stage = Stage.QUEUED
    began_at: float = 0.0
    forked_at: float = 0.0
    holders: set[object] = field(default_factory=set)
    cut: bool = False
    busy: bool = False
    dirty: bool = False
    dead: bool = False

    @property
    def seen_dead(self) -> bool:
        """Whether it is dead and that can be seen at the client's end of its connection."""
        return self.dead and self.backend.direct

    @property
    def workers(self) -> list[object]:
        """The workers that have it."""
        return [holder for holder in self.holders if isinstance(holder, bytes)]

    @property
    def abandoned(self) -> bool:
        """Whether it ends by itself."""
        return (self.cut or not self.holders) and not self.busy and self.stage is not Stage.QUEUED

    def __repr__(self) -> str:
        state = "dead" if self.dead else self.stage.name.lower() + (", busy" if self.busy else "")
        return f"<backend {self.backend.pid} of {self.owner.decode()}, lease {self.token}, {state}>"


class Server:
    """The server; `procs` are in the order of their connects."""

    def __init__(self, *, direct: bool = True) -> None:
        self.direct = direct
        self.up = True
        self.boot = 1
        self.procs: list[Proc] = []
        self._serial = 0

    def connect(
        self, pool: str, tag: str, owner: bytes, token: Token, now: float = 0.0
    ) -> Proc | None:
        """Begin a connect; None when it is refused at once."""
        if not self.up:
            return None
        self._serial += 1
        used = {proc.backend.pid for proc in self.procs}
        pid = next(p for n in range(_PIDS) if (p := 1 + (self._serial + n) % _PIDS) not in used)
        backend = Backend(pid, self._serial, self.boot, self.direct)
        proc = Proc(backend, pool, tag, owner, token, began_at=now, holders={owner})
        self.procs.append(proc)
        return proc

    def advance(self, proc: Proc, stage: Stage, now: float) -> None:
        """Let a backend come as far as `stage`."""
        if proc.stage is Stage.QUEUED < stage:
            proc.forked_at = now
        proc.stage = max(proc.stage, stage)

    def time_out(self, now: float) -> None:
        """End what has not logged in for too long (`authentication_timeout`)."""
        for proc in list(self.procs):
            if Stage.QUEUED < proc.stage < Stage.OPEN and now - proc.forked_at >= _LOGIN_LIMIT_S:
                self.end(proc)

    def survey(self, serial: int, barrier: bool, now: float) -> SurveyResult:
        """Return what the control connection sees; a barrier comes behind all earlier connects.

        But for those in a proxy's queue.
        """
        starting, tagged = set(), {}
        for proc in self.procs:
            if barrier and (self.direct or now - proc.began_at >= QUEUE_LIMIT_S - 1e-6):
                self.advance(proc, Stage.FORKED, now)
            if proc.stage is Stage.OPEN:
                tagged[proc.backend] = proc.tag
            # To within rounding: the second look is ordered exactly so much later.
            elif proc.stage is Stage.STARTING or (
                proc.stage is Stage.FORKED and now - proc.forked_at > SETTLE_S - 1e-6
            ):
                starting.add(proc.backend.pid)
        return SurveyResult(serial, frozenset(starting), tagged)

    def find(self, backend: Backend) -> Proc | None:
        """Return the living backend."""
        return next(
            (proc for proc in self.procs if proc.backend == backend and proc.stage is Stage.OPEN),
            None,
        )

    def end(self, proc: Proc) -> None:
        """A backend exits."""
        if not proc.dead:
            proc.dead = True
            self.procs.remove(proc)

    def stop(self) -> None:
        """Shut down, at once: all backends end, connects are refused."""
        self.up = False
        for proc in list(self.procs):
            self.end(proc)

    def start(self) -> None:
        """Come up again."""
        if not self.up:
            self.up = True
            self.boot += 1
