"""What agents that trace statements put around `psycopg2.connect` and its connections."""

import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from psycopg2 import extensions

from tests.support.sql import ask

_trace: contextvars.ContextVar[list[tuple[Any, ...]] | None] = contextvars.ContextVar(
    "trace", default=None
)
own_connect = psycopg2.connect


def note(*event: Any) -> None:
    if (trace := _trace.get()) is not None:
        trace.append(event)


class Around:
    """An object around another: reading an attribute of it reads the other's."""

    def __init__(self, inner: Any) -> None:
        object.__setattr__(self, "inner", inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "inner"), name)


class AroundCursor(Around):
    def execute(self, query: Any, *values: Any) -> Any:
        note("execute", query if isinstance(query, str) else "composed")
        return self.inner.execute(query, *values)

    def __enter__(self) -> "AroundCursor":
        self.inner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.inner)


class AroundConnection(Around):
    def cursor(self, *args: Any, **kwargs: Any) -> AroundCursor:
        return AroundCursor(self.inner.cursor(*args, **kwargs))

    def commit(self) -> None:
        note("commit")
        self.inner.commit()

    def rollback(self) -> None:
        note("rollback")
        self.inner.rollback()

    def __enter__(self) -> "AroundConnection":
        self.inner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)


class Transparent(AroundConnection):
    """One that takes attributes on for the connection too, and says that it is one: as wrapt's
    proxies do."""

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.inner, name)

    @property
    def __class__(self) -> Any:
        return type(self.inner)

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError


class NotedCursor(extensions.cursor):
    def execute(self, query: Any, values: Any = None) -> None:
        note("execute", query if isinstance(query, str) else "composed")
        super().execute(query, values)


def by_object(kind: type[Around]) -> Callable[..., Any]:
    def connect(*args: Any, **kwargs: Any) -> Any:
        note("connect", kwargs.get("host"))
        return kind(own_connect(*args, **kwargs))

    return connect


def by_cursor(*args: Any, **kwargs: Any) -> Any:
    note("connect", kwargs.get("host"))
    return own_connect(*args, **{**kwargs, "cursor_factory": NotedCursor})


WRAPPERS = {
    "object": by_object(AroundConnection),
    "transparent object": by_object(Transparent),
    "cursor": by_cursor,
}


@pytest.fixture(params=WRAPPERS)
def wrapped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(psycopg2, "connect", WRAPPERS[request.param])
    return str(request.param)


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psycopg2, "connect", WRAPPERS["object"])


def traced(run: Callable[[], object]) -> list[tuple[Any, ...]]:
    """Return what is noted while `run` runs."""
    events: list[tuple[Any, ...]] = []

    def inside() -> None:
        _trace.set(events)
        run()

    contextvars.copy_context().run(inside)
    return events


def kind(conn: object) -> type:
    return type(conn)


def use(pool: Any, times: int = 3) -> None:
    for number in range(times):
        conn = pool.getconn()
        ask(conn)
        if number == 0:
            conn.commit()
        elif number == 1:
            conn.rollback()
            ask(conn)
        pool.putconn(conn)  # rolls back what is open
