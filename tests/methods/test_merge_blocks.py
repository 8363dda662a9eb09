import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import artefact
from jaxcomp.calibrate import Calibration, Run, StepStore
from jaxcomp.calibrate.plan import check_steps
from jaxcomp.core.tree import get_at, named_leaves, replace_at
from jaxcomp.methods import RTN, MergeBlocks, QuaRot
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import BlockHandle, forward, load_block
from jaxcomp.models.layers import rms_norm
from jaxcomp.models.stream import embed_batches, run_blocks
from tests import tiny

CALIB = Calibration(np.asarray(tiny.tokens(jax.random.key(1), 6, 12)), batch=4)


@pytest.fixture(scope="module")
def model():
    return tiny.model("qwen2", jax.random.key(0), num_hidden_layers=6)


def linears(block):
    return {path: get_at(block, path) for path in anatomy(block).linears}


def summed(blocks, weights):
    """Weights and biases of all linears in float64."""
    return {
        (path, name): sum(
            w * np.asarray(getattr(get_at(b, path), name), np.float64)
            for w, b in zip(weights, blocks, strict=True)
        )
        for path in anatomy(blocks[0]).linears
        for name in ("w", "b")
        if getattr(get_at(blocks[0], path), name) is not None
    }


def check_block(found, blocks, weights):
    for (path, name), expected in summed(blocks, weights).items():
        np.testing.assert_allclose(getattr(get_at(found, path), name), expected, atol=1e-6)
    for norm in ("attn_norm", "ffn_norm"):
        np.testing.assert_array_equal(getattr(found, norm).weight, getattr(blocks[0], norm).weight)


def test_the_last_two_are_averaged_again_and_again(model):
    result = MergeBlocks("last", remove=2, alpha=0.62)(model)
    assert result.model.kept == (0, 1, 2, 3)
    check_block(result.model.blocks[3], model.blocks[3:], (0.62, 0.38 * 0.62, 0.38**2))
    for new, old in zip(result.model.blocks[:3], model.blocks, strict=False):
        leaves = named_leaves(old)
        assert all(np.array_equal(x, leaves[name]) for name, x in named_leaves(new).items())
    assert [r.metrics["removed"] for r in result.rows[:-1]] == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("kind, weights", [("laco", (-1, 1, 1)), ("laco_code", (0, 0, 1))])
def test_merges_by_hand_are_the_published_sums(model, kind, weights):
    result = MergeBlocks(kind, merges=((2, 3),))(model)
    assert result.model.kept == (0, 1, 2, 5)
    check_block(result.model.blocks[2], model.blocks[2:5], weights)


def answer(model, tokens):
    """Final states behind the final norm, a vector a window."""
    hidden = np.concatenate(run_blocks(model, embed_batches(model, tokens, len(tokens))))
    return np.asarray(rms_norm(model.norm, jnp.asarray(hidden))).reshape(len(tokens), -1)


def naive_walk(model, step, tokens):
    """LaCo's algorithm with a whole model for every trial."""
    dense = answer(model, tokens).astype(np.float64)
    first, last = step.protect[0], len(model.blocks) - step.protect[1]
    merges, scores, left = [], [], step.remove or 99
    at = last - min(step.span, left + 1)
    while left > 0 and at >= first:
        count = min(step.span, left + 1)
        trial = MergeBlocks(step.kind, merges=(*merges, (at, count)))(model).model
        there = answer(trial, tokens).astype(np.float64)
        cosine = np.sum(dense * there, -1) / np.linalg.norm(dense, axis=-1)
        score = np.mean(cosine / np.linalg.norm(there, axis=-1))
        scores.append((at, score))
        if score > step.threshold:
            merges.append((at, count))
            left, last = left - count + 1, last - count + 1
            at = min(at - step.interval, last - min(step.span, left + 1))
        else:
            at -= 1
    return merges, scores


@pytest.mark.parametrize("kind", ["laco", "laco_code"])
@pytest.mark.parametrize(
    "span, interval, remove, protect",
    [
        (2, 1, None, (1, 0)),
        (3, 1, None, (0, 0)),
        (3, 2, None, (1, 1)),
        (3, 1, 3, (0, 0)),
        (2, 2, 1, (0, 2)),
    ],
)
def test_the_walk_is_the_published_one_with_a_whole_model_for_every_trial(
    model, kind, span, interval, remove, protect
):
    step = MergeBlocks(kind, remove, span, -1.0, interval, protect=protect, windows=None)
    scores = sorted(s for _, s in naive_walk(model, step, CALIB.tokens)[1])
    # Once with a threshold in the middle of what there is, once without one.
    for threshold in (float(np.median(scores)) + 1e-4, -1.0):
        step = dataclasses.replace(step, threshold=threshold)
        merges, scores = naive_walk(model, step, CALIB.tokens)
        result = step(model, CALIB)
        told = result.rows[-1].metrics
        assert told["merges"] == ", ".join(f"{at}+{count}" for at, count in merges)
        assert told["trials"] == len(scores)
        for at, score in dict(scores).items():
            assert result.rows[at].metrics["cosine"] == pytest.approx(score, abs=1e-5)
        expected = MergeBlocks(kind, merges=tuple(merges))(model).model if merges else model
        tokens = tiny.tokens(jax.random.key(2))
        np.testing.assert_allclose(
            forward(result.model, tokens), forward(expected, tokens), atol=1e-5
        )
        if merges:
            assert step.found(result.rows) == dataclasses.replace(
                step, remove=None, merges=tuple(merges)
            )


def test_of_blocks_that_do_nothing_one_goes_and_no_other_does(model):
    idle = model.blocks[2]
    for path in ("attn.o", "ffn.down"):
        idle = replace_at(idle, path, jax.tree.map(jnp.zeros_like, get_at(idle, path)))
    twin = model.replace(blocks=(*model.blocks[:2], idle, idle, *model.blocks[4:]))
    result = MergeBlocks("laco", span=2, threshold=1 - 1e-5, windows=None)(twin, CALIB)
    assert result.rows[-1].metrics["removed_blocks"] == "3"
    tokens = tiny.tokens(jax.random.key(2))
    np.testing.assert_allclose(forward(result.model, tokens), forward(twin, tokens), atol=1e-5)


@pytest.mark.parametrize(
    "step",
    [MergeBlocks("laco", 2, 2, -1.0, interval=2), MergeBlocks("last", remove=2, alpha=0.3)],
    ids=["laco", "last"],
)
def test_blocks_on_disk_in_half_precision_are_merged_as_those_in_memory(model, tmp_path, step):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model)
    artefact.save(half, tmp_path / "m")
    stored = artefact.load(tmp_path / "m", lazy=True)
    assert isinstance(stored.blocks[0], BlockHandle)
    found, expected = step(stored, CALIB), step(half, CALIB)
    assert found.rows[-1].metrics == expected.rows[-1].metrics
    assert found.model.kept == expected.model.kept and len(found.model.blocks) == 4
    for new, old in zip(map(load_block, found.model.blocks), expected.model.blocks, strict=True):
        leaves = named_leaves(old)
        assert all(x.dtype == jnp.bfloat16 for x in leaves.values())
        assert all(np.array_equal(x, leaves[name]) for name, x in named_leaves(new).items())
    exact = step.found(found.rows)(model).model
    for new, old in zip(expected.model.blocks, exact.blocks, strict=True):
        for path, p in linears(old).items():
            near = np.asarray(get_at(new, path).w, np.float32)
            np.testing.assert_allclose(near, p.w, atol=0.02 * float(jnp.abs(p.w).max()))


def test_a_walk_that_keeps_nothing_says_so_and_changes_nothing(model):
    result = MergeBlocks("laco", threshold=0.999999)(model, CALIB)
    assert result.model.kept is None and "nothing is merged" in result.rows[-1].metrics["warning 1"]
    few = MergeBlocks("laco", remove=4, span=4, threshold=-1.0, protect=(0, 2))
    with pytest.raises(ValueError, match="remove=4 merges 5 blocks, and of the model's 6"):
        few.check(model)
    some = MergeBlocks("laco", remove=5, span=2, interval=3, threshold=-1.0, protect=(0, 0))
    assert "2 of 5 blocks are gone" in some(model, CALIB).rows[-1].metrics["warning 1"]


def test_a_killed_walk_goes_on_with_the_trials_it_made(model, tmp_path, monkeypatch):
    import jaxcomp.calibrate.merging as merging

    step, calls, real = MergeBlocks("laco", span=2, threshold=0.5), [], merging._similarity
    expected = step(model, CALIB)

    def stop(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(merging, "_similarity", stop)
    with pytest.raises(KeyboardInterrupt):
        step(model, CALIB, Run(StepStore(tmp_path)))
    found = step(model, CALIB, Run(StepStore(tmp_path)))
    trials = expected.rows[-1].metrics["trials"]
    assert len(calls) == trials + 1 and [r.metrics for r in found.rows] == [
        r.metrics for r in expected.rows
    ]
    step(model, CALIB, Run(StepStore(tmp_path)))
    assert len(calls) == trials + 1


def test_a_dry_run_knows_the_depth_where_it_is_asked_for(model):
    for step, left in (
        (MergeBlocks("last", remove=2), 4),
        (MergeBlocks("laco", remove=3, span=2), 3),
        (MergeBlocks("laco", span=4), 3),
        (MergeBlocks("laco", merges=((3, 2), (0, 3))), 3),
    ):
        assert len(check_steps(model, (step, RTN()), CALIB).blocks) == left


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(kind="first"), "none of laco, laco_code, last"),
        (dict(kind="last"), "give a number"),
        (dict(remove=0), "remove=0 is below 1"),
        (dict(span=1), "span=1 is below 2"),
        (dict(interval=0), "interval=0 is below 1"),
        (dict(windows=0), "windows=0 is below 1"),
        (dict(threshold=1.0), "it is a cosine"),
        (dict(alpha=1.5), "it is a share"),
        (dict(protect=(-1, 0)), "protect"),
        (dict(remove=2, merges=((1, 2),)), "give one of them"),
        (dict(merges=((3,),)), "is no merge"),
        (dict(merges=(3, 2)), "is no merge"),
        (dict(merges=((True, 2),)), "is no merge"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MergeBlocks(**settings)


def test_models_whose_blocks_have_no_sum_are_refused(model):
    step = MergeBlocks("last", remove=2)
    with pytest.raises(ValueError, match="quantized to 4 bits"):
        step(RTN(RTN().weight)(model, None).model)
    with pytest.raises(ValueError, match="merge blocks before"):
        step.check(QuaRot()(model, CALIB).model)
    wide = tiny.model("qwen2", jax.random.key(0), intermediate_size=96).blocks[0]
    with pytest.raises(ValueError, match=r"ffn.gate of block 2 is \(\d+, 96\)"):
        step.check(model.replace(blocks=(*model.blocks[:2], wide, *model.blocks[3:])))
    other = tiny.model("llama", jax.random.key(0)).blocks[0]
    with pytest.raises(
        ValueError, match=r"attn.q of block 1 is \(\d+, \d+\) and of block 0 .* bias"
    ):
        step.check(model.replace(blocks=(model.blocks[0], other, *model.blocks[2:])))
    with pytest.raises(ValueError, match="needs calibration text"):
        MergeBlocks()(model, None)
    with pytest.raises(ValueError, match="merge \\(4, 3\\)"):
        MergeBlocks("laco", merges=((4, 3),)).check(model)


def test_numbers_that_are_not_finite_name_the_block_they_come_from(model):
    def with_down(i, factor):
        block = replace_at(model.blocks[i], "ffn.down.w", model.blocks[i].ffn.down.w * factor)
        return model.replace(blocks=(*model.blocks[:i], block, *model.blocks[i + 1 :]))

    with pytest.raises(
        ValueError, match="the final states behind the norm, over their length, batch, 0"
    ):
        MergeBlocks("laco", span=2)(with_down(4, 1e38), CALIB)
    for step in (MergeBlocks("last", remove=2), MergeBlocks("laco", merges=((2, 3),))):
        with pytest.raises(ValueError, match="the weights of block 4"):
            step(with_down(4, np.nan))
    with pytest.raises(ValueError, match=r"blocks 2 to 4 as one, ffn\.down\.w"):
        half = jax.tree.map(lambda x: x.astype(jnp.float16), model)
        blocks = [
            replace_at(b, "ffn.down.w", jnp.full_like(b.ffn.down.w, 4e4)) for b in half.blocks
        ]
        blocks[2] = replace_at(blocks[2], "ffn.down.w", jnp.full_like(blocks[2].ffn.down.w, -4e4))
        MergeBlocks("laco", merges=((2, 3),))(half.replace(blocks=tuple(blocks)))


def test_the_last_merge_of_a_limited_walk_may_be_at_the_end(model):
    one = MergeBlocks("laco", remove=1, span=3, threshold=-1.0, protect=(0, 0))(model, CALIB)
    assert one.rows[-1].metrics["merges"] == "4+2"
    all_but_two = MergeBlocks("laco", remove=4, span=4, threshold=-1.0)(model, CALIB)
    assert all_but_two.model.kept == (0, 1)


def test_a_merge_of_blocks_with_other_windows_is_warned_of(model):
    gemma = tiny.model("gemma3_text", jax.random.key(0), num_hidden_layers=6)
    windows = [block.attn.window for block in gemma.blocks]
    at = next(i for i in range(5) if windows[i] != windows[i + 1])
    rows = MergeBlocks("laco", merges=((at, 2),))(gemma).rows
    assert f"became blocks {at} differ" in rows[-1].metrics["warning 2"]
    assert "warning 2" not in MergeBlocks("laco", merges=((1, 2),))(model).rows[-1].metrics
