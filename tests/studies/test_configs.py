import pathlib

import pytest

from jaxcomp.studies import load_study, with_settings

FILES = sorted(pathlib.Path(__file__).parents[2].glob("configs/studies/*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_studies_that_come_along_can_be_made_smaller(file):
    study = load_study(file)
    reads = any(recipe.calib for row in study.rows for _, recipe in row.runs())
    settings = ["evals.0.tokens=10", *(["calib.samples=2"] if reads else [])]
    smaller, notes = with_settings(study, settings)
    assert not notes and smaller.evals[0].tokens == 10
    recipes = [recipe for row in smaller.rows for _, recipe in row.runs()]
    assert all(recipe.calib.samples == 2 if reads else not recipe.calib for recipe in recipes)
