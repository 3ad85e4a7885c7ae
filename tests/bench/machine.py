"""Where the figures come from."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import psycopg2.extensions
import zmq

import sharedpool
from tests.bench import pgbouncer, stunnel
from tests.bench.server import BenchServer

_ROOT = Path(sharedpool.__file__).resolve().parents[1]
_PEERS = ("psycopg2-binary", "psycopg", "psycopg-pool", "sqlalchemy", "dbutils")


def describe(server: BenchServer) -> dict[str, str]:
    """Return what the figures depend on, by name."""
    load = os.getloadavg()[0]
    return {
        "commit": _commit(),
        "CPUs": f"{os.cpu_count()} ({_cpu()})",
        "load at the start": f"{load:.2f}",
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "PostgreSQL": server.version,
        "PgBouncer": pgbouncer.version(),
        "stunnel": stunnel.version(),
        "libpq": _dotted(psycopg2.extensions.libpq_version()),
        "libzmq": zmq.zmq_version(),
        **{name: _version(name) for name in _PEERS},
    }


def _commit() -> str:
    """Return the commit of the sharedpool that is measured, and whether there is more than that."""
    try:
        git = ["git", "-C", str(_ROOT)]
        commit = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + " and changes" * bool(changed.stdout.strip())


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _dotted(version: int) -> str:
    return f"{version // 10000}.{version % 10000}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
