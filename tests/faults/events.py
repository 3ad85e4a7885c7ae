"""What the workers have noted: their events, the checkouts these make, and whether
any two overlap."""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

# Noted by a worker that holds nothing, in the order of its life.
_ANSWERS = ("out", "fail")


class Event(NamedTuple):
    """One line of a worker's file; `at` by CLOCK_MONOTONIC."""

    at: float
    kind: str
    words: tuple[str, ...]


@dataclass(slots=True)
class Checkout:
    """One `get_conn` and what came of it.

    `begin` and `end` are inside the library's calls: they never say too much.
    """

    worker: str
    asked: float
    timeout: float
    answered: float | None = None
    backend: tuple[str, str] | None = None  # pid, start
    end: float | None = None
    failure: str = ""
    text: str = ""
    dirty: bool = False
    errors: list[tuple[float, str, str]] = field(
        default_factory=list
    )  # when, first or later, class and text

    @property
    def waited(self) -> float:
        assert self.answered is not None
        return self.answered - self.asked

    @property
    def lateness(self) -> float:
        """How much after its deadline it answered."""
        return self.waited - self.timeout


def _parse(line: str) -> Event:
    at, kind, *words = line.split(" ")
    return Event(float(at), kind, tuple(words))


def read_events(path: Path) -> Iterator[Event]:
    """Read a worker's file event by event; a last line without its end is not there yet."""
    with path.open() as file:
        for line in file:
            if line.endswith("\n"):
                yield _parse(line[:-1])


class Tail:
    """The newest events of a file that grows, read once each; `tally` counts all there were by
    kind."""

    def __init__(self, path: Path, kept: int = 4000) -> None:
        self._path = path
        self._offset = 0
        self._events: deque[Event] = deque(maxlen=kept)
        self.tally: Counter[str] = Counter()

    def read(self) -> list[Event]:
        """Read the new events; return the newest ones, oldest first."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return []
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.decode().splitlines():
            event = _parse(line)
            self._events.append(event)
            self.tally[event.kind] += 1
        return list(self._events)


def files(directory: Path) -> dict[str, Iterator[Event]]:
    """Have all workers' files, to be read once."""
    return {path.stem: read_events(path) for path in sorted(directory.glob("*.events"))}


def checkouts(files: Mapping[str, Iterable[Event]]) -> list[Checkout]:
    """Return the checkouts of all workers."""
    return [checkout for worker, events in files.items() for checkout in _of_one(worker, events)]


def _of_one(worker: str, events: Iterable[Event]) -> Iterator[Checkout]:
    asking: Checkout | None = None
    held: dict[str, Checkout] = {}  # by backend pid
    last: Checkout | None = None
    for at, kind, words in events:
        if kind == "ask":
            asking = last = Checkout(worker, at, float(words[0]))
            yield asking
        elif kind in _ANSWERS and asking is not None:
            asking.answered = at
            if kind == "out":
                asking.backend = (words[0], words[1])
                asking.dirty = words[2] != "0"
                held[words[0]] = asking
            else:
                asking.failure, asking.text = words[0], " ".join(words[1:])
            asking = None
        elif kind == "error" and last is not None:
            last.errors.append((at, words[0], " ".join(words[1:])))
        elif kind == "in":
            ended = held.pop(words[0], None)
            if (
                ended is None and words[0] == "0" and len(held) == 1
            ):  # a broken connection has no pid any more
                _, ended = held.popitem()
            if ended is not None:
                ended.end = at


def overlaps(
    found: Iterable[Checkout], killed: Mapping[str, float]
) -> list[tuple[Checkout, Checkout]]:
    """Return the pairs of checkouts that had the same backend at the same time.

    A checkout without an end lasted until its worker was killed, or to the end of the test.
    """
    by_backend: dict[tuple[str, str], list[tuple[float, float, Checkout]]] = defaultdict(list)
    for checkout in found:
        if checkout.backend is not None and checkout.answered is not None:
            end = (
                checkout.end
                if checkout.end is not None
                else killed.get(checkout.worker, float("inf"))
            )
            by_backend[checkout.backend].append((checkout.answered, end, checkout))
    pairs = []
    for spans in by_backend.values():
        spans.sort(key=lambda span: span[:2])
        for (_, end, one), (begin, _, other) in pairwise(spans):
            if begin < end:
                pairs.append((one, other))
    return pairs


def moves(found: Iterable[Checkout]) -> int:
    """Count how often a backend went from one worker to another: a hand-over, and nothing else,
    does that."""
    users: dict[tuple[str, str], str] = {}
    moved = 0
    for checkout in sorted(
        (c for c in found if c.answered is not None), key=lambda c: c.answered or 0.0
    ):
        if checkout.backend is not None:
            moved += users.get(checkout.backend, checkout.worker) != checkout.worker
            users[checkout.backend] = checkout.worker
    return moved


def failures(found: Iterable[Checkout]) -> Counter[str]:
    """Count the failed checkouts and statements by their exceptions."""
    count: Counter[str] = Counter()
    for checkout in found:
        if checkout.failure:
            count[checkout.failure] += 1
        for _, when, text in checkout.errors:
            count[f"{text.split(' ')[0]} ({when})"] += 1
    return count
