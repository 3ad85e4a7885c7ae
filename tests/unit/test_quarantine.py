"""When the slot of a connect whose end nobody saw is free again."""

from sharedpool.broker.core.commands import SurveyResult
from sharedpool.broker.core.quarantine import SETTLE_S, Quarantine
from sharedpool.wire.values import Backend, Token

SLOT = Token(1, 1)


def look(
    quarantine: Quarantine,
    now: float,
    *,
    starting: tuple[int, ...] = (),
    strange: tuple[int, ...] = (),
) -> bool:
    """One survey; say whether the slot is free after it."""
    order = quarantine.order(0.0)
    assert order is not None
    survey = SurveyResult(order[0], frozenset(starting), {})
    return quarantine.surveyed(survey, [Backend(pid, 1) for pid in strange], now) == [SLOT]


def quarantine_of_one() -> Quarantine:
    quarantine = Quarantine()
    quarantine.add(SLOT)
    return quarantine


def test_nothing_to_see_twice_frees_it() -> None:
    quarantine = quarantine_of_one()
    assert not look(quarantine, 1.0)
    assert not look(quarantine, 1.0 + SETTLE_S / 2)
    assert look(quarantine, 1.0 + SETTLE_S)
    assert not quarantine


def test_a_backend_in_start_up_or_unknown_keeps_it_until_it_is_gone() -> None:
    quarantine = quarantine_of_one()
    assert not look(quarantine, 1.0, starting=(7,))
    assert not look(quarantine, 2.0, strange=(7,))  # it has started
    assert look(quarantine, 3.0)


def test_a_backend_that_only_the_second_look_shows_keeps_it() -> None:
    quarantine = quarantine_of_one()
    assert not look(quarantine, 1.0)  # just forked
    assert not look(quarantine, 2.0, starting=(7,))
    assert not look(quarantine, 3.0, strange=(7,))
    assert look(quarantine, 4.0)


def test_later_strangers_are_somebody_elses() -> None:
    quarantine = quarantine_of_one()
    assert not look(quarantine, 1.0, starting=(7,))
    assert not look(quarantine, 2.0, starting=(7, 8))
    assert not look(quarantine, 3.0, starting=(9, 10), strange=(8,))
    assert look(quarantine, 4.0, starting=(10,), strange=(9,))


def test_a_look_that_began_before_it_does_not_count_and_the_first_needs_a_barrier() -> None:
    quarantine = Quarantine()
    quarantine.add(Token(1, 5))
    order = quarantine.order(0.0)
    assert order == (1, True)
    quarantine.add(SLOT)
    assert quarantine.order(0.0) is None  # one at a time
    quarantine.surveyed(SurveyResult(1, frozenset(), {}), [], 1.0)
    assert quarantine.order(0.0) == (2, True)
    assert quarantine.surveyed(SurveyResult(2, frozenset(), {}), [], 2.0) == [Token(1, 5)]
    assert quarantine.order(0.0) == (3, False)
    assert quarantine.surveyed(SurveyResult(3, frozenset(), {}), [], 3.0) == [SLOT]


def test_other_evidence_ends_it() -> None:
    quarantine = quarantine_of_one()
    quarantine.discard(SLOT)
    assert quarantine.order(0.0) is None
