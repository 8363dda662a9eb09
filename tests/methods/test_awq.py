import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.calibrate import BlockStep, Calibration
from jaxcomp.calibrate.plan import plan
from jaxcomp.core.metrics import relative_error
from jaxcomp.core.quantize import QTensor, QuantSpec, dequantize, quantize
from jaxcomp.core.site import Site
from jaxcomp.core.transforms import Hadamard
from jaxcomp.core.tree import get_at, named_leaves
from jaxcomp.methods import awq as method
from jaxcomp.methods.awq import AWQ, observe, search_scales
from jaxcomp.methods.rtn import RTN
from jaxcomp.models.anatomy import anatomy, score_linears
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import block_forward, forward
from jaxcomp.models.families import FAMILIES
from jaxcomp.models.scaling import divide_sites
from jaxcomp.models.stream import embed_batches
from tests import tiny

W3 = QuantSpec(3, group_size=16, symmetric=False)
logits_of = jax.jit(forward)


@pytest.fixture(scope="module")
def calib():
    return Calibration(np.asarray(tiny.tokens(jax.random.key(1), 8, 16)), batch=4)


def model_of(family="qwen2", **overrides):
    return tiny.model(family, jax.random.key(0), **overrides)


def step_of(seed=1, outliers=0.0, family="qwen2", **overrides):
    """A block and inputs whose channels differ as much as exp(outliers · normal)."""
    block = model_of(family, **overrides).blocks[0]
    x = jax.random.normal(jax.random.key(seed), (8, 16, 32))
    loud = jnp.exp(outliers * jax.random.normal(jax.random.key(9), (32,)))
    for site in ("attn_in", "ffn_in"):
        norm = get_at(block, anatomy(block)[site].producer)
        louder = norm.replace(weight=norm.weight * loud)
        block = block.replace(**{anatomy(block)[site].producer: louder})
    return BlockStep(0, block, [np.asarray(x[:4]), np.asarray(x[4:])])


def numeric(metrics):
    return {name for name, value in metrics.items() if not isinstance(value, str)}


@pytest.mark.parametrize(("family", "kv_heads"), [*((f, 2) for f in FAMILIES), ("qwen2", 4)])
def test_the_scales_alone_leave_the_logits_unchanged(family, kv_heads, calib):
    model, tokens = model_of(family, num_key_value_heads=kv_heads), tiny.tokens(jax.random.key(2))
    hidden, cfg = embed_batches(model, calib.tokens, 4), AWQ(W3)
    steps = [BlockStep(i, block, hidden) for i, block in enumerate(model.blocks)]
    found = [search_scales(cfg, step, observe(cfg, step))[0] for step in steps]
    scaled = tuple(divide_sites(b, s) for b, s in zip(model.blocks, found, strict=True))
    assert all(("attn_out" in s) == (kv_heads == 4) for s in found)
    assert any(float(jnp.ptp(s)) > 0.1 for scales in found for s in scales.values())
    expected = logits_of(model, tokens)
    off = jnp.max(jnp.abs(logits_of(model.replace(blocks=scaled), tokens) - expected))
    assert off < 1e-5 * jnp.ptp(expected)


def test_no_exponent_of_the_grid_is_better_and_the_first_is_no_scale():
    cfg, step = AWQ(W3, grid=5), step_of(outliers=1.5)
    seen = observe(cfg, step)
    scales, numbers = search_scales(cfg, step, seen)
    none, _ = search_scales(dataclasses.replace(cfg, grid=1), step, seen)
    assert all(np.array_equal(s, np.ones_like(s)) for s in none.values())
    block, x = step.block, jnp.concatenate(step.hidden)
    inputs = {}
    block_forward(block, x, plain_context(8, 16), lambda n, h: inputs.setdefault(n, h))
    down, mid = block.ffn.down.w, inputs["ffn_mid"].reshape(-1, 48)
    mean, losses = jnp.mean(jnp.abs(mid), axis=0), []
    for ratio in np.arange(5) / 5:
        s = jnp.maximum(mean**ratio, 1e-4)
        s = (s / jnp.sqrt(s.max() * s.min()))[:, None]
        losses.append(
            relative_error(mid / s[:, 0] @ dequantize(quantize(down * s, W3)), mid @ down)
        )
    assert numbers["ffn_mid_error"] == pytest.approx(float(min(losses)), rel=1e-3)
    assert numbers["ffn_mid_error_unscaled"] == pytest.approx(float(losses[0]), rel=1e-3)
    assert numbers["ffn_mid_ratio"] == int(np.argmin(losses)) / 5
    for site in scales:
        assert numbers[f"{site}_error"] <= numbers[f"{site}_error_unscaled"]
    assert numbers["ffn_in_error"] < 0.9 * numbers["ffn_in_error_unscaled"]


def test_rounding_is_worse_than_awq_on_tokens_not_calibrated_on():
    step, fresh = step_of(outliers=1.5), step_of(seed=5).hidden[0]
    expected = run(step.block, fresh)
    awq = relative_error(
        run(method.quantize_block(AWQ(W3), step)[0], fresh) - fresh, expected - fresh
    )
    rounded = RTN(W3)(one_block(step.block)).model.blocks[0]
    assert awq < 0.9 * relative_error(run(rounded, fresh) - fresh, expected - fresh)


def run(block, x):
    return block_forward(block, jnp.asarray(x), plain_context(*x.shape[:2]))


def one_block(block):
    return model_of().replace(blocks=(block,))


def test_queries_and_keys_are_not_clamped_and_the_others_may_be():
    step = step_of(outliers=1.0)
    without, _ = method.quantize_block(AWQ(W3, clip=False), step)
    clamped, rows = method.quantize_block(AWQ(W3), step)
    same = {
        path: bool(np.array_equal(get_at(without, path).w.scale, get_at(clamped, path).w.scale))
        for path in anatomy(step.block).linears
    }
    assert {path for path in same if same[path]} >= set(score_linears(step.block.attn))
    assert not all(same.values())
    for path in same:
        assert rows[path].keys() == {"error_before", "error_after", "bits"}


def test_with_neither_scale_nor_clamp_it_rounds_to_nearest():
    step = step_of()
    block, rows = method.quantize_block(AWQ(W3, scale=False, clip=False), step)
    for path in anatomy(block).linears:
        expected = quantize(get_at(step.block, path).w, W3)
        assert jax.tree.all(jax.tree.map(np.array_equal, get_at(block, path).w, expected))
        assert rows[path]["error_after"] == pytest.approx(rows[path]["error_before"], rel=1e-4)


def test_shared_value_heads_are_not_scaled_and_a_row_says_so(calib):
    result = AWQ(W3)(model_of(), calib)
    rows = [r.metrics for r in result.rows if r.linear is None]
    assert all("2 times" in row["attn_out_skipped"] and "attn_out_ratio" not in row for row in rows)
    assert all(0 <= row["attn_in_ratio"] < 1 for row in rows)
    with pytest.raises(ValueError, match=r"block 0: attn_out .*2 times"):
        AWQ(W3, sites=("attn_out",)).check(model_of())
    AWQ(W3, sites=("attn_out",)).check(model_of(num_key_value_heads=4))
    AWQ(W3, sites=("attn_out",), scale=False).check(model_of())


def test_a_site_that_is_rotated_is_clamped_and_rounded_but_not_scaled():
    step = step_of()
    rotated = step.block.replace(sites={"ffn_mid": Site(transforms=(Hadamard(16),))})
    block, rows = method.quantize_block(AWQ(W3), dataclasses.replace(step, block=rotated))
    assert "Hadamard" in rows[""]["ffn_mid_skipped"] and isinstance(block.ffn.down.w, QTensor)
    with pytest.raises(ValueError, match=r"ffn_mid .*Hadamard"):
        AWQ(W3, sites=("ffn_mid",)).check(one_block(rotated))


def test_how_the_text_is_cut_into_batches_does_not_matter(calib):
    cfg = AWQ(W3, search_tokens=48)
    first, second = (cfg(model_of(), dataclasses.replace(calib, batch=n)).rows for n in (4, 3))
    for a, b in zip(first, second, strict=True):
        assert a.metrics.keys() == b.metrics.keys()
        for name in numeric(a.metrics):
            # A range clamped on both sides has its zero point half way between two codes.
            within = 0.1 if name == "error_after" else 1e-3
            assert a.metrics[name] == pytest.approx(b.metrics[name], rel=within)


def test_the_sample_is_spread_over_all_batches():
    hidden = [np.full((n, 4, 1), 10 * n) + np.arange(n)[:, None, None] for n in (3, 3, 1)]
    sample = method._sample(AWQ(search_tokens=12), hidden)
    assert sample[:, 0, 0].tolist() == [30, 32, 31]
    assert len(method._sample(AWQ(search_tokens=1), hidden)) == 1
    assert len(method._sample(AWQ(search_tokens=10**6), hidden)) == 7


def test_what_keeps_its_float_form_keeps_its_dtype(calib):
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model_of())
    after, before = named_leaves(AWQ(W3)(model, calib).model), named_leaves(model)
    kept = before.keys() & after.keys()
    assert {"blocks.1.ffn_norm.weight", "blocks.0.attn.v.b"} <= kept
    assert {after[name].dtype for name in kept} == {jnp.dtype(jnp.bfloat16)}


def test_the_next_block_sees_the_model_without_rounding(calib):
    model = model_of()
    rows = [row for row in AWQ(W3)(model, calib).rows if row.block == 1]
    hidden = [np.asarray(run(model.blocks[0], x)) for x in embed_batches(model, calib.tokens, 4)]
    _, alone = method.quantize_block(AWQ(W3), BlockStep(1, model.blocks[1], hidden))
    for row in rows:
        for name in numeric(row.metrics) - {"error_after"}:
            assert row.metrics[name] == pytest.approx(alone[row.linear or ""][name], rel=1e-3)


def test_a_dry_run_reads_only_the_structure(calib):
    model = model_of()
    (step,) = plan(jax.eval_shape(lambda: model), (AWQ(W3),), calib)
    assert step.seconds > 0


def test_bad_input_is_refused_with_the_place(calib):
    for settings in (dict(grid=0), dict(search_tokens=0), dict(clip_tokens=0)):
        with pytest.raises(ValueError, match="below 1"):
            AWQ(**settings)
    with pytest.raises(ValueError, match=r"block 0, attn.q: .*group_size=128"):
        AWQ().check(model_of())
    with pytest.raises(ValueError, match="already quantized to 3 bits"):
        AWQ(W3).check(RTN(W3)(model_of()).model)
    with pytest.raises(ValueError, match="ffn_inn cannot be scaled"):
        AWQ(W3, sites=("ffn_inn",)).check(model_of())
    with pytest.raises(ValueError, match="calibration"):
        AWQ(W3)(model_of(), None)


def test_no_finite_error_names_block_and_site():
    step = step_of()
    ffn = step.block.ffn
    huge = step.block.replace(ffn=ffn.replace(up=ffn.up.replace(w=ffn.up.w * 1e38)))
    with pytest.raises(ValueError, match=r"block 0, site ffn_in: none of the 20"):
        method.quantize_block(AWQ(W3, sites=("ffn_in",)), dataclasses.replace(step, block=huge))
