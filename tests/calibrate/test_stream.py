import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.calibrate import Calibration, Run, StepStore, blockwise
from jaxcomp.core.quantize import QTensor, QuantSpec, quantize
from jaxcomp.core.tree import named_leaves, replace_at
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import block_forward, forward, head_logits, load_block
from jaxcomp.models.layers import embed_tokens
from jaxcomp.models.stream import block_step
from tests import tiny

INT3 = QuantSpec(bits=3, symmetric=False)


@pytest.fixture(scope="module")
def model():
    return tiny.model("mistral", jax.random.key(0), num_hidden_layers=3)


@pytest.fixture(scope="module")
def calib():
    return Calibration(np.asarray(tiny.tokens(jax.random.key(1), 4, 12)), batch=2)


def visit_and_keep(seen):
    def visit(step):
        seen.append(np.concatenate(step.hidden) if step.hidden else None)
        return step.block, {}

    return visit


def round_block(step):
    """A visitor that changes the block, the cheapest there is: only `down` is quantized."""
    w = jnp.asarray(step.block.ffn.down.w)
    block = replace_at(step.block, "ffn.down.w", quantize(w, INT3))
    return block, {"": {"note": "whole"}, "ffn.down": {"mean": float(np.mean(step.hidden[0]))}}


def leaves_equal(a, b):
    a, b = named_leaves(a), named_leaves(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def inputs_of_blocks(blocks, model, tokens):
    """What each block reads when the blocks before it are `blocks`, one after another."""
    x, out = embed_tokens(model.embed, tokens, "float32"), []
    for block in blocks:
        out.append(np.asarray(x))
        x = block_forward(block, x, plain_context(*tokens.shape))
    return out, x


def test_a_visitor_sees_what_the_whole_forward_computes(model, calib):
    seen = []
    result = blockwise("look", model, calib, visit_and_keep(seen))
    expected, last = inputs_of_blocks(model.blocks, model, calib.tokens)
    np.testing.assert_allclose(np.stack(seen), np.stack(expected), atol=1e-5)
    assert [(r.step, r.block, r.linear) for r in result.rows] == [
        ("look", i, None) for i in (0, 1, 2)
    ]
    logits = forward(model, calib.tokens)
    np.testing.assert_allclose(head_logits(model, last), logits, atol=1e-4)
    assert leaves_equal(result.model, model)


@pytest.mark.parametrize("inputs", ["compressed", "original"])
def test_the_inputs_are_those_of_the_compressed_or_of_the_original_prefix(inputs, model, calib):
    seen = []

    def visit(step):
        seen.append(np.concatenate(step.hidden))
        return round_block(step)

    result = blockwise("round", model, calib, visit, inputs)
    source = {"compressed": result.model, "original": model}
    found = {}
    for name, m in source.items():
        expected, _ = inputs_of_blocks(m.blocks, model, calib.tokens)
        found[name] = [np.max(np.abs(a - b)) for a, b in zip(seen, expected, strict=True)]
    assert max(found.pop(inputs)) < 1e-5
    (other,) = found.values()
    assert other[0] == 0 and min(other[1:]) > 1e-3  # the first block reads the same either way


def test_without_inputs_nothing_is_streamed_and_no_text_is_needed(model):
    seen = []
    blockwise("look", model, None, visit_and_keep(seen), None)
    assert seen == [None] * 3
    with pytest.raises(ValueError, match=r"look needs calibration text.*CalibSpec"):
        blockwise("look", model, None, visit_and_keep(seen))


def test_blocks_of_one_structure_share_one_compilation(model):
    calib = Calibration(
        np.asarray(tiny.tokens(jax.random.key(2), 2, 11)), batch=1
    )  # shapes of its own
    before = block_step._cache_size()
    blockwise("look", model, calib, lambda step: (step.block, {}))
    assert block_step._cache_size() == before + 1
    other = model.blocks[1].replace(attn=model.blocks[1].attn.replace(window=None))
    mixed = model.replace(blocks=(*model.blocks[:1], other, *model.blocks[1:]))
    blockwise("look", mixed, calib, lambda step: (step.block, {}))
    assert block_step._cache_size() == before + 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_with_block_and_leaf(value, model, calib):
    place = "blocks.1.ffn.up.w"
    bad = replace_at(model, place, model.blocks[1].ffn.up.w.at[3, 4].set(value))
    with pytest.raises(ValueError, match=r"weights of block 1, ffn\.up\.w: 1 of 1536 values"):
        blockwise("look", bad, calib, lambda step: (step.block, {}))


def test_an_embedding_that_is_not_finite_is_refused(model, calib):
    bad = replace_at(model, "embed.weight", model.embed.weight.at[calib.tokens[0, 0]].set(jnp.nan))
    with pytest.raises(ValueError, match=r"embedding of the calibration text.*NaN or infinity"):
        blockwise("look", bad, calib, lambda step: (step.block, {}))


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_an_interrupted_run_continues_with_the_arrays_it_would_have_had(
    stop, model, calib, tmp_path
):
    whole = blockwise("round", model, calib, round_block, run=Run(StepStore(tmp_path / "whole")))

    def interrupted(step):
        if step.index == stop:
            raise KeyboardInterrupt
        return round_block(step)

    store, visited = tmp_path / "store", []
    with pytest.raises(KeyboardInterrupt):
        blockwise("round", model, calib, interrupted, run=Run(StepStore(store)))

    def watched(step):
        visited.append(step.index)
        return round_block(step)

    resumed = blockwise("round", model, calib, watched, run=Run(StepStore(store)))
    assert visited == list(range(stop, 3))
    assert [dataclasses.replace(r, seconds=0.0) for r in resumed.rows] == [
        dataclasses.replace(r, seconds=0.0) for r in whole.rows
    ]
    for a, b in zip(resumed.model.blocks, whole.model.blocks, strict=True):
        assert leaves_equal(a.load(), b.load())


def test_a_finished_step_is_not_done_again(model, calib, tmp_path):
    first = blockwise("round", model, calib, round_block, run=Run(StepStore(tmp_path)))
    told = []

    def never(step):
        raise AssertionError("visited")

    again = blockwise(
        "round", model, calib, never, run=Run(StepStore(tmp_path), lambda *a: told.append(a[1:3]))
    )
    assert again.rows == first.rows and told == [(3, 3)]
    assert leaves_equal(again.model.blocks[2].load(), first.model.blocks[2].load())


def test_a_block_written_before_its_record_is_written_again(model, calib, tmp_path):
    whole = blockwise("round", model, calib, round_block, run=Run(StepStore(tmp_path / "whole")))
    store = StepStore(tmp_path / "store")
    for name in ("blocks.0", ".blocks.0.tmp"):  # what a kill may leave
        (store.path / name).mkdir()
        (store.path / name / "half").write_text("half")
    (store.path / "state.json.tmp").write_text("{")
    result = blockwise("round", model, calib, round_block, run=Run(store))
    assert leaves_equal(result.model.blocks[0].load(), whole.model.blocks[0].load())
    assert not list(store.path.glob("*.tmp")) and not list(store.path.glob(".*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_states_keep_their_bits_in_the_store(dtype, model, tmp_path):
    hidden = [
        np.random.default_rng(i).standard_normal((2, 3, 4)).astype(jnp.dtype(dtype))
        for i in range(2)
    ]
    hidden[0][0, 0, 0] = -0.0
    store = StepStore(tmp_path)
    store.finish(4, model.blocks[0], hidden, [])
    back = store.hidden(5)
    assert [a.tobytes() for a in back] == [a.tobytes() for a in hidden]
    assert all(a.dtype == jnp.dtype(dtype) for a in back)


def test_blocks_of_a_stored_step_are_handles_with_their_quantized_leaves(model, calib, tmp_path):
    result = blockwise("round", model, calib, round_block, run=Run(StepStore(tmp_path)))
    block = result.model.blocks[1]
    assert not hasattr(block, "attn") and block.struct().ffn.down.w.bits == 3
    assert isinstance(load_block(block).ffn.down.w, QTensor)
    assert anatomy(block.struct()).linears == anatomy(model.blocks[1]).linears


def test_a_value_is_made_once_and_kept(tmp_path):
    store, made = StepStore(tmp_path / "step"), []
    for _ in range(2):
        assert store.keep("scores", lambda: made.append(1) or {"bi": [0.5, 1e-9]}) == {
            "bi": [0.5, 1e-9]
        }
    assert made == [1]
    with pytest.raises(ValueError, match="JSON"):
        store.keep("worse", lambda: float("nan"))
    assert store.keep("worse", lambda: 1) == 1  # nothing was left behind


def test_a_step_that_needs_the_original_says_how_to_give_it():
    model = tiny.model("qwen2", jax.random.key(0))
    assert Run(original=model).needs_original("X") is model
    with pytest.raises(ValueError, match=r"X looks at the model as it was.*Run\(original="):
        Run().needs_original("X")
