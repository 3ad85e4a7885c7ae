"""The board: a pool's shared memory on one host, by which connections move without the broker.

It has three parts, and each word has one writer at a time:

  head     by the broker: whether connections move past it now, and their generation;
           by anybody: a count of requests
  cells    one for each open lease that may move: the session that holds it, and how often it has
           moved. The broker enters the lease. From then on its holder writes the next holder,
           *before* it passes the connection on
  turns    one for each place where a thread may wait: the request that waits there, 0 for none.
           By that thread

A ticket in the lane's queue names a place and a request. It is stale once the place's turn is
another request. What the board says is trusted only where an error costs no more than a
connection: never for whether a slot is free. Pure: the memory is given.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from sharedpool.wire.values import Token

CELLS = 2048
SESSIONS = 1024  # at a time, the broker included
PLACES = 128  # in one session
# The holder of a connection on the shelf, or of one that nobody has received yet. Sessions are
# numbered from 1.
SHELF = 0
# The broker waits in the lane on behalf of its own queue: at this place, with this request.
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
MOVES = _LOW + 1  # a count of moves wraps around here


class Holding(NamedTuple):
    """The session that holds a lease, and how often the lease has moved."""

    holder: int
    moves: int


class Board:
    """A board in `memory` of `BOARD_BYTES`, which is zero at first.

    A word is read and written at once.
    """

    def __init__(self, memory: memoryview) -> None:
        self._bytes = memory.cast("B")
        self._words = self._bytes.cast("Q")
        self._turns = self._bytes[8 * _TURNS_AT :].cast("I")
        # The first byte, not 0 while connections move past the broker: as `moving`, for callers
        # that look often.
        self.moving_flag = self._bytes[:1]

    @property
    def moving(self) -> bool:
        """Whether connections move past the broker.

        Then threads wait at places in the lane, and givers look for one there.
        """
        return self._words[_MOVING] != 0

    @moving.setter
    def moving(self, moving: bool) -> None:
        self._words[_MOVING] = int(moving)

    @property
    def requests(self) -> int:
        """A number that changes at each request. (Two at the same moment may count as one.)"""
        return self._words[_ASKED]

    def count_request(self) -> None:
        """Count a request."""
        self._words[_ASKED] = (self._words[_ASKED] + 1) & _LOW

    @property
    def secret(self) -> bytes:
        """Bytes that only processes with access to the board know: they prove a packet's origin."""
        start = 8 * _SECRET
        return bytes(self._bytes[start : start + SECRET_BYTES])

    @secret.setter
    def secret(self, secret: bytes) -> None:
        start = 8 * _SECRET
        self._bytes[start : start + SECRET_BYTES] = secret

    @property
    def generation(self) -> int:
        """The pool's newest generation. Connections of an older one do not move."""
        return self._words[_GENERATION]

    @generation.setter
    def generation(self, generation: int) -> None:
        self._words[_GENERATION] = generation

    # --- cells

    def enter(self, cell: int, token: Token, holder: int, moves: int) -> None:
        """Let a lease move from now on; `holder` has it after so many `moves`."""
        at = _HEAD_WORDS + _CELL_WORDS * cell
        self._words[at + 2] = (moves & _LOW) << 32 | holder
        self._words[at] = token.epoch
        self._words[at + 1] = token.serial  # last, as this makes it findable

    def remove(self, cell: int) -> None:
        """Let a lease move no more."""
        at = _HEAD_WORDS + _CELL_WORDS * cell
        self._words[at + 1] = 0

    def find(self, token: Token, guess: int = -1) -> int:
        """Return a lease's cell, -1 for none; `guess` is where it was before."""
        if self.has(guess, token):
            return guess
        start, name = 8 * _HEAD_WORDS, _NAME.pack(token.epoch, token.serial)
        cells = bytes(self._bytes[start : 8 * _TURNS_AT])
        at = cells.find(name)
        while at >= 0 and at % _CELL_BYTES:  # a match across two cells
            at = cells.find(name, at + 1)
        return at // _CELL_BYTES if at >= 0 else -1

    def has(self, cell: int, token: Token) -> bool:
        """Return True if a lease may move and this is its cell. Any number is allowed."""
        if not 0 <= cell < CELLS:
            return False
        at = _HEAD_WORDS + _CELL_WORDS * cell
        return 0 < token.serial == self._words[at + 1] and self._words[at] == token.epoch

    def holding(self, cell: int) -> Holding:
        """Return the holder of a cell's lease."""
        word = self._words[_HEAD_WORDS + _CELL_WORDS * cell + 2]
        return Holding(word & _LOW, word >> 32)

    def set_holder(self, cell: int, holder: int) -> int:
        """Write the next holder of a lease, as its present holder; return the count of moves."""
        at = _HEAD_WORDS + _CELL_WORDS * cell + 2
        moves = ((self._words[at] >> 32) + 1) & _LOW
        self._words[at] = moves << 32 | holder
        return moves

    def snapshot(self, cells: int) -> bytes:
        """Return a copy of the first `cells` cells, to compare."""
        start = 8 * _HEAD_WORDS
        return bytes(self._bytes[start : start + 8 * _CELL_WORDS * cells])

    # --- turns

    def is_waiting_at(self, place: int, request: int) -> bool:
        """Return True if a request waits at a place."""
        return 0 < request == self._turns[place] if place < SESSIONS * PLACES else False

    def take_place(self, place: int, request: int) -> None:
        """Write that a request waits at a place."""
        self._turns[place] = request & _LOW

    def leave_place(self, place: int) -> None:
        """Write that nobody waits at a place."""
        self._turns[place] = 0

    def waiting(self, sessions: Iterable[int]) -> int:
        """Return how many threads wait in the sessions with these indexes in the table of turns."""
        return sum(
            PLACES - self._turns[s * PLACES : (s + 1) * PLACES].tolist().count(0) for s in sessions
        )

    def clear_session(self, index: int) -> None:
        """Write that no thread of a session waits."""
        for place in range(index * PLACES, (index + 1) * PLACES):
            self._turns[place] = 0

    def release(self) -> None:
        """Release the memory. The board may not be used afterwards."""
        for view in (self.moving_flag, self._turns, self._words, self._bytes):
            view.release()
