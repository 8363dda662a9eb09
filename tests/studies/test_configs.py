import pathlib

import pytest

from jaxcomp.studies import load_study, with_settings

FILES = sorted(pathlib.Path(__file__).parents[2].glob("configs/studies/*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_studies_that_come_along_can_be_made_smaller(file):
    study = load_study(file)
    smaller, notes = with_settings(study, ["calib.samples=2", "evals.0.tokens=10"])
    assert not notes and smaller.evals[0].tokens == 10
    assert all(recipe.calib.samples == 2 for row in smaller.rows for _, recipe in row.runs())
