"""What the rules of the model have in common.

A step is one rule; `pick` chooses among what is there to be chosen.

One small number for each step instead of several draws: Hypothesis spends more time on drawing than
the world on stepping.
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition

from tests.model.network import Line
from tests.model.worker import Worker
from tests.model.world import World

picks = st.integers(0, 1023)


def some(attribute: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Allow a step only when an awake worker has something in `attribute`: no steps are wasted."""
    return precondition(
        lambda self: any(
            getattr(worker, attribute)
            for worker in self.world.workers.values()
            if not worker.frozen
        )
    )


class Rules(RuleBasedStateMachine):
    """A world, and the choice of what a rule is about."""

    world: World

    def one(self, pick: int, having: str = "") -> tuple[Worker, int]:
        """Choose a worker that is not frozen and has something in its attribute `having`; and the
        rest of `pick`."""
        found = [
            w
            for w in self.world.workers.values()
            if not w.frozen and (not having or getattr(w, having))
        ]
        return found[pick % len(found)], pick // len(found)

    def line(self, pick: int, way: str) -> tuple[Line, int] | None:
        """Choose a line with something under way."""
        found = [line for line in self.world.network.lines.values() if getattr(line, way)]
        return (found[pick % len(found)], pick // len(found)) if found else None
