"""Everything at once: processes, a broker, a network, a server and a clock.

The steps are the methods.
"""

from __future__ import annotations

import itertools

from sharedpool.broker.core.commands import Process
from sharedpool.wire.messages import Grant
from sharedpool.wire.values import Token
from tests.model.broker import Broker
from tests.model.journal import Journal
from tests.model.lane import Lane
from tests.model.network import Line, Network, Wire
from tests.model.scale import BEAT_S, GROUP_OF, GROUPS
from tests.model.server import Server
from tests.model.worker import Worker


class World:
    """The world.

    `excused` are leases about which a broker without its predecessor's journal cannot know.

    `proxied`: a proxy is in front of the server. It closes its clients' sides when it likes, and as
    soon as they have closed theirs; the server's side lives on. A connect may be in its queue for
    `QUEUE_LIMIT_S`.
    """

    def __init__(
        self,
        cap: int | None,
        *,
        has_desk: bool,
        handover: bool,
        in_order: bool,
        grouping: int | None = None,
        proxied: bool = False,
    ) -> None:
        self.cap = cap
        self.groups = {} if grouping is None else GROUPS[grouping]
        self.group_of = {} if grouping is None else GROUP_OF[grouping]
        self.has_desk = has_desk
        self.handover = handover and has_desk
        self.in_order = in_order
        self.now = 1000.0
        self.network = Network()
        self.proxied = proxied
        self.server = Server(direct=not proxied)
        self.journal = Journal()
        self.lanes: list[Lane] = []
        self.passed = 0  # connections, by brokers
        self.lost = 0  # connections, with brokers
        self.workers: dict[bytes, Worker] = {}  # running, with a pool
        self.processes: set[Process] = set()  # running
        self.process_of: dict[bytes, Process] = {}
        self.excused: set[Token] = set()
        self.seen_boots = set(range(1, 1000))
        self.broker: Broker | None = None
        self._epoch = 6
        self._numbers = itertools.count(1)
        self.start_broker()

    # --- brokers

    def start_broker(self) -> None:
        if self.broker is None:
            self._epoch += 1
            self.broker = Broker(self, self._epoch, follows=self._epoch > 7)
            self.broker.take_over()

    def kill_broker(self, lost: int) -> None:
        """SIGKILL: what it had not sent, or had received and not handled, is lost."""
        if self.broker is not None:
            self.broker.close()
            self.broker = None
            for line in self.network.lines.values():
                line.break_off(lost)
            for wire in list(self.network.wires):
                self.network.tear(wire)

    def excuse_unknowable(self) -> None:
        """The grace period of a broker without a journal is over, it looks at the server: what can
        it not see?

        The lease of a worker that has not spoken since (it is frozen, or cut off), and that has not
        begun to connect: granted and on its way, or in the hands of a thread. Whatever was begun is
        seen, at the latest by its tag.
        """
        assert self.broker is not None
        slots = self.broker.slots
        for worker in self.workers.values():
            known = slots.sessions.get(worker.id)
            if known is not None and not known.restored:
                continue
            self.excused.update(token for token, begun in worker.unconnected.items() if not begun)
            late = (
                message
                for line, way, message in self.network.limbo
                if line is worker.line and way == "down"
            )
            for message in itertools.chain(worker.line.down, late):
                if isinstance(message, Grant):
                    self.excused.add(message.token)

    # --- processes

    def start(
        self,
        pool: str,
        *,
        remote: bool = False,
        handover: bool = True,
        shares_line: bool | None = None,
    ) -> Worker:
        worker = Worker(self, next(self._numbers), pool, remote=remote, handover=handover)
        if shares_line is not None:
            worker.shares_line = shares_line
        self.workers[worker.id] = worker
        self.processes.add(worker.process)
        self.process_of[worker.id] = worker.process
        worker.hello()
        return worker

    def die(self, worker: Worker) -> None:
        del self.workers[worker.id]
        self.processes.remove(worker.process)
        worker.die()

    def leave(self, worker: Worker, *, exits: bool) -> None:
        """`release_all`; the process may live on."""
        worker.leave()
        del self.workers[worker.id]
        if exits:
            self.processes.remove(worker.process)

    @property
    def awake(self) -> list[Worker]:
        return [worker for worker in self.workers.values() if not worker.frozen]

    # --- the network

    def deliver_up(self, line: Line) -> None:
        if self.broker is not None:
            self.broker.take_in(line.session, line.up.popleft())

    def deliver_down(self, worker: Worker) -> None:
        worker.receive(worker.line.down.popleft())

    def connect(self, worker: Worker) -> Wire | None:
        """A worker goes to the desk; None where there is none."""
        if self.broker is None or not self.has_desk or worker.remote:
            return None
        wire = Wire(worker.id, next(self._numbers))
        self.network.wires.append(wire)
        return wire

    def deliver_packet(self, wire: Wire) -> None:
        """The broker reads one packet, or sees that the worker's end is closed."""
        if self.broker is not None:
            self.broker.read(wire)

    def deliver_all(self) -> None:
        """All that is on its way arrives, from everybody and to those awake; so do the answers to
        it."""
        moved = True
        while moved:
            moved = False
            for line in list(self.network.lines.values()):
                while line.up and self.broker is not None:
                    self.deliver_up(line)
                    moved = True
                worker = self.workers.get(line.session)
                if worker is None:
                    line.down.clear()
                    if not line:
                        del self.network.lines[line.session]
                elif not worker.frozen:
                    worker.notice_line()
                    while line.down:
                        self.deliver_down(worker)
                        moved = True
                    moved |= worker.read_all()
            for wire in list(self.network.wires):
                while wire.ready and not wire.torn:
                    self.deliver_packet(wire)
                    moved = True

    # --- the clock

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.server.time_out(self.now)
        if self.broker is not None:
            self.broker.tick()
        for worker in self.awake:
            worker.keep_in_touch()

    def pass_long(self, seconds: float) -> None:
        """Heartbeats are kept and messages arrive, except those of the frozen."""
        until = self.now + seconds
        while self.now < until:
            self.pass_time(min(BEAT_S, until - self.now))
            self.deliver_all()

    def stall_broker(self, seconds: float) -> None:
        """The broker does not run for a while (SIGSTOP)."""
        self.now += seconds
        for worker in self.awake:
            worker.keep_in_touch()
        if self.broker is not None:
            self.broker.ledger.process_was_suspended(self.now)
            self.broker.tick()
