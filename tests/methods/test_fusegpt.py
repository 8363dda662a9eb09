import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp
from jaxcomp.calibrate import Calibration, Run, StepStore
from jaxcomp.calibrate.plan import check_steps, plan
from jaxcomp.calibrate.removal import influences
from jaxcomp.core.tree import replace_many
from jaxcomp.methods import GPTQ, RTN, FlatQuant, FuseGPT, LinearPatch
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import block_forward, iter_blocks
from jaxcomp.models.depth import drop
from jaxcomp.models.layers import embed_tokens
from jaxcomp.recipe import CalibSpec, Recipe
from tests import tiny

CALIB = Calibration(np.asarray(tiny.tokens(jax.random.key(1), 8, 12)), batch=4)
Q8 = jaxcomp.QuantSpec(8, granularity="token", dynamic=True)
SMALL = dict(rank=4, lora_rank=4, batch=4, epochs=2, group_size=4)


@pytest.fixture(scope="module")
def model():
    return tiny.model("qwen3", jax.random.key(0), num_hidden_layers=5)


def final_states(model, tokens):
    x = embed_tokens(model.embed, jnp.asarray(tokens), "float32")
    for block in iter_blocks(model):
        x = block_forward(block, x, plain_context(*tokens.shape))
    return x


def block_rows(result):
    return {r.block: r.metrics for r in result.rows if r.block is not None}


def test_influence_with_shared_prefixes_is_that_of_running_every_model_alone(model):
    twice = model.replace(blocks=(*model.blocks[:2], *model.blocks[1:]))  # block 1 stands twice
    found = influences(twice, CALIB, range(6))
    full = final_states(twice, CALIB.tokens)
    for i, influence in found.items():
        without = final_states(drop(twice, (i,)), CALIB.tokens)
        dot = jnp.sum(full * without, -1)
        cos = dot / jnp.linalg.norm(full, axis=-1) / jnp.linalg.norm(without, axis=-1)
        np.testing.assert_allclose(influence, 1 - jnp.mean(cos), atol=1e-5)
    np.testing.assert_allclose(found[1], found[2], atol=1e-6)


def test_a_block_that_does_nothing_goes_first_and_nothing_is_left_to_learn(model):
    idle = {n: jnp.zeros_like(model.blocks[3].attn.o.w) for n in ("attn.o.w",)}
    idle |= {"ffn.down.w": jnp.zeros_like(model.blocks[3].ffn.down.w)}
    blocks = (*model.blocks[:3], replace_many(model.blocks[3], idle), *model.blocks[4:])
    result = FuseGPT(2, **SMALL)(model.replace(blocks=blocks), CALIB)
    rows = block_rows(result)
    first = next(i for i in rows if rows[i].get("round") == 1)
    assert first == 3 and abs(rows[3]["influence"][0]) < 1e-12
    assert rows[3]["loss_curve"][0] < 1e-10 and rows[3]["mse_before"] < 1e-10


def test_rows_tell_of_every_round(model):
    result = FuseGPT(2, **SMALL)(model, CALIB)
    rows = block_rows(result)
    gone = sorted((m["round"], i) for i, m in rows.items() if m["removed"])
    assert [r for r, _ in gone] == [1, 2]
    (_, first), (_, second) = gone
    assert {i: len(m["influence"]) for i, m in rows.items()} == {
        i: 1 if i == first else 2 for i in range(5)
    }
    assert rows[first]["influence"] == [min(m["influence"][0] for m in rows.values())]
    group = [int(i) for i in rows[second]["group"].split(", ")]
    assert len(group) == 3 and not {first, second} & {*group}
    assert len(rows[first]["loss_curve"]) == 4
    whole = result.rows[-1]
    assert whole.metrics["removed_blocks"] == f"{first}, {second}"
    assert result.model.kept == tuple(i for i in range(5) if i not in (first, second))


def test_blocks_outside_the_group_are_the_very_blocks_and_ends_stay(model):
    result = FuseGPT(blocks=(3,), **SMALL | dict(group_size=2))(model, CALIB)
    same = [a is b for a, b in zip(result.model.blocks, drop(model, (3,)).blocks, strict=True)]
    assert same == [True, True, False, True]
    assert result.model.embed is model.embed and result.model.norm is model.norm


def test_the_second_round_measures_what_the_first_has_made(model):
    step = FuseGPT(2, **SMALL | dict(lr=0.05))
    rows = block_rows(step(model, CALIB))
    first = next(i for i in rows if rows[i].get("round") == 1)
    fused = dataclasses.replace(step, remove=None, blocks=(first,))(model, CALIB).model
    found = [rows[i]["influence"][1] for i in rows if i != first]
    expected = influences(fused, CALIB, range(4))
    np.testing.assert_allclose(found, list(expected.values()), rtol=1e-4)
    unfused = influences(drop(model, (first,)), CALIB, range(4))
    assert not np.allclose(found, list(unfused.values()), rtol=1e-2)


def test_protected_blocks_stay(model):
    result = FuseGPT(1, protect=(2, 2), **SMALL)(model, CALIB)
    assert block_rows(result)[2]["removed"] == 1 and "influence" not in block_rows(result)[0]


def test_a_fit_brings_the_group_nearer_and_the_found_step_does_the_same_again(model):
    settings = SMALL | dict(epochs=12, lr=1e-2, lora_lr=1e-2)
    step = FuseGPT(2, **settings)
    result = step(model, CALIB)
    for m in block_rows(result).values():
        assert not m["removed"] or m["mse_after"] < 0.9 * m["mse_before"]
    again = step.found(result.rows)
    assert again.remove is None and len(again.blocks) == 2
    chex.assert_trees_all_equal(again(model, CALIB).model, result.model)


@pytest.mark.parametrize("loss", ["cosine", "batch_kl"])
def test_other_losses_fall_too(loss, model):
    settings = SMALL | dict(loss=loss, epochs=12, lr=1e-2, lora_lr=1e-2)
    result = FuseGPT(blocks=(2,), **settings)(model, CALIB)
    curve = block_rows(result)[2]["loss_curve"]
    assert curve[-1] < 0.9 * curve[0]


def test_the_original_as_target_differs_only_once_blocks_are_gone(model):
    current, original = (
        block_rows(FuseGPT(blocks=(2, 1), targets=t, **SMALL)(model, CALIB))
        for t in ("current", "original")
    )
    np.testing.assert_allclose(current[2]["mse_before"], original[2]["mse_before"], rtol=1e-3)
    assert original[1]["mse_before"] > 1.05 * current[1]["mse_before"]


def test_a_run_killed_in_a_later_round_goes_on_there_with_the_same_result(model, tmp_path):
    class Killed(Exception):
        pass

    def die(name, done, total, rows):
        if done == total - 1:
            raise Killed

    step = FuseGPT(2, **SMALL)
    expected = step(model, CALIB, Run(StepStore(tmp_path / "whole")))
    with pytest.raises(Killed):
        step(model, CALIB, Run(StepStore(tmp_path / "s"), die))
    told = []
    later = Run(StepStore(tmp_path / "s"), lambda *args: told.append(args[1:3]))
    found = step(model, CALIB, later)
    in_memory = lambda m: m.replace(blocks=tuple(iter_blocks(m)))  # noqa: E731
    chex.assert_trees_all_equal(in_memory(found.model), in_memory(expected.model))
    assert [r.metrics for r in found.rows] == [r.metrics for r in expected.rows]
    assert told == [(done, 17) for done in range(14, 18)]  # the steps of the second round
    told.clear()
    assert step(model, CALIB, later).model.kept == found.model.kept and not told


def test_a_dry_run_knows_the_depth_and_takes_its_time(model):
    steps = (FuseGPT(rate=0.4, **SMALL), FlatQuant(epochs=1))
    assert len(check_steps(model, steps, CALIB).blocks) == 3
    (step,) = plan(model, steps[:1], CALIB)
    assert step.seconds > 0 and step.peak_bytes > 0


def test_a_rate_is_rounded_up_and_its_last_bit_means_nothing():
    count = lambda rate, n: FuseGPT(rate=rate).count(n)  # noqa: E731
    assert [count(0.2, 32), count(0.25, 32), count(0.3, 32), count(0.1, 30)] == [7, 8, 10, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(), "give one of the three"),
        (dict(remove=1, rate=0.5), "give one of the three"),
        (dict(rate=1.0), "rate=1.0 is outside"),
        (dict(remove=1, group_size=1), "group_size=1 is below 2"),
        (dict(remove=1, control="x"), "control='x' is none of"),
        (dict(remove=1, targets="x"), "targets='x' is none of"),
        (dict(remove=1, loss="x"), "loss='x' is none of"),
        (dict(remove=1, coefficient="x"), "coefficient='x' is none of"),
        (dict(remove=1, dtype="float16"), "dtype='float16' is none of"),
        (dict(remove=1, rank=0), "rank=0 is below 1"),
        (dict(remove=1, epochs=0), "epochs=0 is below 1"),
        (dict(remove=1, lr=float("nan")), "lr=nan is not a rate"),
        (dict(remove=1, token_limit=0.0), "token_limit=0.0 is not positive"),
        (dict(remove=1, loss="batch_kl", batch=1), "batch_kl compares the windows"),
        (dict(remove=1, control="lora", lora_rank=0, norm_lr=0), "nothing would be learned"),
        (dict(remove=1, protect=(-1, 0)), "protect="),
        (dict(remove=1, windows=0), "windows=0 is below 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FuseGPT(**settings)


@pytest.mark.parametrize(
    ("before", "settings", "message"),
    [
        ((), dict(remove=5), "remove=5, and of the 5 blocks 5 may go"),
        ((), dict(remove=4, protect=(1, 1)), "of the 5 blocks 3 may go"),
        ((), dict(blocks=(5,)), "there is no block 5"),
        ((), dict(blocks=(1, 1)), "named twice"),
        ((), dict(remove=1, rank=33), "rank=33 is above 32, the smaller side of block 0, attn.q"),
        ((), dict(remove=1, lora_rank=33), "lora_rank=33 is above 32"),
        ((), dict(remove=1, batch=9), "8 calibration windows are fewer than batch=9"),
        ((RTN(),), dict(remove=1), "quantized already.*dequantize"),
        ((RTN(weight=None, act=Q8),), dict(remove=1), "a transform or a quantizer at attn_in"),
        ((LinearPatch(blocks=(1,)),), dict(remove=1), "carries a patch"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_begins(before, settings, message, model):
    step = FuseGPT(**SMALL | settings)
    with pytest.raises(ValueError, match=message):
        check_steps(model, (*before, step), CALIB)


def test_text_that_does_not_do_is_refused(model):
    step = FuseGPT(1, **SMALL)
    with pytest.raises(ValueError, match="FuseGPT needs calibration text"):
        check_steps(model, (step,), None)
    with pytest.raises(ValueError, match="3 calibration windows are fewer than batch=4"):
        step(model, Calibration(CALIB.tokens[:3], 2))
    with pytest.raises(ValueError, match="has the token 400, and the model knows 320"):
        step(model, Calibration(np.full((4, 8), 400, np.int32), 2))


def test_weights_that_overflow_are_refused_with_the_round(model):
    block = model.blocks[1]
    broken = block.replace(ffn=block.ffn.replace(up=block.ffn.up.replace(w=block.ffn.up.w * 1e38)))
    blocks = (model.blocks[0], broken, *model.blocks[2:])
    step = FuseGPT(blocks=(2,), **SMALL)
    with pytest.raises(ValueError, match="round 1, without block 2, the states of blocks 0 to 3"):
        step(model.replace(blocks=blocks), CALIB)


def test_a_recipe_fuses_then_quantizes_and_leaves_the_choice_as_a_recipe(tmp_path):
    source = tiny.checkpoint("qwen2", jax.random.key(0), tmp_path / "hf", num_hidden_layers=4)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(tiny.SENTENCES * 40))
    recipe = Recipe(
        (FuseGPT(rate=0.5, **SMALL), GPTQ(jaxcomp.QuantSpec(8))),
        CalibSpec(str(text), samples=4, length=16, batch=2),
    )
    report = jaxcomp.compress(source, recipe, tmp_path / "out")
    model = jaxcomp.load(tmp_path / "out").model
    assert len(model.blocks) == 2 and len(model.kept) == 2
    assert {row.step for row in report.rows} == {"FuseGPT", "GPTQ"}
    found = jaxcomp.load_recipe(tmp_path / "out" / "found_recipe.json").steps[0]
    assert sorted({*found.blocks, *model.kept}) == [0, 1, 2, 3]
    assert "FuseGPT" in (tmp_path / "out" / "report.html").read_text()
