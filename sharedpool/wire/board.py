"""The board: one pool's memory that its processes on one host share, so that connections move without the broker.

It has three parts, and each word has one writer at a time:

  head     whether connections move past the broker now, and of which generation they must be: by the broker; how often
           somebody has asked for one: by anybody
  cells    one for each open lease that may move: which session holds it, and how often it has moved. The broker writes
           the lease's name in; from then on whoever has the connection writes the next holder, *before* it passes it on
  turns    one for each place where a thread may wait: the request that waits there, 0 for none. By that thread

A ticket in the queue names such a place and its request: it is stale once the turn is another. What is written here is
believed only as far as an error costs a connection: never for whether a slot is free. Pure: it is given its memory.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from sharedpool.wire.messages import Token

CELLS = 2048
SESSIONS = 1024  # at a time, the broker being one of them
PLACES = 128  # of one session
# Who holds what lies on the shelf, or is in nobody's hands yet. Sessions are numbered from 1.
SHELF = 0
# The broker waits like anybody else, for those who wait at the broker: at this place, for this request.
BROKER_PLACE, BROKER_REQUEST = SESSIONS * PLACES - 1, 1
SECRET_BYTES = 16

_HEAD_WORDS = 8
_MOVING, _ASKED, _SECRET, _GENERATION = 0, 1, 2, 4
_CELL_WORDS = 3  # epoch, serial, holder and moves
_CELL_BYTES = 8 * _CELL_WORDS
_NAME = struct.Struct("=QQ")
_TURNS_AT = _HEAD_WORDS + _CELL_WORDS * CELLS
_WORDS = _TURNS_AT + SESSIONS * PLACES // 2
BOARD_BYTES = 8 * _WORDS
_LOW = 0xFFFFFFFF
MOVES = _LOW + 1  # so many are counted, then it begins anew


class Holding(NamedTuple):
    """Who holds a lease, and how often it has moved."""

    holder: int
    moves: int


class Board:
    """A board in `memory`, of `BOARD_BYTES`, which is zero at first. Words are read and written in one piece."""

    def __init__(self, memory: memoryview) -> None:
        self._bytes = memory.cast("B")
        self._words = self._bytes.cast("Q")
        self._turns = self._bytes[8 * _TURNS_AT :].cast("I")
        self.head = self._bytes[
            :1
        ]  # not 0 while connections move past the broker: for who looks often

    @property
    def moving(self) -> bool:
        """Whether connections move past the broker: who waits takes a place, who gives looks for one."""
        return self._words[_MOVING] != 0

    @moving.setter
    def moving(self, moving: bool) -> None:
        self._words[_MOVING] = int(moving)

    @property
    def requests(self) -> int:
        """A number that changes when somebody asks. (Two who ask at once may count as one.)"""
        return self._words[_ASKED]

    def count_request(self) -> None:
        """Change that number."""
        self._words[_ASKED] = (self._words[_ASKED] + 1) & _LOW

    @property
    def secret(self) -> bytes:
        """What tells a packet of ours from anybody else's: who has the board was let in."""
        start = 8 * _SECRET
        return bytes(self._bytes[start : start + SECRET_BYTES])

    @secret.setter
    def secret(self, secret: bytes) -> None:
        start = 8 * _SECRET
        self._bytes[start : start + SECRET_BYTES] = secret

    @property
    def generation(self) -> int:
        """The pool's newest generation: a connection of an older one does not move."""
        return self._words[_GENERATION]

    @generation.setter
    def generation(self, generation: int) -> None:
        self._words[_GENERATION] = generation

    # --- cells

    def enter(self, cell: int, token: Token, holder: int, moves: int) -> None:
        """Let a lease move from now on; `holder` has it, and it has moved so often before."""
        at = _HEAD_WORDS + _CELL_WORDS * cell
        self._words[at + 2] = (moves & _LOW) << 32 | holder
        self._words[at] = token.epoch
        self._words[at + 1] = token.serial  # last: only now it is found

    def remove(self, cell: int) -> None:
        """Let a lease move no more: nobody finds it."""
        at = _HEAD_WORDS + _CELL_WORDS * cell
        self._words[at + 1] = 0

    def find(self, token: Token, guess: int = -1) -> int:
        """Return a lease's cell, -1 for none. `guess`: where it was."""
        if self.has(guess, token):
            return guess
        start, name = 8 * _HEAD_WORDS, _NAME.pack(token.epoch, token.serial)
        cells = bytes(self._bytes[start : 8 * _TURNS_AT])
        at = cells.find(name)
        while at >= 0 and at % _CELL_BYTES:  # parts of two cells
            at = cells.find(name, at + 1)
        return at // _CELL_BYTES if at >= 0 else -1

    def has(self, cell: int, token: Token) -> bool:
        """Say whether a lease may move, and this is its cell: any number, from another process."""
        if not 0 <= cell < CELLS:
            return False
        at = _HEAD_WORDS + _CELL_WORDS * cell
        return 0 < token.serial == self._words[at + 1] and self._words[at] == token.epoch

    def holding(self, cell: int) -> Holding:
        """Return who holds the lease of a cell."""
        word = self._words[_HEAD_WORDS + _CELL_WORDS * cell + 2]
        return Holding(word & _LOW, word >> 32)

    def set_holder(self, cell: int, holder: int) -> int:
        """Write who holds a lease next, by who has it now; return how often it has moved then."""
        at = _HEAD_WORDS + _CELL_WORDS * cell + 2
        moves = ((self._words[at] >> 32) + 1) & _LOW
        self._words[at] = moves << 32 | holder
        return moves

    def snapshot(self, cells: int) -> bytes:
        """Return something that differs whenever one of the first `cells` cells does."""
        start = 8 * _HEAD_WORDS
        return bytes(self._bytes[start : start + 8 * _CELL_WORDS * cells])

    # --- turns

    def is_waiting_at(self, place: int, request: int) -> bool:
        """Say whether a request waits at a place."""
        return 0 < request == self._turns[place] if place < SESSIONS * PLACES else False

    def take_place(self, place: int, request: int) -> None:
        """Say that a request waits there."""
        self._turns[place] = request & _LOW

    def leave_place(self, place: int) -> None:
        """Say that nobody waits there."""
        self._turns[place] = 0

    def waiting(self, sessions: Iterable[int]) -> int:
        """Return how many wait in the sessions that have these numbers in the table of turns."""
        return sum(
            PLACES - self._turns[s * PLACES : (s + 1) * PLACES].tolist().count(0) for s in sessions
        )

    def clear_session(self, index: int) -> None:
        """Say that nobody of a session waits."""
        for place in range(index * PLACES, (index + 1) * PLACES):
            self._turns[place] = 0

    def release(self) -> None:
        """Let go of the memory: nothing here may be used afterwards."""
        for view in (self.head, self._turns, self._words, self._bytes):
            view.release()
