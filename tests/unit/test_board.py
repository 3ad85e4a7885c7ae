"""The board: what is written where, what is found again, and who waits."""

from __future__ import annotations

import struct

import pytest

from sharedpool.wire.board import (
    BOARD_BYTES,
    BROKER_PLACE,
    CELLS,
    PLACES,
    SECRET_BYTES,
    SESSIONS,
    SHELF,
    Board,
    Holding,
)
from sharedpool.wire.values import NO_TOKEN, Token

MOST = 0xFFFFFFFF


@pytest.fixture
def memory() -> bytearray:
    return bytearray(BOARD_BYTES)


@pytest.fixture
def board(memory: bytearray) -> Board:
    return Board(memoryview(memory))


def changed_words(memory: bytearray, before: bytes) -> list[int]:
    return [
        at // 8 for at in range(0, BOARD_BYTES, 8) if memory[at : at + 8] != before[at : at + 8]
    ]


def test_head_cells_and_turns_do_not_overlap(memory: bytearray, board: Board) -> None:
    """The outermost places of each part, all written, all read back."""
    board.moving, board.secret, board.generation = True, b"s" * SECRET_BYTES, 1 << 40
    board.count_request()
    board.enter(0, Token(1, 2), 3, 4)
    board.enter(CELLS - 1, Token(5, 6), 7, 8)
    board.take_place(0, 9)
    board.take_place(SESSIONS * PLACES - 1, 10)
    assert (board.moving, board.secret, board.generation, board.requests) == (
        True,
        b"s" * SECRET_BYTES,
        1 << 40,
        1,
    )
    assert (board.holding(0), board.holding(CELLS - 1)) == (Holding(3, 4), Holding(7, 8))
    assert (board.is_waiting_at(0, 9), board.is_waiting_at(SESSIONS * PLACES - 1, 10)) == (
        True,
        True,
    )
    assert memory[-4:] == struct.pack("=I", 10)


def test_a_zeroed_board_says_nothing(board: Board) -> None:
    assert (board.moving, board.requests, board.generation, board.secret) == (
        False,
        0,
        0,
        bytes(SECRET_BYTES),
    )
    assert board.find(Token(1, 1)) == -1
    assert board.waiting(range(SESSIONS)) == 0
    assert not board.is_waiting_at(0, 0)


def test_the_first_byte_tells_whether_connections_move(board: Board) -> None:
    """Whoever looks often reads that alone."""
    seen = []
    for moving in (True, False):
        board.moving = moving
        seen.append(bool(board.moving_flag[0]))
    assert seen == [True, False]


@pytest.mark.parametrize("what", ["hand", "moving", "generation", "asked", "turn"])
def test_other_writes_beside_a_cell_are_left_alone(
    memory: bytearray, board: Board, what: str
) -> None:
    """Each word has one writer: a write that took in a neighbour would undo that one's."""
    board.enter(1, Token(1, 1), 1, 1)
    before = bytes(memory)
    if what == "hand":
        board.set_holder(1, 5)
    elif what == "moving":
        board.moving = True
    elif what == "generation":
        board.generation = 7
    elif what == "asked":
        board.count_request()
    else:
        board.take_place(2, 8)
    assert len(changed_words(memory, before)) == 1


def test_two_turns_in_one_word_are_two(board: Board) -> None:
    board.take_place(0, MOST)
    board.take_place(1, 5)
    board.leave_place(1)
    assert (board.is_waiting_at(0, MOST), board.is_waiting_at(1, 5)) == (True, False)


# --- cells


def test_a_lease_is_found_where_it_was_entered_and_not_after_it_was_struck(board: Board) -> None:
    token = Token(3, 77)
    board.enter(9, token, 2, 0)
    assert (board.find(token), board.has(9, token), board.has(8, token)) == (9, True, False)
    board.remove(9)
    assert (board.find(token), board.has(9, token)) == (-1, False)


def test_a_guess_is_checked(board: Board) -> None:
    board.enter(4, Token(1, 1), 1, 0)
    board.enter(5, Token(1, 2), 1, 0)
    assert (board.find(Token(1, 2), 4), board.find(Token(1, 2), 5), board.find(Token(1, 3), 5)) == (
        5,
        5,
        -1,
    )


def test_parts_of_two_cells_are_no_lease(board: Board) -> None:
    """The holder of one cell and the epoch of the next read like a name."""
    board.enter(0, Token(8, 9), 21, 0)
    board.enter(1, Token(34, 1), 1, 0)
    assert board.find(Token(21, 34)) == -1
    board.enter(5, Token(21, 34), 1, 0)
    assert board.find(Token(21, 34)) == 5


@pytest.mark.parametrize("cell", [-1, -3, CELLS, 1 << 40])
def test_a_cell_that_there_is_not_has_nothing(board: Board, cell: int) -> None:
    """It comes from other processes: nonsense must cost a connection, not a thread."""
    board.generation = 9
    assert not board.has(cell, Token(9, 0))
    assert not board.has(cell, Token(1, 1))
    assert board.find(Token(1, 1), cell) == -1


def test_an_empty_cell_has_nothing(board: Board) -> None:
    assert not board.has(0, NO_TOKEN)


def test_each_holder_writes_the_next_one_and_counts_the_move(board: Board) -> None:
    board.enter(2, Token(1, 1), 6, 40)
    assert board.holding(2) == Holding(6, 40)
    assert board.set_holder(2, 7) == 41
    assert board.holding(2) == Holding(7, 41)
    assert board.set_holder(2, SHELF) == 42
    assert board.holding(2) == Holding(SHELF, 42)


def test_moves_wrap(board: Board) -> None:
    board.enter(2, Token(1, 1), MOST, MOST)
    assert board.set_holder(2, 1) == 0
    assert board.holding(2) == Holding(1, 0)


@pytest.mark.parametrize("moves", [MOST + 1, 1 << 62])
def test_a_lease_is_entered_whatever_moves_were_reported(board: Board, moves: int) -> None:
    """A worker has said it."""
    board.enter(2, Token(1, 1), 3, moves)
    assert board.holding(2).holder == 3


def test_holdings_differ_whenever_one_does(board: Board) -> None:
    board.enter(0, Token(1, 1), 1, 0)
    board.enter(3, Token(1, 2), 1, 0)
    before = board.snapshot(3)
    board.set_holder(3, 2)
    assert board.snapshot(3) == before  # not among the first three
    board.set_holder(0, 1)  # to the same one: it was away meanwhile
    assert board.snapshot(3) != before


def test_asked_changes_and_wraps(memory: bytearray, board: Board) -> None:
    board.count_request()
    assert board.requests == 1
    memory[8:16] = struct.pack("=Q", MOST)
    board.count_request()
    assert board.requests == 0


# --- turns


def test_a_turn_is_one_requests_at_one_place(board: Board) -> None:
    board.take_place(33, 5)
    assert board.is_waiting_at(33, 5)
    assert not board.is_waiting_at(33, 6)
    assert not board.is_waiting_at(34, 5)
    board.leave_place(33)
    assert not board.is_waiting_at(33, 5)


def test_nobody_waits_at_a_place_that_there_is_not(board: Board) -> None:
    assert not board.is_waiting_at(SESSIONS * PLACES, 1)
    assert not board.is_waiting_at(MOST, 1)


def test_request_numbers_are_kept_as_far_as_a_ticket_has_them(board: Board) -> None:
    board.take_place(0, (1 << 32) + 5)
    assert board.is_waiting_at(0, 5)


def test_waiters_are_counted_by_session(board: Board) -> None:
    for place in (0, 1, PLACES - 1, PLACES, 3 * PLACES + 4):
        board.take_place(place, 1)
    assert [board.waiting([index]) for index in range(4)] == [3, 1, 0, 1]
    assert board.waiting([0, 1]) == 4
    assert board.waiting([]) == 0


def test_a_session_that_is_over_waits_nowhere(board: Board) -> None:
    for place in (PLACES - 1, PLACES, 2 * PLACES - 1, 2 * PLACES, BROKER_PLACE):
        board.take_place(place, 1)
    board.clear_session(1)
    assert [
        board.is_waiting_at(place, 1)
        for place in (PLACES - 1, PLACES, 2 * PLACES - 1, 2 * PLACES, BROKER_PLACE)
    ] == [
        True,
        False,
        False,
        True,
        True,
    ]


def test_after_release_the_memory_can_be_closed(memory: bytearray) -> None:
    view = memoryview(memory)
    Board(view).release()
    view.release()
    memory.extend(b"x")  # raises while somebody has a view of it
