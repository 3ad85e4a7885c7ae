"""Run the `sharedpool` command as its users do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from tests.support.processes import Piped, run_python

COMMAND = [sys.executable, "-m", "sharedpool"]


def sharedpool_command(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False, **more
    )


def start(*arguments: str, **more: Any) -> Piped:
    return Piped(*COMMAND, *arguments, **{"stdin": None, "stderr": subprocess.PIPE, **more})


def wait_for(process: subprocess.Popen[str], text: str) -> str:
    assert process.stderr is not None
    while text not in (line := process.stderr.readline()):
        assert line, f"it ended without saying {text!r}"
    return line


def address_of(process: subprocess.Popen[str]) -> str:
    """Wait until a broker says where its workers find it."""
    return wait_for(process, "export SHAREDPOOL_BROKER=").split("=", 1)[1].strip()


_ONE_AFTER_THE_OTHER = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from sharedpool.cli import main

def outcome(command):
    with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
        try:
            main(command, prog_name="sharedpool")
        except SystemExit as end:
            return end.code, stdout.getvalue(), stderr.getvalue()

print(json.dumps(list(map(outcome, json.loads(sys.argv[1])))))
"""


def outcomes(*commands: list[str]) -> Iterator[tuple[str, int, str, str]]:
    """Run commands in one process, whose start costs most; yield each one's words, status, stdout
    and stderr."""
    done = run_python(_ONE_AFTER_THE_OTHER, json.dumps(commands))
    assert done.returncode == 0, done.stderr  # what is no exit would show users a traceback
    for command, (status, stdout, stderr) in zip(commands, json.loads(done.stdout), strict=True):
        yield " ".join(command), status, stdout, stderr


def who(address: str, *arguments: str) -> list[dict[str, Any]]:
    done = sharedpool_command("who", "--json", "--broker", address, *arguments)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found
