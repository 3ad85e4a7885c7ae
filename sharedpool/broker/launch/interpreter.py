"""Find a Python for the automatic broker: this process's own, in its virtual environment.

`sys.executable` is not always one: under uWSGI and mod_wsgi it is the server's program or empty, in a frozen
application the application itself, which would start a second time. So only what is called python is tried, and it must
show that it has sharedpool in this version (`GREETING`) before it is told anything.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

GREETING = "sharedpool.broker "  # followed by the version

ADVICE = "start `sharedpool broker` yourself, and give its address to config_pool(broker=) or SHAREDPOOL_BROKER"
_PYTHON = re.compile(
    r"(python|pypy)(\d+(\.\d+)?)?[a-z]?(\.exe)?", re.IGNORECASE
)  # python3.13t, python3.11d
# What the broker needs beside the standard library and sharedpool; each may lie somewhere else.
_NEEDED = ("zmq", "psycopg2", "msgspec", "multiprocess", "dill")


def greeting() -> str:
    """Return the first line that `python -m sharedpool.broker` prints."""
    return GREETING + str(sys.modules["sharedpool"].__version__)  # it imports us


def frozen() -> bool:
    """Say whether this program has Python inside and is none (PyInstaller, cx_Freeze, Nuitka, PyOxidizer)."""
    compiled = globals().get("__compiled__")  # Nuitka's; it can leave Python outside, too
    if compiled is not None and getattr(compiled, "standalone", True):
        return True
    return bool(getattr(sys, "frozen", False) or getattr(sys, "oxidized", False))


def candidates() -> list[str]:
    """Return the programs that may be this process's Python, the likeliest first; of a frozen application none."""
    if frozen():
        return []
    found: dict[tuple[str, str], str] = {}  # python3 and python of one folder are the same
    for path in filter(_is_python, _places()):
        found.setdefault((os.path.dirname(path), os.path.realpath(path)), path)
    return list(found.values())


def environment() -> dict[str, str]:
    """Return the environment in which a candidate finds what this process has imported sharedpool with."""
    own, *needed = (_parent(name) for name in ("sharedpool", *_NEEDED))
    paths = [own, *os.environ.get("PYTHONPATH", "").split(os.pathsep), *needed]
    return dict(os.environ, PYTHONPATH=os.pathsep.join(dict.fromkeys(filter(None, paths))))


def none_found(tried: list[str]) -> str:
    """Return what to do where no broker can be started; `tried` are the candidates with what became of them."""
    if frozen():
        return f"this is a frozen application ({sys.executable}), which has no Python to run one: {ADVICE}"
    shown = (
        "; ".join(tried) or f"sys.executable is {sys.executable!r} and sys.prefix {sys.prefix!r}"
    )
    return f"no Python was found that has this sharedpool ({shown}): {ADVICE}"


def _places() -> Iterator[str]:
    """Yield where this process's Python may be. A virtual environment's own goes first, wherever it is linked to."""
    names = [
        f"python{sys.version_info.major}.{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    ]
    names += [
        f"python{sys.version_info.major}.{sys.version_info.minor}",
        f"python{sys.version_info.major}",
        "python",
    ]
    executable = sys.executable or ""
    folders = [os.path.join(sys.prefix, "bin"), os.path.join(sys.exec_prefix, "bin")]
    if sys.prefix == sys.base_prefix or os.path.dirname(executable) in folders:
        yield executable
    yield from (os.path.join(folder, name) for folder in folders for name in names)
    yield executable
    yield getattr(sys, "_base_executable", None) or ""
    more = [sysconfig.get_config_var("BINDIR") or "", os.path.join(sys.base_exec_prefix, "bin")]
    yield from (os.path.join(folder, name) for folder in more for name in names)


def _is_python(path: str) -> bool:
    """Say whether a program is called python, itself or what it is a link to. It is not run to find out."""
    if not os.path.isabs(path) or not os.access(path, os.X_OK) or not os.path.isfile(path):
        return False
    return any(_PYTHON.fullmatch(os.path.basename(each)) for each in (path, os.path.realpath(path)))


def _parent(name: str) -> str:
    """Return the folder from which a package is imported; nothing where there is none."""
    found = find_spec(name)
    if found is None or not found.origin:
        return ""
    return str(Path(found.origin).absolute().parents[1])
