"""What is built of this tree: a wheel has the program, a source distribution all that its tests
look at."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.documents import DOCUMENTS, ROOT

pytest.importorskip("hatchling")


def build(kind: str, folder: Path) -> Path:
    """Build a "wheel" or "sdist" by the build backend itself: no isolation, no index."""
    program = (
        f"import sys; from hatchling.build import build_{kind} as build; print(build(sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(folder)]
    said = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    return folder / said.split()[-1]


def test_a_wheel_has_the_program_and_no_documents(tmp_path: Path) -> None:
    with zipfile.ZipFile(build("wheel", tmp_path)) as wheel:
        names = {name for name in wheel.namelist() if name.startswith("sharedpool/")}
    ours = {
        path
        for path in (ROOT / "sharedpool").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == {str(path.relative_to(ROOT)) for path in ours if path.suffix != ".md"}


def test_a_source_distribution_has_every_document(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert names >= {*DOCUMENTS, "examples/pictures/overview.svg", "tox.ini"}
