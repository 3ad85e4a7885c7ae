"""Where a connection was checked out: the user's line, in a form that fits anywhere."""

import sys
from pathlib import Path
from types import CodeType

from sharedpool.wire.messages import Grant
from sharedpool.wire.values import Phase, Token
from sharedpool.worker.core.broker_messages import BrokerMessages
from sharedpool.worker.core.cache import Cache
from sharedpool.worker.core.callsite import capture, shown_stack
from sharedpool.worker.core.lease import Waiter
from sharedpool.worker.core.reporting import lease_reports


def test_the_innermost_line_comes_first() -> None:
    def inner() -> list[str]:
        return shown_stack(capture())

    here = sys._getframe().f_lineno
    stack = inner()
    # Only the end: what is left of a longer path depends on where this file lies.
    assert stack[0].endswith(f"{Path(__file__).name}:{here - 2} in {inner.__qualname__}")
    assert f":{here + 1} in test_the_innermost_line_comes_first" in stack[1]


def test_layers_between_the_pool_and_its_user_are_left_out() -> None:
    layer: dict[str, object] = {"__name__": "sqlalchemy.pool.base", "capture": capture}
    exec("def between():\n    return capture()", layer)
    between = layer["between"]
    stack = shown_stack(between())  # type: ignore[operator]
    assert "in test_layers_between_the_pool_and_its_user_are_left_out" in stack[0]


def test_a_stack_is_bounded() -> None:
    def deep(n: int) -> list[str]:
        return deep(n - 1) if n else shown_stack(capture())

    assert len(deep(50)) == 12


def code(name: str) -> CodeType:
    return compile("", name, "exec")


def test_an_entry_is_short_printable_utf_8_and_keeps_its_end() -> None:
    stack = tuple(
        (code(name), 7) for name in ("é" * 300, "a\x1b[2J\nb.py", "x\udcff.py", "short.py")
    )
    long, control, lone, short = shown_stack(stack)
    assert long.endswith("é:7 in <module>")
    assert long.startswith("…")
    assert len(long.encode()) <= 100
    assert control == "a?[2J?b.py:7 in <module>"
    assert lone == "x?.py:7 in <module>"
    assert short == "short.py:7 in <module>"


def test_a_worker_with_very_many_leases_tells_of_each_only_the_line() -> None:
    """Its heartbeat must fit into a frame."""
    cache = Cache(60.0)
    messages = BrokerMessages(cache)
    messages.welcomed(1, 1, 0.0)
    stack = ((code("inner.py"), 1), (code("outer.py"), 2))
    for serial in range(1, 202):
        cache.waiters.enqueue(waiter := Waiter(lambda: None, 0.0), 0)
        messages.granted(Grant(waiter.request, Token(1, serial), serial), 0.0)
        assert waiter.lease is not None
        waiter.lease.phase, waiter.lease.stack = Phase.IN_USE, stack
        reported = lease_reports(cache.leases.values(), 0.0, {})
        assert {len(each.stack) for each in reported} == ({2} if serial <= 200 else {1})
