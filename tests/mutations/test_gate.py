"""The mutation gate takes minutes (`tox -e mutations`); that its bugs can still be planted is seen here, in any run."""

from pathlib import Path

import pytest

from tests.mutations.gate import MUTANTS, ROOT, Mutant, plant


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
