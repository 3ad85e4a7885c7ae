"""Plant known bugs one by one, and see that the tests catch each: `python tests/mutations/gate.py
[NAME ...]`.

Each bug is a small edit of a copy of this tree; the tests named beside it must fail there (and pass
here). Prints a table; the exit status is 0 only if every bug is caught. `--list` names them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Run as a script, this is in no package: the repository has it.
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from tests.mutations.broker_bugs import BROKER_BUGS  # noqa: E402
from tests.mutations.handover_bugs import HANDOVER_BUGS  # noqa: E402
from tests.mutations.mutant import Mutant  # noqa: E402
from tests.mutations.sharing_bugs import SHARING_BUGS  # noqa: E402
from tests.mutations.worker_bugs import WORKER_BUGS  # noqa: E402

LIMIT_S = 600
MUTANTS = (*BROKER_BUGS, *WORKER_BUGS, *HANDOVER_BUGS, *SHARING_BUGS)


def plant(mutant: Mutant, tree: Path) -> None:
    """Edit the copy; raise when the code has moved on and the edit fits no more."""
    for name, old, new in mutant.edits:
        path = tree / name
        text = path.read_text()
        if text.count(old) != 1:
            raise SystemExit(
                f"{mutant.name}: {name} has {text.count(old)} places like {old!r}, not one"
            )
        path.write_text(text.replace(old, new))


def verdict(mutant: Mutant) -> tuple[bool, str]:
    """Run the tests on a tree with the bug; say whether they caught it, and how."""
    with tempfile.TemporaryDirectory(prefix="sharedpool-mutant-") as folder:
        tree = Path(folder, "tree")
        ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "dist", "build")
        shutil.copytree(ROOT, tree, ignore=ignored)
        plant(mutant, tree)
        environment = dict(
            os.environ,
            PYTHONPATH=str(tree),
            PYTHONDONTWRITEBYTECODE="1",
            SHAREDPOOL_MODEL_EXAMPLES="56",
        )
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            "-m",
            "long or not long",
            *mutant.tests,
        ]
        try:
            outcome = subprocess.run(
                command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT_S
            )
        except subprocess.TimeoutExpired:
            return False, f"the tests did not end within {LIMIT_S} s"
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", outcome.stdout, re.MULTILINE)
        return outcome.returncode == 1 and bool(failed), failed[0] if failed else outcome.stdout[
            -200:
        ].strip()


def main() -> int:
    """Run all mutants, or those whose names contain an argument."""
    if "--list" in sys.argv:
        print("\n".join(mutant.name for mutant in MUTANTS))
        return 0
    chosen = [
        m for m in MUTANTS if len(sys.argv) < 2 or any(word in m.name for word in sys.argv[1:])
    ]
    missed = 0
    for mutant in chosen:
        started = time.monotonic()
        caught, how = verdict(mutant)
        missed += not caught
        print(
            f"{'caught' if caught else 'MISSED'}  {mutant.name}  ({how}, "
            f"{time.monotonic() - started:.0f} s)",
            flush=True,
        )
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
