"""Distillation as a step of a recipe: what precedes it, what follows it, what is left on disk."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jaxcomp
from jaxcomp import CalibSpec, Descent, Distill, Recipe, TopKLoss, Trainable
from jaxcomp.core.quantize import QTensor, QuantSpec
from jaxcomp.job import dry_run
from jaxcomp.methods import RTN, PruneBlocks
from jaxcomp.models.decoder import iter_blocks
from jaxcomp.recipe import override, recipe_from_json, recipe_to_json
from tests import tiny

FIT = Descent(epochs=3, batch=2, lr=2e-3, validation=2, every=3, dtype="float32")
RECIPE = Recipe(
    steps=(
        PruneBlocks(blocks=(1,)),
        Distill(Trainable("lora", rank=4), TopKLoss("full", "up"), FIT, k=8),
        RTN(QuantSpec(4)),
    ),
    calib=CalibSpec("text.txt", samples=8, length=16, batch=4),
)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A checkpoint beside the text that the recipe names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(" ".join(tiny.SENTENCES * 4))
    return tiny.checkpoint("llama", jax.random.key(0), tmp_path / "model")


def test_a_pruned_model_is_taught_and_then_rounded_by_one_recipe(source, tmp_path):
    report = jaxcomp.compress(source, RECIPE, tmp_path / "out")
    model = jaxcomp.load(tmp_path / "out").model
    assert len(model.blocks) == 1 and not (tmp_path / "out.partial").exists()
    assert all(isinstance(b.attn.q.w, QTensor) for b in iter_blocks(model))
    about = next(row.metrics for row in report.rows if row.step == "Distill" and row.block is None)
    assert about["tokens"] == 3 * 6 * 16 and about["teacher_bytes"] == 8 * 16 * (4 * 8 + 2)
    assert about["held_out_steps"] == [0.0, 3.0, 6.0, 9.0] and len(about["loss_curve"]) == 9
    assert (tmp_path / "out" / "fit.png").stat().st_size > 10_000
    assert "on the whole model" in (tmp_path / "out" / "report.html").read_text()


def test_runs_may_share_the_words_of_their_teacher(source, tmp_path):
    shared = str(tmp_path / "words")
    steps = tuple(override(RECIPE, [f"steps.1.cache={shared}"]).steps[:2])
    recipe = dataclasses.replace(RECIPE, steps=steps)
    jaxcomp.compress(source, recipe, tmp_path / "a", compare=False)
    shard = tmp_path / "words" / "shard.00000.bin"
    before = shard.stat().st_mtime_ns
    jaxcomp.compress(source, override(recipe, ["steps.1.fit.epochs=1"]), tmp_path / "b")
    assert shard.stat().st_mtime_ns == before
    other = override(recipe, ["calib.seed=1"])
    with pytest.raises(ValueError, match="another text"):
        jaxcomp.compress(source, other, tmp_path / "c")


def test_the_recipe_survives_json_and_settings_inside_it_are_reached(tmp_path):
    assert recipe_from_json(json.loads(json.dumps(recipe_to_json(RECIPE)))) == RECIPE
    changed = override(RECIPE, ["steps.1.train.kind=norms", "steps.1.fit.lr=0.5", "steps.1.k=4"])
    assert changed.steps[1].train.kind == "norms" and changed.steps[1].fit.lr == 0.5
    with pytest.raises(ValueError, match="below 2"):
        override(RECIPE, ["steps.1.k=1"])


def test_a_dry_run_times_the_training_and_refuses_what_cannot_be(source):
    steps = {step["step"]: step for step in dry_run(source, RECIPE)}
    assert steps["Distill"]["seconds"] > 0
    assert steps["Distill"]["peak_bytes"] > np.prod((320, 32)) * 4
    swapped = dataclasses.replace(RECIPE, steps=RECIPE.steps[::-1])
    with pytest.raises(ValueError, match="quantized already"):
        dry_run(source, swapped)
    with pytest.raises(ValueError, match="fewer than batch=2"):
        dry_run(source, override(RECIPE, ["steps.1.fit.validation=7"]))
    with pytest.raises(ValueError, match="Distill needs calibration text"):
        dry_run(source, dataclasses.replace(RECIPE, calib=None))
