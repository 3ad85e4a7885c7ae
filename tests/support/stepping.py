"""A worker that stops at a step of a move: `python stepping.py SETTINGS` is `worker.py` with two
settings more.

`at` names a step. At the `_TURN`th time the process sends itself the signal `number` there.
"""

from __future__ import annotations

import itertools
import json
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from threading import get_ident
from typing import Any

from sharedpool.descriptors import passing
from sharedpool.lane.lane import Lane
from sharedpool.lane.wait_sockets import WaitSocket
from sharedpool.postgres import buffer_probe
from sharedpool.wire.board import Board
from sharedpool.worker import mover

_TURN = 5


def _always(*_: object) -> bool:
    return True


def _something(result: object, *_: object) -> bool:
    return result is not None


def _by_lane(*_: object) -> bool:
    caller = sys._getframe(2).f_globals["__name__"]
    return bool(caller == "sharedpool.lane.lane")


def _from_shelf(result: object, lane: Lane, sock: object) -> bool:
    return isinstance(result, tuple) and sock is lane._shelf_out


def _has_come(_: object, wait_socket: WaitSocket) -> bool:
    return wait_socket.peek() is not None


# The function's owner and name, whether the signal comes before or after its call, and a condition
# on its result and arguments.
Step = tuple[Any, str, str, Callable[..., bool]]
GIVING: dict[str, Step] = {
    "the reset is to be sent": (mover, "unregister", "before", _always),
    "the reset is sent": (buffer_probe, "Probe", "before", _always),
    "the session is taken from under its object": (
        buffer_probe.Probe,
        "is_passed",
        "before",
        _always,
    ),
    "a ticket is taken": (Lane, "next_ticket", "after", _something),
    "the receiver is on the board": (passing, "send_with_to", "before", _always),
    "it is sent": (passing, "send_with_to", "after", _always),
    "the shelf is on the board": (passing, "send_with", "before", _by_lane),
    "it is on the shelf": (passing, "send_with", "after", _by_lane),
}
TAKING: dict[str, Step] = {
    "the turn is written": (Board, "take_place", "after", _always),
    "the ticket is written": (Lane, "add_ticket", "after", _always),
    "it has come": (WaitSocket, "read", "before", _has_come),
    "it is read": (WaitSocket, "read", "after", _something),
    "it is off the shelf": (Lane, "_next", "after", _from_shelf),
    "it is off the shelf, and that on the board": (Lane, "take_from_shelf", "after", _something),
    "the reset's answer is read": (mover, "parameters_after", "after", _always),
    "it is adopted": (mover, "adopt", "after", _always),
}


def _arm(owner: Any, name: str, when: str, fits: Callable[..., bool], number: int) -> None:
    original = getattr(owner, name)
    turns = itertools.count(1)

    def step(*arguments: Any) -> Any:
        if when == "before" and fits(None, *arguments) and next(turns) == _TURN:
            signal.pthread_kill(get_ident(), number)
        result = original(*arguments)
        if when == "after" and fits(result, *arguments) and next(turns) == _TURN:
            signal.pthread_kill(get_ident(), number)
        return result

    setattr(owner, name, step)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    _arm(*(GIVING | TAKING)[settings.pop("at")], settings.pop("number"))
    sys.argv[1] = json.dumps(settings)
    runpy.run_path(str(Path(__file__).with_name("worker.py")), run_name="__main__")
