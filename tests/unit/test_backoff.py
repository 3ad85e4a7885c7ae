"""How a pool holds back while connects fail."""

from sharedpool.broker.core.backoff import PROBE_EVERY_S, PROBE_LIMIT_S, Backoff
from sharedpool.wire.values import Token


def backoff() -> Backoff:
    return Backoff(lambda: 0.5)


def test_nothing_is_held_back_while_connects_succeed() -> None:
    held = backoff()
    held.granted(Token(1, 1), 4, 50.0)
    held.opened(Token(1, 1), 5, 10)
    assert held.allowance(10, 5) == 10


def test_after_a_failure_the_pool_keeps_what_it_has_and_tries_one_at_a_time() -> None:
    held = backoff()
    at = held.failed(Token(1, 0), 3, "too many clients", 100.0)
    assert 100 + PROBE_EVERY_S <= at <= 100 + 2 * PROBE_EVERY_S
    assert held.allowance(10, 3) == 3
    held.elapsed(at - 0.01)
    assert held.allowance(10, 3) == 3
    held.elapsed(at)
    assert held.allowance(10, 3) == 4
    assert held.allowance(10, 3, connecting=True) == 3  # a probe is alone
    held.granted(Token(1, 9), 3, 50.0)
    assert held.allowance(10, 3) == 0


def test_a_probe_that_succeeds_allows_the_next_at_once_up_to_the_limit() -> None:
    held = backoff()
    held.elapsed(held.failed(Token(1, 0), 0, "down", 0.0))
    for number in range(5):
        assert held.allowance(5, number) == number + 1
        held.granted(Token(1, number), number, 50.0)
        assert held.allowance(5, number) == 0
        held.opened(Token(1, number), number + 1, 5)
    assert not held.active
    assert held.error == ""


def test_a_probe_that_fails_waits_again_and_one_without_an_outcome_does_not_block() -> None:
    held = backoff()
    held.elapsed(held.failed(Token(1, 0), 0, "down", 0.0))
    held.granted(Token(1, 1), 0, 50.0)
    again = held.failed(Token(1, 1), 0, "down", 5.0)
    assert held.allowance(5, 0) == 0
    held.elapsed(again)
    held.granted(Token(1, 2), 0, 50.0)
    held.ended(Token(1, 2))
    assert held.allowance(5, 0) == 1


def test_the_success_of_an_older_connect_is_no_probe() -> None:
    held = backoff()
    held.failed(Token(1, 0), 0, "down", 0.0)
    held.opened(Token(1, 7), 1, 5)
    assert held.allowance(5, 1) == 0


def test_another_connects_failure_does_not_take_the_probes_outcome_away() -> None:
    held = backoff()
    held.elapsed(held.failed(Token(1, 0), 0, "full", 0.0))
    held.granted(Token(1, 1), 0, 50.0)
    held.failed(Token(1, 2), 0, "full", 1.0)
    held.opened(Token(1, 1), 1, 5)
    assert held.allowance(5, 1) == 2


def test_a_probe_without_an_answer_is_not_waited_for_for_ever() -> None:
    held = backoff()
    held.elapsed(held.failed(Token(1, 0), 2, "down", 0.0))
    assert held.granted(Token(1, 1), 2, 10.0)
    held.elapsed(10.0 + PROBE_LIMIT_S)
    assert held.allowance(5, 2) == 3
