"""Find a Python for the automatic broker: this process's own, in its virtual environment.

`sys.executable` is not always one. Under uWSGI and mod_wsgi it is the server's program or empty. In
a frozen application it is the application, which would start a second time. So only programs called
python are tried, and they must show that they have this version of sharedpool (`GREETING`) before
they are sent anything.
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

ADVICE = (
    "start `sharedpool broker` yourself, and give its address to config_pool(broker=) or"
    " SHAREDPOOL_BROKER"
)
# Also python3.13t and python3.11d.
_PYTHON = re.compile(r"(python|pypy)(\d+(\.\d+)?)?[a-z]?(\.exe)?", re.IGNORECASE)
# Packages that the broker needs; each may be installed in another folder than sharedpool.
_NEEDED = ("zmq", "psycopg2", "msgspec", "multiprocess", "dill")


def greeting() -> str:
    """Return the first line that `python -m sharedpool.broker` prints."""
    return GREETING + str(sys.modules["sharedpool"].__version__)  # imported before this module


def frozen() -> bool:
    """Return True if this program contains Python (PyInstaller, cx_Freeze, Nuitka, PyOxidizer)."""
    compiled = globals().get("__compiled__")  # set by Nuitka, which can leave Python outside, too
    if compiled is not None and getattr(compiled, "standalone", True):
        return True
    return bool(getattr(sys, "frozen", False) or getattr(sys, "oxidized", False))


def candidates() -> list[str]:
    """Return the programs that may be this process's Python, the likeliest first.

    A frozen application has none.
    """
    if frozen():
        return []
    found: dict[tuple[str, str], str] = {}  # python3 and python of one folder are one
    for path in filter(_is_python, _places()):
        found.setdefault((os.path.dirname(path), os.path.realpath(path)), path)
    return list(found.values())


def environment() -> dict[str, str]:
    """Return an environment in which a candidate imports the same packages as this process."""
    own, *needed = (_parent(name) for name in ("sharedpool", *_NEEDED))
    paths = [own, *os.environ.get("PYTHONPATH", "").split(os.pathsep), *needed]
    return dict(os.environ, PYTHONPATH=os.pathsep.join(dict.fromkeys(filter(None, paths))))


def none_found(tried: list[str]) -> str:
    """Return the error if no broker can be started; `tried` has a text for each candidate."""
    if frozen():
        text = f"this is a frozen application ({sys.executable}), which has no Python to run one"
        return f"{text}: {ADVICE}"
    shown = (
        "; ".join(tried) or f"sys.executable is {sys.executable!r} and sys.prefix {sys.prefix!r}"
    )
    return f"no Python was found that has this sharedpool ({shown}): {ADVICE}"


def _places() -> Iterator[str]:
    """Yield the paths where this process's Python may be, a virtual environment's own first."""
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
    """Return True if a program is called python, or is a link to one. It is not run to find out."""
    if not os.path.isabs(path) or not os.access(path, os.X_OK) or not os.path.isfile(path):
        return False
    return any(_PYTHON.fullmatch(os.path.basename(each)) for each in (path, os.path.realpath(path)))


def _parent(name: str) -> str:
    """Return the folder from which a package is imported; empty if it is not installed."""
    found = find_spec(name)
    if found is None or not found.origin:
        return ""
    return str(Path(found.origin).absolute().parents[1])
