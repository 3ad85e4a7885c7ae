"""`python tests/bench`."""

import sys
from pathlib import Path

# Run as a folder, this is no package: the repository has it.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.bench.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
