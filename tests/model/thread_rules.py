"""What threads do, and what comes to the desk of it."""

from __future__ import annotations

from hypothesis.stateful import precondition, rule

from sharedpool.wire.messages import ReleaseReason
from tests.model.desk import Giving, Lack
from tests.model.rules import Rules, picks, some
from tests.model.server import Stage
from tests.model.worker import Worker

MOST_WAITERS = 6
_WAITS = (0.0, 2.0, 60.0, 60.0, 600.0)
_OPENED = ("", "", "", "", "not deposited", "interrupted", "configure", "encrypted")
_TROUBLE = ("", "57P01", "25006", "57P02")


class ThreadRules(Rules):
    """Checkouts, connects and checkins, and connections that are handed over."""

    # --- threads

    @rule(pick=picks)
    def checkout(self, pick: int) -> None:
        worker, pick = self.one(pick)
        if len(worker.waiters) < MOST_WAITERS:
            for _ in range(1 + pick // 8 % 3):
                worker.checkout(_WAITS[pick % len(_WAITS)])

    @rule(pick=picks)
    def crowd(self, pick: int) -> None:
        """Everybody wants connections, and gets as many as there are."""
        self._crowd(1 + pick % 3)

    def _crowd(self, times: int) -> None:
        world = self.world
        for worker in world.awake:
            for _ in range(times if len(worker.waiters) < MOST_WAITERS else 0):
                worker.checkout(60.0)
        world.deliver_all()
        for worker in world.awake:
            for lease in list(worker.connecting):
                worker.connect(lease)
            for opening in list(worker.opening):
                world.server.advance(opening.proc, Stage.OPEN, world.now)
                worker.opened(opening, "")
        world.deliver_all()

    @some("users")
    @rule(pick=picks)
    def checkin(self, pick: int) -> None:
        worker, pick = self.one(pick, "users")
        conn = worker.users[pick % len(worker.users)]
        match pick // len(worker.users) % 6:
            case 0:
                worker.checkin(conn, ReleaseReason.BROKEN)
            case 1:
                for each in list(worker.users):
                    worker.checkin(each)
            case _:
                worker.checkin(conn)

    @some("users")
    @rule(pick=picks)
    def use(self, pick: int) -> None:
        """A query begins; or one fails in a way that tells of a failover."""
        worker, pick = self.one(pick, "users")
        conn = worker.users[pick % len(worker.users)]
        if pick // 4 % 4 == 1:
            worker.cancel(conn)
        elif pick // 4 % 4:
            conn.proc.busy = conn.works and pick // 16 % 2 == 0
            conn.proc.dirty = conn.works
        elif conn.lease is not None:
            worker.cache.report_failover_sign(conn.lease, _TROUBLE[pick // 16 % len(_TROUBLE)])
            worker.flush()

    @some("waiters")
    @rule(pick=picks)
    def collect(self, pick: int) -> None:
        worker, pick = self.one(pick, "waiters")
        worker.collect(configure_fails=pick % 16 == 7)

    @some("waiters")
    @rule(pick=picks)
    def give_up(self, pick: int) -> None:
        worker, pick = self.one(pick, "waiters")
        in_connect = [opening.lease for opening in worker.opening]
        waiters = [x for x in worker.waiters if x not in worker.abandoned]
        waiters = [x for x in waiters if x.lease not in in_connect or x.lease is None]
        if not waiters:
            return
        waiter = waiters[pick % len(waiters)]
        if waiter in worker.quitting:
            worker.quit(waiter)
        elif pick // len(waiters) % 2:
            worker.stop_waiting(waiter)
        else:
            worker.give_up(waiter)

    @some("connecting")
    @rule(pick=picks)
    def connect(self, pick: int) -> None:
        worker, pick = self.one(pick, "connecting")
        worker.connect(worker.connecting[pick % len(worker.connecting)])

    @some("opening")
    @rule(pick=picks)
    def go_on_connecting(self, pick: int) -> None:
        """The server or the worker takes the next step of a connect, or the connect fails."""
        worker, pick = self.one(pick, "opening")
        opening = worker.opening[pick % len(worker.opening)]
        pick //= len(worker.opening)
        proc = opening.proc
        if pick % 8 == 0:
            how = ("timeout", "timeout", "full", "password")[pick // 8 % 4]
            if proc.stage is not Stage.OPEN:
                worker.fail(opening, how)
        elif proc.dead or proc.stage is Stage.OPEN:
            if pick % 8 == 1:
                worker.deposit_early(opening)
            else:
                worker.opened(opening, _OPENED[pick // 8 % len(_OPENED)])
        else:
            stage = Stage.OPEN if pick % 8 > 2 else Stage(proc.stage + 1)
            self.world.server.advance(proc, stage, self.world.now)

    @some("closing")
    @rule(pick=picks)
    def finish_close(self, pick: int) -> None:
        worker, pick = self.one(pick, "closing")
        closing, conn = worker.closing[pick % len(worker.closing)]
        worker.finish_close(
            closing, conn, seen=pick // 8 % 4 != 0, fit=pick // 32 % 8 != 7, halt=2 - pick // 4 % 3
        )

    @precondition(lambda self: self.world.proxied and self.world.server.procs)
    @rule(pick=picks)
    def proxy_closes(self, pick: int) -> None:
        """The proxy ends a session on its client's side, whatever the backend does."""
        procs = [proc for proc in self.world.server.procs if proc.stage is Stage.OPEN]
        if procs:
            procs[pick % len(procs)].cut = True

    # --- the desk

    @rule(pick=picks)
    def go_on_at_the_desk(self, pick: int) -> None:
        """A thread that gives takes its next step; or the link reads what came on its line."""
        worker, pick = self.one(pick)
        steps: list[Giving | None] = [*worker.giving, *([None] if worker.readable else [])]
        if steps:
            step = steps[pick % len(steps)]
            if step is None:
                worker.read_home()
            else:
                worker.go_on_giving(step)

    @rule(pick=picks)
    def deliver_packet(self, pick: int) -> None:
        """The broker reads at the desk, from one line or from all."""
        if found := [wire for wire in self.world.network.wires if wire.ready]:
            for wire in found if pick % 4 == 0 else [found[pick // 4 % len(found)]]:
                if not wire.torn:
                    self.world.deliver_packet(wire)

    @rule(pick=picks)
    def take_turns(self, pick: int) -> None:
        """More want connections than there are, and hand them on; it stops somewhere
        in the middle."""
        world = self.world
        world.start_broker()
        self._crowd(2)
        for turn in range(6 + pick % 8):
            pick = (pick * 5 + 3) % 1021
            asker, _ = self.one(pick)
            if len(asker.waiters) < 2:
                asker.checkout(60.0)
            if pick % 7 == 3:
                asker.lacks = (Lack.SOCKET, Lack.SHELL, Lack.WAIT_SOCKET)[pick % 3]
            if holders := [worker for worker in world.awake if worker.users or worker.closing]:
                self._give_back(holders[turn % len(holders)], pick)
            if pick % 7:
                self._deliver_packets()
            if pick % 11 > 1:
                self._step_all()

    def _give_back(self, holder: Worker, pick: int) -> None:
        """A process checks a connection in, perhaps cancelling its query first, or closes one."""
        world = self.world
        if holder.closing:
            if pick % 8:
                closing, conn = holder.closing[0]
                halt = 2 if pick % 9 else pick // 9 % 2
                holder.finish_close(closing, conn, seen=True, halt=halt)
            return
        if pick % 5 == 0:
            holder.cancel(holder.users[0])
            while holder.line.up and world.broker is not None:
                world.deliver_up(holder.line)
        holder.checkin(holder.users[0])

    def _deliver_packets(self) -> None:
        """The broker reads all that has come to the desk."""
        for wire in list(self.world.network.wires):
            while wire.up and not wire.torn:
                self.world.deliver_packet(wire)

    def _step_all(self) -> None:
        """Each process reads what has come, and takes a step."""
        for each in self.world.awake:
            each.read_all()
            for thread in [thread for thread in each.threads if thread.ready]:
                each.step(thread)
            each.collect()

    @precondition(lambda self: self.world.network.wires)
    @rule(pick=picks)
    def desk_fails(self, pick: int) -> None:
        """The broker turns a line away, or cannot pass the next connection on; or a worker can
        build no shell."""
        new = [wire for wire in self.world.network.wires if not wire.accepted]
        match pick % 4:
            case 0 | 1 if new:
                self.world.network.tear(new[pick // 4 % len(new)])
            case 2 if self.world.broker is not None:
                self.world.broker.cannot_pass = True
            case 3 if pick // 4 % 8 == 5:
                self.one(pick // 32)[0].broken_shells = True
