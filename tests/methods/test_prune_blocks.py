import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp
from jaxcomp.calibrate import Calibration, Run, StepStore
from jaxcomp.calibrate.plan import check_steps, plan
from jaxcomp.export import export
from jaxcomp.methods import GPTQ, FlatQuant, PruneBlocks
from jaxcomp.models.decoder import forward
from jaxcomp.models.depth import drop, load_plan
from jaxcomp.recipe import CalibSpec, Recipe
from tests import tiny

CALIB = Calibration(np.asarray(tiny.tokens(jax.random.key(1), 6, 12)), batch=4)


@pytest.fixture(scope="module")
def model():
    return tiny.model("qwen3", jax.random.key(0), num_hidden_layers=5)


def test_what_is_left_computes_as_if_the_rest_had_never_been(model):
    result = PruneBlocks(blocks=(2, 1))(model)
    tokens = tiny.tokens(jax.random.key(2))
    np.testing.assert_array_equal(
        forward(result.model, tokens), forward(drop(model, (1, 2)), tokens)
    )
    assert result.model.kept == (0, 3, 4) and result.model.config == model.config


def test_rows_say_which_block_goes_with_every_score_and_the_choice_as_a_setting(model):
    step = PruneBlocks(2, "bi")
    result = step(model, CALIB)
    removed = [r.block for r in result.rows if r.metrics.get("removed") == 1]
    assert len(removed) == 2 and tuple(removed) == step.found(result.rows).blocks
    assert all(r.metrics["score"] > 0 for r in result.rows if r.block is not None)
    whole = result.rows[-1]
    assert whole.block is None and whole.metrics["metric"] == "bi" and "margin" in whole.metrics
    again = step.found(result.rows)(model)
    assert again.model.kept == result.model.kept


def test_a_warning_is_in_the_rows(model):
    rows = PruneBlocks(1, "deepest", protect=(0, 0))(model, None).rows
    assert "the last block is removed" in rows[-1].metrics["warning 1"]


def test_a_plan_goes_out_is_edited_and_comes_back(model, tmp_path):
    path = tmp_path / "plan.json"
    first = PruneBlocks(2, "ppl", save_plan=str(path))(model, CALIB)
    assert load_plan(path).removed == tuple(sorted({*range(5)} - {*first.model.kept}))
    followed = PruneBlocks(plan=str(path))
    assert followed(model).model.kept == first.model.kept and not followed.needs_text
    data = json.loads(path.read_text()) | {"removed": [3]}
    path.write_text(json.dumps(data))
    assert followed(model).model.kept == (0, 1, 2, 4) and followed.files == (str(path),)


def test_a_plan_of_another_model_is_refused_at_the_door_or_when_its_weights_are_read(
    model, tmp_path
):
    path = tmp_path / "plan.json"
    PruneBlocks(1, "bi", save_plan=str(path))(model, CALIB)
    step = PruneBlocks(plan=str(path))
    with pytest.raises(ValueError, match="for a model of 5 blocks, this one has 4"):
        step.check(drop(model, (1,)))
    other = tiny.model("qwen3", jax.random.key(5), num_hidden_layers=5)
    step.check(other)
    with pytest.raises(ValueError, match="made for another model"):
        step(other)
    with pytest.raises(ValueError, match="there is no plan"):
        PruneBlocks(plan=str(tmp_path / "none.json")).check(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(), "give one of the three"),
        (dict(remove=1, blocks=(1,)), "give one of the three"),
        (dict(remove=1, metric="x"), "metric='x' is none of"),
        (dict(remove=1, protect=(-1, 1)), "protect="),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PruneBlocks(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(remove=0), "remove=0 is below 1"),
        (dict(remove=4), "of the 5 blocks 3 may go"),
        (dict(blocks=(5,)), "no block 5; the model has blocks 0..4"),
        (dict(blocks=(1, 1)), "named twice"),
        (dict(blocks=(0, 1, 2, 3, 4)), "all 5 blocks"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_begins(settings, message, model):
    with pytest.raises(ValueError, match=message):
        check_steps(model, (PruneBlocks(**settings), GPTQ()), CALIB)


@pytest.mark.parametrize("metric", ["bi", "angular", "ppl", "sleb", "taylor", "magnitude"])
def test_a_dry_run_knows_the_depth_and_takes_its_time(metric, model):
    steps = (PruneBlocks(2, metric), FlatQuant(epochs=1))
    assert len(check_steps(model, steps, CALIB).blocks) == 3
    (step,) = plan(model, steps[:1], CALIB)
    assert (step.seconds > 0) == (metric != "magnitude")


def test_a_run_that_was_killed_after_the_choice_gives_the_same_rows(model, tmp_path):
    run, told = Run(StepStore(tmp_path / "s")), []
    first = PruneBlocks(2, "sleb")(model, CALIB, run)
    later = dataclasses.replace(run, progress=lambda *args: told.append(args))
    again = PruneBlocks(2, "sleb")(model, CALIB, later)
    assert again.rows == first.rows and again.model.kept == first.model.kept and not told


@pytest.mark.parametrize(
    ("family", "format"),
    [("gemma3_text", "hf"), ("llama", "hf"), ("qwen2", "compressed-tensors")],
)
def test_a_pruned_model_is_exported_and_computes_the_same_elsewhere(family, format, tmp_path):
    """Four blocks, of which every other has a window in gemma3_text, become two."""
    import torch
    import transformers

    source = tiny.checkpoint(family, jax.random.key(0), tmp_path / "hf", num_hidden_layers=4)
    recipe = Recipe((PruneBlocks(blocks=(1, 2)),))
    if format == "compressed-tensors":
        recipe = Recipe((*recipe.steps, jaxcomp.METHODS["RTN"](jaxcomp.QuantSpec(8))))
    jaxcomp.compress(source, recipe, tmp_path / "out")
    export(tmp_path / "out", format, tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    if family == "gemma3_text":  # the blocks that are left keep their own kind
        assert config["layer_types"] == ["sliding_attention", "full_attention"]
    tokens = tiny.tokens(jax.random.key(2))
    expected = forward(jaxcomp.load(tmp_path / "out").model, tokens)
    there = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", dtype=torch.float32
    )
    with torch.no_grad():
        found = there(torch.asarray(np.asarray(tokens, np.int64))).logits.float().numpy()
    np.testing.assert_allclose(found, expected, atol=2e-2 if format != "hf" else 1e-3)
    assert jnp.isfinite(expected).all()


def test_a_recipe_prunes_then_quantizes_and_leaves_the_choice_as_a_recipe(tmp_path):
    source = tiny.checkpoint("qwen2", jax.random.key(0), tmp_path / "hf", num_hidden_layers=4)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(tiny.SENTENCES * 40))
    recipe = Recipe(
        (PruneBlocks(2, "bi"), GPTQ(jaxcomp.QuantSpec(8))),
        CalibSpec(str(text), samples=4, length=16, batch=2),
    )
    report = jaxcomp.compress(source, recipe, tmp_path / "out")
    model = jaxcomp.load(tmp_path / "out").model
    assert len(model.blocks) == 2 and len(model.kept) == 2
    assert {row.step for row in report.rows} == {"PruneBlocks", "GPTQ"}
    assert len(report.comparison["depth"]["median"]) == 3  # of the embedding, and of each block
    found = jaxcomp.recipe.load_recipe(tmp_path / "out" / "found_recipe.json")
    assert found.steps[0].blocks == tuple(i for i in range(4) if i not in model.kept)
    assert "PruneBlocks" in (tmp_path / "out" / "report.html").read_text()
