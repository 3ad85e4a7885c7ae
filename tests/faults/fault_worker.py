"""Worker processes for the fault tests: `python fault_worker.py SETTINGS` forks one for every line
`fork NUMBER` it reads.

It imports nothing of the tests: unrelated processes, as a user's would be (an application that
preloads its modules and forks its workers). A worker does what its byte in the shared `orders` file
says, and appends what happens to it to a file of its own, one line an event by one `os.write`: what
was written outlives its SIGKILL (`pool_user.py`, beside this program).
"""

import ctypes
import gc
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import psycopg2
from pool_user import POLL_S, PoolUser, settings
from psycopg2 import extensions

import sharedpool

PR_SET_CHILD_SUBREAPER = 36


class Worker(PoolUser):
    """One worker process: it does what it is ordered to do."""

    file: int

    def obey(self) -> None:
        ways = {
            "r": self.transact,
            "d": self.transact,
            "p": self.pause,
            "h": self.hold,
            "i": self.lie_idle,
        }
        ways |= {
            "q": self.query_long,
            "a": self.take_all,
            "f": self.fork,
            "F": self.fork,
            "c": self.probe,
        }
        ways |= {"e": self.meet_expiry, "k": self.fill, "1": self.ask_one, "s": self.tell_state}
        while os.getppid() == settings["nursery"] and (order := self.order) != "x":
            ways[order]()
        if self.random.random() < 0.5:
            self.pool.release_all()
        self.note("leaves")

    # --- what can be ordered

    def transact(self) -> None:
        """r, d: one random short transaction, then a moment of thought."""
        rng = self.random
        timeout = rng.choice(settings.get("timeouts", [0, 0.05, 1, 3, 10]))
        how = rng.random()
        with self.checkout(
            timeout, close=how < settings.get("discard", 0.1) or self.order == "d"
        ) as conn:
            if conn is not None and self.run(conn, "first", "SELECT 1"):
                self.work(conn, how)
        time.sleep(rng.uniform(0, settings.get("think", 0.06)))  # thinks

    def work(self, conn: extensions.connection, how: float) -> None:
        rng = self.random
        account = rng.randrange(100)
        steps = [
            f"UPDATE account SET balance = balance + 1 WHERE id = {account}",
            f"SELECT pg_sleep({rng.uniform(0, settings.get('work', 0.04)):.4f})",
        ]
        if how > 0.9:
            steps.append(f"SELECT pg_sleep({rng.uniform(0.05, 0.2):.4f})")
        if not all(self.run(conn, "later", step) for step in steps):
            return
        if how < 0.35:
            self.commit(conn)
        elif how < 0.7:
            self.run(conn, "later", "COMMIT")
        elif how < 0.85:
            self.run(conn, "later", "ROLLBACK")
        # Else it is put back with its transaction open.

    def pause(self) -> None:
        """p: do nothing."""
        self.note("paused")
        self.wait_while("p")

    def hold(self) -> None:
        """h: hold a connection, in a transaction or between two, and use it, until another order
        comes."""
        between = self.random.random() < 0.5
        with self.checkout(30) as conn:
            if conn is not None and self.run(conn, "first", "SELECT 1"):
                self.note("holds")
                while self.order == "h" and os.getppid() == settings["nursery"]:
                    time.sleep(POLL_S)  # polls its orders
                    if not self.run(conn, "later", "SELECT 1") or (
                        between and not self.commit(conn)
                    ):
                        break
        self.note("held")
        self.wait_while("h")

    def lie_idle(self) -> None:
        """i: keep an idle connection in the cache until another order comes."""
        with self.checkout(30) as conn:
            if conn is not None:
                self.run(conn, "first", "SELECT 1")
        self.note("idle")
        self.wait_while("i")

    def query_long(self) -> None:
        """q: be in the middle of a query that lasts."""
        with self.checkout(30) as conn:
            if conn is not None and self.run(conn, "first", "SELECT 1"):
                self.note("queries")
                self.run(conn, "later", f"SELECT pg_sleep({settings.get('long_query', 3)})")
                self.note("queried")
        self.wait_while("q")

    def take_all(self) -> None:
        """a: have all of the pool's connections at once; then give them back."""
        started = time.monotonic()
        count = settings["config"]["max_conn"]
        taken: list[Any] = []
        while (
            len(taken) < count
            and (left := started + settings.get("all_within", 10) - time.monotonic()) > 0
        ):
            if (conn := self.get(left)) is not None:
                self.run(conn, "first", "SELECT 1")
                taken.append(conn)
        self.note("took", len(taken), f"{time.monotonic() - started:.4f}")
        for conn in taken:
            self.put(conn)
        self.note("gave")
        self.wait_while("a")

    def probe(self) -> None:
        """c: use a connection once and close it, so that every checkout needs the broker and a
        connect."""
        with self.checkout(30, close=True) as conn:
            if conn is not None:
                self.run(conn, "first", "SELECT 1")
        time.sleep(self.random.uniform(0, 0.02))  # thinks

    def done(self) -> None:
        """Tell that an order which is followed once has been: pause."""
        self.orders[self.number] = ord("p")

    def fill(self) -> None:
        """k: once: have all of the pool's connections lie idle in this process."""
        taken = [
            conn
            for _ in range(settings["config"]["max_conn"])
            if (conn := self.get(30)) is not None
        ]
        for conn in taken:
            self.put(conn)
        self.note("filled", len(taken))
        self.done()

    def ask_one(self) -> None:
        """1: once: ask for one connection, use it, close it."""
        with self.checkout(30, close=True) as conn:
            if conn is not None:
                self.run(conn, "first", "SELECT 1")
        self.done()

    def tell_state(self) -> None:
        """s: once: note how many descriptors and idle connections there are, and the RSS."""
        gc.collect()
        # An empty connection object is kept, with its descriptor, by who has given one, and not by
        # who has closed it.
        descriptors = len(os.listdir("/proc/self/fd")) - len(self.pool._local.shells)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        self.note("state", descriptors, resident, self.pool.stats().idle)
        self.done()

    def meet_expiry(self) -> None:
        """e: check one in when another expires, check that one out when it does:
        both within 5 ms."""
        expiration_s = settings["config"]["expiration"]
        one = self.get(10)
        other = self.get(10)
        for conn in (one, other):
            if conn is None:
                continue
            self.run(conn, "first", "SELECT 1")
            idle_from = time.monotonic()
            self.put(conn)
            self.sleep_until(idle_from + expiration_s + self.random.uniform(-0.005, 0.005))
        with self.checkout(10) as conn:
            if conn is not None:
                self.run(conn, "first", "SELECT 1")
        self.note("met")

    @staticmethod
    def sleep_until(when: float) -> None:
        while (left := when - time.monotonic()) > 0:
            time.sleep(left)  # the schedule is the fault

    def fork(self) -> None:
        """f, F: fork while holding a connection, or with an idle one. f: the child uses the pool
        and leaves, again and again; F: the child lives on until it is told to leave. That one may
        be one that Python does not know of: it runs no fork hooks, and keeps every descriptor.
        """
        forever, holding = self.order == "F", self.random.random() < 0.5
        bare = forever and self.random.random() < 0.4
        if forever:
            holding = self.number % 2 == 0  # half of those that are killed
        conn = self.get(10)
        if conn is None or not self.run(conn, "first", "SELECT 1"):
            return
        if not holding:
            self.put(conn)
            conn = None
        # PyDLL keeps the interpreter's lock: in the child no other thread is there to give it back.
        child = ctypes.PyDLL(None).fork() if bare else os.fork()
        if child == 0:
            self.be_bare_child() if bare else self.be_child(forever, conn)
        self.note("forked", child, "bare" if bare else "hooked", "holding" if holding else "idle")
        if conn is not None:
            self.run(conn, "later", "SELECT 1")
        if not forever:
            _, status = os.waitpid(child, 0)
            self.note("reaped", child, os.waitstatus_to_exitcode(status))
        if conn is not None:
            self.wait_while("F")
            self.run(conn, "later", "SELECT 1")
            self.put(conn)
        self.wait_while("F")
        time.sleep(self.random.uniform(0, 0.02))  # thinks

    def become(self) -> int:
        """In a forked child: have a file of events of our own; return the parent's pid."""
        os.close(self.file)
        path = Path(settings["directory"], f"{self.number}-{os.getpid()}.events")
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.note("born", os.getpid())
        return os.getppid()

    def be_bare_child(self) -> None:
        """Do nothing, in a child that knows nothing of the pool but keeps its descriptors."""
        self.live(self.become())
        os._exit(0)

    def live(self, parent: int) -> None:
        self.note("lives")
        while self.order != "x" and os.getppid() in (parent, settings["nursery"]):
            time.sleep(POLL_S)  # polls its orders

    def be_child(self, forever: bool, inherited: Any) -> None:
        """Use the pool in a forked child, and what it must not use; then leave as
        any program does."""
        parent = self.become()
        if inherited is not None:
            try:
                inherited.cursor().execute("SELECT 1")
                self.note("stole", "a query went through on the parent's connection")
            except psycopg2.Error:
                pass  # as it must
            try:
                self.pool.put_conn(inherited)
                self.note("stole", "the parent's connection was checked in")
            except sharedpool.PoolError:
                pass  # as it must
            inherited.close()
        with self.checkout(10) as conn:
            if conn is not None:
                self.run(conn, "first", "SELECT 1")
        if forever:
            self.live(parent)
        sys.exit(0)


def be_worker(number: int) -> None:
    os.setpgid(0, 0)
    status: Any = 1
    try:
        Worker(number).obey()
        status = 0
    except SystemExit as leaving:  # a forked child of it
        status = leaving.code
    except BaseException:
        traceback.print_exc()
    sys.exit(status)  # as any Python program ends: with its exit handlers


def main() -> None:
    settings["nursery"] = os.getpid()
    ctypes.CDLL(None).prctl(
        PR_SET_CHILD_SUBREAPER, 1
    )  # children of killed workers become ours, to be reaped
    pending = b""
    print("ready", flush=True)
    while chunk := os.read(0, 4096):
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            command, argument = line.decode().split()
            if command == "fork":
                pid = os.fork()
                if pid == 0:
                    null = os.open(os.devnull, os.O_RDWR)
                    os.dup2(null, 0)
                    os.dup2(null, 1)
                    be_worker(int(argument))
                print(pid, flush=True)
            elif command == "reap":  # blocks: whoever asks has killed it, or told it to leave
                _, status = os.waitpid(int(argument), 0)
                print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
