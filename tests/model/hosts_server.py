"""The server of several hosts: its backends, and the tables of one shared limit."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sharedpool.broker.core.commands import (
    SyncShare,
)
from sharedpool.broker.core.host_presence import (
    Listed,
)
from sharedpool.broker.core.share_sync import SyncDecision
from sharedpool.broker.core.share_terms import LimitRow
from sharedpool.wire.values import Backend

if TYPE_CHECKING:
    from tests.model.hosts import Host


@dataclass(eq=False, slots=True)
class Proc:
    """A backend: of a broker's session, or of a worker's connection."""

    pid: int
    boot: int
    host: str
    tag: str
    is_broker: bool
    starting: bool = True
    left: bool = False  # its client has closed its end
    dead: bool = False

    @property
    def backend(self) -> Backend:
        return Backend(self.pid, self.pid, self.boot, direct=True)

    def __repr__(self) -> str:
        state = "dead" if self.dead else "starting" if self.starting else "open"
        return f"<{self.tag or 'nameless'} of {self.host}, pid {self.pid}, {state}>"


@dataclass(slots=True)
class Row:
    """A host's row, with the server's time."""

    host: str
    pid: int
    started_us: int
    held: int
    wanted: int
    answered: int
    told_at: float
    boot: int  # of the server then
    unnamed: str = ""
    cut: bool = False
    spare: int = 0


class Server:
    """PostgreSQL and the table of one limit. `limit` is what the row of the limit says."""

    def __init__(self) -> None:
        self.up = True
        self.boot, self.boot_at = 1, 0.0
        self.procs: list[Proc] = []
        self.limit: int | None = None
        self.asked, self.paused = 0, False
        self.hosts: tuple[str, ...] = ()  # that have rows, or had them before they were lost
        self.lost_at: float | None = None
        self.rows: dict[str, Row] = {}
        self._pids = itertools.count(1)

    def connect(self, host: str, tag: str, *, is_broker: bool = False) -> Proc:
        proc = Proc(next(self._pids), self.boot, host, tag, is_broker, starting=not is_broker)
        self.procs.append(proc)
        return proc

    def end(self, proc: Proc) -> None:
        if not proc.dead:
            proc.dead = True
            self.procs.remove(proc)

    @property
    def connections(self) -> list[Proc]:
        """Every backend that counts to the limit."""
        return [proc for proc in self.procs if not proc.is_broker]

    def stop(self) -> None:
        self.up = False
        for proc in list(self.procs):
            self.end(proc)

    def start(self, now: float, *, crashed: bool) -> None:
        self.up = True
        self.boot, self.boot_at = self.boot + 1, now
        if crashed:
            self.rows.clear()

    def sessions(self) -> tuple[frozenset[int], list[tuple[int, int, str]]]:
        """What a survey shows: those in start-up, and those with a tag."""
        starting = frozenset(proc.pid for proc in self.procs if proc.starting)
        return starting, [(p.pid, p.pid, p.tag) for p in self.procs if not p.starting]

    def listed(self, now: float) -> list[Listed]:
        return [
            Listed(
                name, row.host, row.pid, row.started_us, row.held, row.wanted, row.answered,
                row.cut, max(0.0, now - row.told_at), row.spare, row.unnamed,
            )
            for name, row in self.rows.items()
        ]  # fmt: skip

    def commit(self, host: Host, order: SyncShare, decision: SyncDecision, now: float) -> None:
        """Write a sync."""
        for name in decision.gone:
            del self.rows[name]
        for name, most in decision.lowered.items():
            self.rows[name].held = min(self.rows[name].held, most)
        division = decision.result.division
        self.rows[host.instance] = Row(
            host.name, host.pid, host.pid, division.held, order.claim.wanted, division.answered,
            now, self.boot, decision.unnamed,
        )  # fmt: skip
        self.limit, self.asked = decision.result.max_conn, decision.asked
        self.paused, self.hosts = decision.result.paused, decision.hosts
        self.lost_at = (self.lost_at or now) if decision.lost else None

    def limit_row(self, now: float) -> LimitRow:
        assert self.limit is not None
        lost_s = None if self.lost_at is None else now - self.lost_at
        return LimitRow(self.limit, self.asked, self.paused, self.hosts, lost_s)
