"""A broker that shares its limits with other hosts, whose syncs are answered by the test."""

from __future__ import annotations

import math

from sharedpool.broker.core.commands import SyncShare
from sharedpool.broker.core.records import Pool
from sharedpool.broker.core.share_terms import (
    Failed,
    HostRow,
    SyncFailure,
    SyncResult,
    Wakeup,
)
from sharedpool.broker.core.shares import Division, HostShare
from tests.unit.ledger_driver import Broker, Worker

LOST = SyncFailure(Failed.LOST, "the session was lost")
OTHER = HostRow("other host", "b", 0, 0, 0.0, True, pid=2)


class SharingBroker(Broker):
    """A broker whose syncs are answered by the test."""

    def __init__(self, epoch: int = 5, **options: object) -> None:
        super().__init__(epoch, shared=True, by_database=True, **options)  # type: ignore[arg-type]

    @property
    def order(self) -> SyncShare:
        return self.all(SyncShare)[-1]

    @property
    def pool(self) -> Pool:
        return next(iter(self.slots.pools.values()))

    def answer(
        self,
        order: SyncShare,
        *,
        held: int,
        alone: bool = False,
        lacking: int = 0,
        owed: int = 0,
        bounded: bool = False,
        again_s: float = math.inf,
    ) -> None:
        division = Division(held, owed, lacking, alone=alone)
        others = () if alone else (OTHER,)
        result = SyncResult(10, False, division, others, bounded=bounded, again_s=again_s)
        sharing = self.ledger.sharing
        self.take_in(sharing.synced(order.key, order.serial, result, self.now, self.now))

    def wake(self, *, wanted: int = 1, asked: int = 0, pid: int = OTHER.pid) -> None:
        """Have the other host say what it wants."""
        wakeup = Wakeup(asked, HostShare(OTHER.instance, OTHER.held, wanted), pid)
        self.take_in(self.ledger.sharing.woken(self.order.key, wakeup, self.now))

    def fail(self, order: SyncShare, serial: int = 0) -> None:
        self.take_in(self.ledger.sharing.failed(order.key, LOST, self.now, serial))

    def sync_again(self) -> SyncShare:
        """Let time pass until the next sync is ordered."""
        before = self.order.serial
        for _ in range(100):
            self.pass_time(0.1)
            if self.order.serial > before:
                return self.order
        raise AssertionError("no sync is ordered")


def with_share(held: int = 10, *, in_use: int = 0) -> tuple[SharingBroker, Worker]:
    """A host that holds some of ten slots, beside another host, and uses some of them."""
    broker = SharingBroker()
    worker = broker.worker("a", max_conn=10)
    broker.answer(broker.order, held=held)
    for _ in range(in_use):
        worker.lend()
    return broker, worker
