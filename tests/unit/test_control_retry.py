"""The log of a server that does not let the control connection in."""

from sharedpool.broker.postgres.control import _Retry


def test_a_failure_is_told_once_a_minute() -> None:
    retry = _Retry()
    assert [retry.is_news("refused", now) for now in (0.0, 1.0, 59.0, 61.0)] == [
        True,
        False,
        False,
        True,
    ]


def test_another_failure_is_told_at_once() -> None:
    retry = _Retry()
    assert retry.is_news("refused", 0.0)
    assert retry.is_news("no password", 1.0)


def test_a_failure_after_a_success_is_told() -> None:
    retry = _Retry()
    assert retry.is_news("refused", 0.0)
    retry.succeeded()
    assert retry.is_news("refused", 1.0)
