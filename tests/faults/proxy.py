"""A bad network between workers and broker: it loses messages, doubles them, and delivers them
late, in any order."""

import heapq
import os
import random
import threading
import time
from collections import Counter

import zmq

from tests.support.waiting import wait_until

DROPPED = 0.1
DOUBLED = 0.1
LATE_S = 2.0


class Proxy:
    """A ROUTER that faces the workers, and for each of them a DEALER of the same identity that
    faces the broker.

    One thread does it all. `seed` decides on the fate of every message, in the order of their
    arrival.
    """

    def __init__(self, front: str, back: str, seed: int) -> None:
        self.address = front
        self.fates: Counter[str] = Counter()
        self._back = back
        self._rng = random.Random(seed)
        self._bad = True
        self._stop_asked = False
        self._on_its_way: list[
            tuple[float, int, bool, bytes, bytes]
        ] = []  # due, serial, to the broker?, worker, frame
        self._serial = 0
        self._context = zmq.Context()
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._ready = threading.Event()

    def heal(self, timeout_s: float = 10) -> None:
        """Be a good network from now on; return when what was late has arrived."""
        self._bad = False
        wait_until(lambda: not self._on_its_way, timeout_s, "late messages to arrive")

    def _run(self) -> None:
        front = self._context.socket(zmq.ROUTER)
        dealers: dict[bytes, zmq.Socket[bytes]] = {}
        try:
            front.setsockopt(
                zmq.ROUTER_HANDOVER, 1
            )  # a worker that reconnects replaces its old connection
            front.setsockopt(zmq.LINGER, 0)
            mask = os.umask(0o177)
            front.bind(self.address)
            os.umask(mask)
            poller = zmq.Poller()
            poller.register(front, zmq.POLLIN)
            self._ready.set()
            while not self._stop_asked:
                due = self._on_its_way[0][0] if self._on_its_way else float("inf")
                ready = dict(poller.poll(int(max(0.0, min(50.0, (due - time.monotonic()) * 1000)))))
                if front in ready:
                    worker, frame = front.recv_multipart()
                    if worker not in dealers and not worker.startswith(b"\0"):
                        dealers[worker] = self._dealer(worker)
                        poller.register(dealers[worker], zmq.POLLIN)
                    self._post(True, worker, frame)
                for worker, dealer in dealers.items():
                    if dealer in ready:
                        self._post(False, worker, dealer.recv())
                self._deliver(front, dealers)
        finally:
            for dealer in dealers.values():
                dealer.close()
            front.close()

    def _dealer(self, worker: bytes) -> "zmq.Socket[bytes]":
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.IDENTITY, worker)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(self._back)
        return dealer

    def _post(self, to_broker: bool, worker: bytes, frame: bytes) -> None:
        """Decide on a message's fate."""
        fate = self._rng.random() if self._bad else 1.0
        if worker.startswith(b"\0"):
            # The last words on a connection that its worker has replaced: to libzmq that is another
            # peer now, under a name of its own. It gives the same names in every process, and
            # aborts when it meets one that it gave.
            fate = 0.0
        copies = 0 if fate < DROPPED else 2 if fate < DROPPED + DOUBLED else 1
        self.fates[("dropped", "passed", "doubled")[copies]] += 1
        for _ in range(copies):
            self._serial += 1
            due = time.monotonic() + (self._rng.uniform(0, LATE_S) if self._bad else 0.0)
            heapq.heappush(self._on_its_way, (due, self._serial, to_broker, worker, frame))

    def _deliver(
        self, front: "zmq.Socket[bytes]", dealers: "dict[bytes, zmq.Socket[bytes]]"
    ) -> None:
        while self._on_its_way and self._on_its_way[0][0] <= time.monotonic():
            _, _, to_broker, worker, frame = heapq.heappop(self._on_its_way)
            if to_broker:
                dealers[worker].send(frame)
            else:
                front.send_multipart([worker, frame])

    def __enter__(self) -> "Proxy":
        self._thread.start()
        assert self._ready.wait(10), "the proxy does not listen"
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_asked = True
        self._thread.join()
        self._context.term()
