"""Every bug of the mutation gate can still be planted, and its tests exist; the gate itself takes
minutes."""

import re
from pathlib import Path

import pytest

from tests.mutations.gate import MUTANTS, ROOT, plant
from tests.mutations.mutant import Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_still_fits_the_code(mutant: Mutant, tmp_path: Path) -> None:
    for name, _, _ in mutant.edits:
        copy = tmp_path / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text((ROOT / name).read_text())
    plant(mutant, tmp_path)
    assert all(
        (tmp_path / name).read_text() != (ROOT / name).read_text() for name, _, _ in mutant.edits
    )


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_tests_named_beside_a_bug_exist(mutant: Mutant) -> None:
    paths = [ROOT / each for each in mutant.tests if each.startswith("tests/")]
    files = [
        file for path in paths for file in (path.glob("test_*.py") if path.is_dir() else [path])
    ]
    assert files
    if "-k" in mutant.tests:
        text = "".join(file.read_text() for file in files)
        words = re.findall(r"\w+", mutant.tests[mutant.tests.index("-k") + 1])
        missing = [word for word in words if word not in ("and", "or", "not") and word not in text]
        assert missing == []
