"""A bug that can be planted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A bug: `edits` are (file, text, what it becomes); `tests` are pytest's arguments."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]
