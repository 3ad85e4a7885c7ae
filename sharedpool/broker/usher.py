"""Who is let in while a broker has few descriptors left: see `room.py`."""

from __future__ import annotations

import logging
import math

from sharedpool.broker.desk import Desk
from sharedpool.broker.post import Post
from sharedpool.broker.room import Room

logger = logging.getLogger("sharedpool.broker")

_OFTEN_S, _SELDOM_S = 0.25, 0.05


class Usher:
    """Lets workers in, at the socket and at the desk, while there is room."""

    def __init__(self, room: Room, post: Post, desk: Desk | None) -> None:
        self._room = room
        self._post = post
        self._desk = desk
        self._look_at = -math.inf
        self._crowded = self._told = False

    def look(self, now: float) -> None:
        """Hide the address when there is little room, show it when there is again."""
        if now < self._look_at and not self._crowded:
            return
        room, free = self._room, self._room.free()
        self._look_at = now + _SELDOM_S if free > 16 * room.door else -math.inf
        if free < room.door and not self._crowded:
            self._crowded = self._post.hide()
            if self._crowded and not self._told:
                self._told = True  # once: it may come and go with each worker
                text = "%d descriptors are left of %d: nobody is let in until there are more: raise the limit (%s)"
                logger.warning(text, free, room.limit, "`ulimit -n`, LimitNOFILE=")
        elif free >= room.door + 2 and self._crowded:
            self._crowded = not self._post.show()
        if self._desk is not None and self._desk.full and room.spare():
            self._desk.admit()

    def next_look(self, now: float) -> float:
        """Return by when to look again, whatever happens; never, while there is room."""
        waiting = self._crowded or (self._desk is not None and self._desk.full)
        return now + _OFTEN_S if waiting else math.inf
