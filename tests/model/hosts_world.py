"""All hosts and their server, the clock, and what goes wrong."""

from __future__ import annotations

import math

from sharedpool.broker.core.share_terms import ShareKey, Wakeup
from sharedpool.wire.values import Phase
from tests.model.hosts import Host
from tests.model.hosts_server import Server

BEAT_S = 5.0


class World:
    """All of it, and the clock."""

    def __init__(self, limits: list[int], workers: int) -> None:
        self.now = 1000.0
        self.checks = True  # of the ledgers' invariants, after every call
        self.server = Server()
        self.most = 0  # the highest limit under which something may have been opened
        self.hosts: list[Host] = []
        for number, max_conn in enumerate(limits):
            self.hosts.append(Host(self, f"h{number}", max_conn, workers))

    # --- what concerns all hosts

    def notify(self, key: ShareKey, instances: tuple[str, ...], wakeup: Wakeup) -> None:
        for host in self.hosts:
            if host.instance in instances and host.session is not None and not host.session.dead:
                host.notifies.append((key, wakeup))

    def forget_early_grants(self, instances: set[str]) -> None:
        """Hosts are not waited for any more whose shares were lost with the server.

        The product takes the risk that one of their workers connects under a grant of before.
        """
        for host in self.hosts:
            if host.instance in instances:
                for held in host.unarrived():
                    held.doomed = held.doomed or held.granted_at <= self.server.boot_at

    def in_use(self) -> int:
        """How many connections there are, or may be before any other sync."""
        on_the_way = sum(len(host.unarrived()) + host.free for host in self.hosts)
        return len(self.server.connections) + on_the_way

    def counted(self) -> int:
        """How many slots the brokers count, also of connections that have ended."""
        ledgers = [host.ledger for host in self.hosts if host.ledger is not None]
        return self.in_use() + sum(ledger.leases for ledger in ledgers)

    def server_notices(self) -> None:
        """Backends end whose clients have left."""
        for proc in list(self.server.procs):
            host = next(host for host in self.hosts if host.name == proc.host)
            if proc.left and not host.cut:
                self.server.end(proc)
                if proc.is_broker and (host.session is None or host.session.dead):
                    host.lost_at = host.lost_at or self.now

    # --- faults

    def lose_session(self, host: Host) -> None:
        """An administrator, or a middlebox, ends a broker's session."""
        if host.session is not None and not host.session.dead and not host.cut:
            self.server.end(host.session)
            host.lost_at = host.lost_at or self.now

    def thaw(self, host: Host) -> None:
        if host.frozen:
            host.frozen = False
            if host.ledger is not None:
                host.ledger.process_was_suspended(self.now)
                host.ledger.sharing.trust.suspended(self.now)

    def kill_host(self, host: Host) -> None:
        """All its processes end at once; its instance and journal are lost with it."""
        host.kill_broker(journal_lost=True)
        for worker in host.workers:
            for held in worker.leases.values():
                if held.proc is not None:
                    held.proc.left = True
            worker.leases.clear()
            worker.pending.clear()
        host.dead, host.frozen = True, False

    def start_host(self, host: Host) -> None:
        if host.dead:
            host.dead, host.journal_intact = False, True
            host.instance = f"{host.instance}'"
            host.lost_at = None
            host.start_broker()

    def restart_server(self, *, crashed: bool) -> None:
        if self.server.up:
            self.stop_server()
        self.server.start(self.now, crashed=crashed)

    def stop_server(self) -> None:
        self.server.stop()

    # --- time

    def pass_time(self, seconds: float, *, prompt: bool) -> None:
        """Let time pass. `prompt`: brokers and the server do everything as it falls due."""
        until = self.now + seconds
        while True:
            for host in self.hosts:
                if not host.cut:
                    self._notice_loss(host)
            if prompt:
                self.brokers_work()
            if self.now >= until:
                return
            deadlines = [
                deadline
                for host in self.hosts
                if host.ledger is not None
                and host.runs
                and (deadline := host.ledger.next_deadline()) is not None
            ]
            self.now = min(
                until, self.now + BEAT_S, max(self.now + 0.05, min(deadlines, default=until))
            )
            for host in self.hosts:
                host.tick()
                for worker in host.workers if host.runs else ():
                    if self.now - worker.heard_at >= BEAT_S:
                        worker.beat()

    @staticmethod
    def _notice_loss(host: Host) -> None:
        """The end of a session is seen at once, unless the network is cut."""
        if host.runs and host.session is not None and host.session.dead:
            host.notice_loss()
            while host.words:
                host.hear()

    def brokers_work(self) -> None:
        """All that is due now is done."""
        for _ in range(50):
            self.server_notices()
            busy = False
            for host in self.hosts:
                host.listen()
                busy |= bool(host.orders) and host.reaches_server
                host.run_order()
                while host.words and host.runs:
                    busy = True
                    host.hear()
                host.work()
            if not busy:
                return
        raise AssertionError("the brokers do not come to rest")

    def workers_work(self) -> bool:
        """Connects come to their ends; nobody checks anything in."""
        moved = False
        for host in self.hosts:
            for worker in host.workers if host.runs else ():
                if host.ledger is not None and not worker.epoch:
                    worker.hello()
                if not host.cut:
                    worker.notice_ends()
                for held in worker.of(Phase.CONNECTING):
                    if held.proc is not None:
                        worker.opened(held)
                    elif held.began_at < math.inf:
                        worker.arrive(held)
                    else:
                        worker.connect(held)
                    moved |= not host.cut
        return moved

    def settle(self) -> None:
        """Everything under way comes to its end, in no time."""
        for _ in range(50):
            self.brokers_work()
            if not self.workers_work():
                return
        raise AssertionError("no rest")
