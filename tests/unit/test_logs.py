"""A log for threads that must not wait for its handlers."""

import logging
import os
import threading
from collections.abc import Iterator

import pytest

from sharedpool.worker.logs import Logs
from tests.support.waiting import wait_until

NAME = "sharedpool.test-logs"


class Handler(logging.Handler):
    """Keeps records, with the thread that told them; waits until it may go on;
    raises if it is to."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[logging.LogRecord, str]] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.raises: Exception | None = None

    def emit(self, record: logging.LogRecord) -> None:
        assert self.may_go_on.wait(30)
        self.records.append((record, threading.current_thread().name))
        if self.raises is not None:
            raise self.raises

    def texts(self) -> list[str]:
        return [record.getMessage() for record, _ in self.records]


@pytest.fixture
def handler() -> Iterator[Handler]:
    handler = Handler()
    logger = logging.getLogger(NAME)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)


@pytest.fixture
def logs() -> Logs:
    return Logs(NAME)


def test_an_ordinary_thread_logs_by_itself(logs: Logs, handler: Handler) -> None:
    logs.info("%d slots", 3)
    ((record, thread),) = handler.records
    assert (record.getMessage(), thread) == ("3 slots", threading.current_thread().name)
    assert record.filename == os.path.basename(__file__)


def test_a_kept_thread_waits_for_no_handler_and_its_records_say_whose_they_are(
    logs: Logs, handler: Handler
) -> None:
    handler.may_go_on.clear()
    with logs.kept():
        assert logs.is_kept
        logs.debug("not wanted")
        logs.warning("%s", "first")
        try:
            raise ValueError("odd")
        except ValueError:
            logs.exception("second")
        logs.info("third")
    assert not logs.is_kept
    assert handler.records == []
    handler.may_go_on.set()
    wait_until(lambda: len(handler.records) == 3, what="the records to be told")
    assert handler.texts() == ["first", "second", "third"]
    me = threading.current_thread()
    for record, thread in handler.records:
        assert thread == "sharedpool-logs"
        assert (record.thread, record.threadName) == (me.ident, me.name)
        assert (record.filename, record.funcName) == (
            os.path.basename(__file__),
            me.name and record.funcName,
        )
        assert (
            record.funcName
            == "test_a_kept_thread_waits_for_no_handler_and_its_records_say_whose_they_are"
        )
    assert handler.records[1][0].exc_info is not None


def test_a_handlers_exception_costs_no_other_record(
    logs: Logs, handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: raised.append(args.exc_value))
    handler.raises = RuntimeError("a handler's own")
    with logs.kept():
        logs.info("one")
        logs.info("two")
    logs.flush(30)
    assert handler.texts() == ["one", "two"]
    assert [str(error) for error in raised] == ["a handler's own"] * 2


def test_a_flush_tells_what_is_left_and_does_not_wait_for_a_handler_that_hangs(
    logs: Logs, handler: Handler
) -> None:
    handler.may_go_on.clear()
    with logs.kept():
        logs.info("one")
        logs.info("two")
    logs.flush(0.01)
    assert handler.records == []
    handler.may_go_on.set()
    logs.flush(30)
    assert handler.texts() == ["one", "two"]
    assert not [thread for thread in threading.enumerate() if thread.name == "sharedpool-logs"]


def test_a_handler_that_hangs_does_not_fill_the_memory(logs: Logs, handler: Handler) -> None:
    handler.may_go_on.clear()
    with logs.kept():
        for number in range(5000):
            logs.info("%d", number)
    handler.may_go_on.set()
    logs.flush(30)
    *told, last = handler.texts()
    assert told[0] == "0"
    assert len(told) < 2000
    assert last == f"{5000 - len(told)} log records were dropped: the log handlers are too slow"


def test_a_forked_child_does_not_tell_its_parents_records(logs: Logs, handler: Handler) -> None:
    handler.may_go_on.clear()
    with logs.kept():
        logs.info("the parent's")
        wait_until(lambda: logs._draining.locked(), what="the handler to be at it")
        logs.info("the parent's, too")
        child = os.fork()
        if child == 0:
            handler.may_go_on.set()
            logs.flush(30)
            with logs.kept():
                logs.info("the child's")
            logs.flush(30)
            os._exit(0 if handler.texts() == ["the child's"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    handler.may_go_on.set()
    logs.flush(30)
    assert handler.texts() == ["the parent's", "the parent's, too"]
