import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp
from jaxcomp.calibrate import Calibration, Run, StepStore
from jaxcomp.calibrate.descent import Descent
from jaxcomp.calibrate.mask_search import MaskSearch
from jaxcomp.calibrate.plan import check_steps, plan
from jaxcomp.calibrate.trainable import Trainable
from jaxcomp.core.quantize import QTensor, QuantSpec
from jaxcomp.export import export
from jaxcomp.methods import GPTQ, RTN, E3Pruner, FlatQuant, LinearPatch
from jaxcomp.methods.e3pruner import CHOICE, Recovery
from jaxcomp.models.decoder import forward, iter_blocks
from jaxcomp.models.depth import drop, load_plan, with_gates
from jaxcomp.recipe import CalibSpec, Recipe, recipe_from_json, recipe_to_json
from tests import tiny

CALIB = Calibration(np.asarray(tiny.tokens(jax.random.key(1), 10, 16)), batch=4)
HUNT = MaskSearch(steps=8, batch=4, lr=0.3, init_windows=4, validation=4, every=4, dtype="float32")
RELEARN = Recovery(
    Trainable("blocks"), fit=Descent(batch=2, lr=1e-3, validation=4, every=2, dtype="float32")
)


@pytest.fixture(scope="module")
def model():
    return tiny.model("qwen3", jax.random.key(0), num_hidden_layers=5)


def test_the_search_alone_leaves_the_weights_and_says_what_it_found(model, tmp_path):
    path = tmp_path / "plan.json"
    step = E3Pruner(2, search=HUNT, recover=None, k=8, save_plan=str(path))
    result = step(model, CALIB)
    gone = tuple(i for i in range(5) if i not in result.model.kept)
    tokens = tiny.tokens(jax.random.key(2))
    np.testing.assert_array_equal(forward(result.model, tokens), forward(drop(model, gone), tokens))
    assert {r.step for r in result.rows} == {CHOICE} and {0, 4} <= set(result.model.kept)
    whole = result.rows[0].metrics
    assert whole["held_out_best"] <= whole["held_out_start"] and len(whole["loss_curve"]) == 8
    counts = whole["removed_curve"]
    assert counts == sorted(counts) and (counts[0], counts[-1], len(counts)) == (1, 2, 8)
    plan = load_plan(path)
    assert plan.removed == gone and plan.metric == "e3" and plan.scores[0] is None
    plan.check(model)
    found = step.found(result.rows)
    assert found.blocks == gone and found(model, CALIB).model.kept == result.model.kept


def test_recovery_brings_what_is_left_nearer_to_the_original(model):
    step = E3Pruner(2, search=HUNT, recover=RELEARN, k=8)
    result = step(model, CALIB)
    (row,) = (r for r in result.rows if r.step == "E3Pruner" and r.block is None)
    assert row.metrics["held_out_after"] < row.metrics["held_out_before"]
    assert len(result.model.blocks) == 3 and model.kept is None
    again = dataclasses.replace(step, remove=None, blocks=step.found(result.rows).blocks)
    for a, b in zip(iter_blocks(again(model, CALIB).model), result.model.blocks, strict=True):
        np.testing.assert_array_equal(a.ffn.down.w, b.ffn.down.w)


def test_a_run_that_was_killed_while_it_recovers_does_not_search_again(model, tmp_path):
    step = E3Pruner(2, search=HUNT, recover=RELEARN, k=8)
    expected, told = step(model, CALIB), []

    def kill(name, done, total, rows):
        told.append((done, total))
        if told.count((2, 3)) == 1 and total == 3:  # three steps of recovery
            raise KeyboardInterrupt

    run = Run(StepStore(tmp_path / "s"), kill)
    with pytest.raises(KeyboardInterrupt):
        step(model, CALIB, run)
    assert (8, 8) in told
    told.clear()
    later = dataclasses.replace(run, progress=lambda name, *at: told.append(at[:2]))
    found = step(model, CALIB, later)
    assert (7, 8) not in told and (8, 8) in told
    assert [r.metrics for r in found.rows] == [r.metrics for r in expected.rows]
    for a, b in zip(iter_blocks(found.model), expected.model.blocks, strict=True):
        np.testing.assert_array_equal(a.attn.q.w, b.attn.q.w)


@pytest.mark.parametrize("init", ["kl", "bi", "sleb", "zeros"])
def test_a_dry_run_knows_the_depth_and_takes_its_time(init, model):
    steps = (E3Pruner(2, search=dataclasses.replace(HUNT, init=init), recover=RELEARN, k=8),)
    assert len(check_steps(model, (*steps, GPTQ()), CALIB).blocks) == 3
    if init == "kl":
        (step,) = plan(model, steps, CALIB)
        assert step.seconds > 0 and step.peak_bytes > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(), "give one of the two"),
        (dict(remove=1, blocks=(1,)), "give one of the two"),
        (dict(remove=1, k=1), "k=1 is below 2"),
        (dict(remove=1, protect=(-1, 1)), "protect="),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        E3Pruner(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(remove=0), "remove=0, and 3 blocks may go"),
        (dict(remove=3), "remove=3, and 3 blocks may go: a search needs from 1 to 2"),
        (dict(remove=2, protect=(2, 2)), "remove=2, and 1 blocks may go"),
        (dict(blocks=(7,)), "no block 7"),
        (dict(remove=1, k=400), "k=400 exceeds the vocabulary of 320"),
        (dict(remove=1, recover=Recovery(Trainable(blocks=(4,)))), "no block 4 to train among 4"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_begins(settings, message, model):
    with pytest.raises(ValueError, match=message):
        check_steps(model, (E3Pruner(**settings),), CALIB)


def test_models_whose_blocks_are_quantized_or_behind_gates_are_refused(model):
    step = E3Pruner(1, search=HUNT, recover=None)
    with pytest.raises(ValueError, match="quantized to 8 bits"):
        step.check(RTN(QuantSpec(8))(model).model)
    with pytest.raises(ValueError, match="block 0 carries a gate"):
        step.check(with_gates(model, jnp.ones(5)))
    with pytest.raises(ValueError, match=r"3 windows of text, and a search .* needs 8"):
        step(model, dataclasses.replace(CALIB, tokens=CALIB.tokens[:3]))
    with pytest.raises(ValueError, match="needs calibration text"):
        step(model)


def test_a_cache_of_another_text_is_refused(model, tmp_path):
    step = E3Pruner(1, search=HUNT, recover=None, cache=str(tmp_path / "words"))
    step(model, CALIB)
    with pytest.raises(ValueError, match="another text"):
        step(model, dataclasses.replace(CALIB, tokens=CALIB.tokens[::-1].copy()))


def test_a_recipe_searches_recovers_then_quantizes_and_leaves_the_choice_as_a_recipe(tmp_path):
    source = tiny.checkpoint("qwen2", jax.random.key(0), tmp_path / "hf", num_hidden_layers=4)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(tiny.SENTENCES * 60))
    hunt = dataclasses.replace(HUNT, batch=2, validation=2)
    recipe = Recipe(
        (E3Pruner(1, search=hunt, recover=RELEARN, k=8), GPTQ(QuantSpec(8))),
        CalibSpec(str(text), samples=8, length=16, batch=2),
    )
    assert recipe_from_json(recipe_to_json(recipe)) == recipe
    report = jaxcomp.compress(source, recipe, tmp_path / "out")
    model = jaxcomp.load(tmp_path / "out").model
    assert len(model.blocks) == 3 == len(model.kept)
    assert {row.step for row in report.rows} == {CHOICE, "E3Pruner", "GPTQ"}
    found = jaxcomp.recipe.load_recipe(tmp_path / "out" / "found_recipe.json")
    assert found.steps[0].blocks == tuple(i for i in range(4) if i not in model.kept)
    assert "E3Pruner" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_searched_patched_and_flattened_in_one_recipe(tmp_path):
    """Three systems, one after another: what is exported says where the patch has no place."""
    source = tiny.checkpoint("qwen3", jax.random.key(0), tmp_path / "hf", num_hidden_layers=5)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(tiny.SENTENCES * 60))
    calib = CalibSpec(str(text), samples=10, length=16, batch=2)
    search = E3Pruner(2, search=dataclasses.replace(HUNT, batch=2), recover=RELEARN, k=8)
    patch, flat = LinearPatch("lstsq"), FlatQuant(QuantSpec(8), epochs=1, act=None)
    models = []
    for steps in ((search, patch), (search, patch, flat)):
        out = tmp_path / str(len(steps))
        jaxcomp.compress(source, Recipe(steps, calib), out)
        models.append(jaxcomp.load(out).model)
    before, after = models
    assert before.kept == after.kept and len(after.kept) == 3
    patched = [b.patch is not None for b in iter_blocks(after)]
    assert any(patched) and patched == [b.patch is not None for b in iter_blocks(before)]
    assert all(isinstance(b.ffn.down.w, QTensor) for b in iter_blocks(after))
    a, b = (forward(m, tiny.tokens(jax.random.key(2))) for m in models)
    assert 0 < float(jnp.mean((a - b) ** 2) / jnp.mean(a**2)) < 0.01
    with pytest.raises(ValueError, match="maps its input by a patch"):
        export(tmp_path / "3", "hf", tmp_path / "export")
