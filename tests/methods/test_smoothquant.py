import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.calibrate import Calibration
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.site import ActQuantizer, Site
from jaxcomp.core.transforms import Hadamard
from jaxcomp.core.tree import get_at, named_leaves
from jaxcomp.methods.rtn import RTN
from jaxcomp.methods.smoothquant import SmoothQuant
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import forward, map_blocks
from jaxcomp.models.families import FAMILIES
from jaxcomp.models.fold import fold_scale
from tests import tiny

EVERY_SITE = ("attn_in", "attn_out", "ffn_in", "ffn_mid")
logits_of = jax.jit(forward)


@pytest.fixture(scope="module")
def calib():
    return Calibration(np.asarray(tiny.tokens(jax.random.key(1), 8, 16)), batch=4)


def model_of(family="qwen2", outlier=1.0, **overrides):
    """A tiny model; one channel at the input of each unit is made `outlier` times larger, and the
    weights that read it smaller."""
    model = tiny.model(family, jax.random.key(0), **overrides)
    scale = jnp.ones(32).at[3].set(outlier)
    return map_blocks(
        model, lambda _, b: fold_scale(fold_scale(b, "attn_in", scale), "ffn_in", scale)
    )


def numbers(result, block=0):
    return next(r.metrics for r in result.rows if r.block == block and r.linear is None)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "olmo2"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothing_leaves_the_logits_unchanged(family, alpha, calib):
    model, tokens = model_of(family, outlier=50.0), tiny.tokens(jax.random.key(2))
    result = SmoothQuant(alpha, EVERY_SITE)(model, calib)
    expected = logits_of(model, tokens)
    off = jnp.max(jnp.abs(logits_of(result.model, tokens) - expected))
    assert off < 1e-5 * jnp.ptp(expected)
    assert not np.allclose(result.model.blocks[0].ffn.gate.w, model.blocks[0].ffn.gate.w, rtol=0.1)


def test_alpha_says_how_much_of_the_range_moves_into_the_weights(calib):
    model = model_of(outlier=50.0)
    for alpha in (0.0, 0.5, 1.0):
        row = numbers(SmoothQuant(alpha)(model, calib))
        for site in ("attn_in", "ffn_in"):
            x, x_after = row[f"{site}_amax_before"], row[f"{site}_amax_after"]
            w_after = row[f"{site}_weight_amax_after"]
            if alpha == 0:  # every weight channel reaches to 1
                assert w_after == pytest.approx(1, rel=1e-4) and x_after < x
            elif alpha == 1:  # every activation channel reaches to 1
                assert x_after == pytest.approx(1, rel=1e-4) and w_after > 1
            else:  # both reach to the largest √(amax|x|·amax|W|) of a channel
                assert x_after == pytest.approx(w_after, rel=1e-4) and x_after < x / 20


def test_the_range_reported_is_what_the_smoothed_model_has(calib):
    once = SmoothQuant(0.5, EVERY_SITE)(model_of(outlier=50.0), calib)
    again = SmoothQuant(0.5, EVERY_SITE)(once.model, calib)
    for site in EVERY_SITE:
        for block in range(2):
            found = numbers(again, block)[f"{site}_amax_before"]
            assert found == pytest.approx(numbers(once, block)[f"{site}_amax_after"], rel=1e-4)


def test_a_second_smoothing_at_one_half_has_nothing_left_to_do(calib):
    once = SmoothQuant()(model_of(outlier=50.0), calib)
    twice = SmoothQuant()(once.model, calib)
    for name, leaf in named_leaves(once.model).items():
        np.testing.assert_allclose(named_leaves(twice.model)[name], leaf, rtol=1e-3, atol=1e-6)


def test_eight_bit_activations_with_an_outlier_come_closer_when_smoothed(calib):
    model, tokens = model_of(outlier=100.0), tiny.tokens(jax.random.key(2))
    expected, errors = logits_of(model, tokens), []
    rtn = RTN(QuantSpec(8), act=QuantSpec(8, granularity="token", dynamic=True))
    for start in (model, SmoothQuant()(model, calib).model):
        quantized = rtn(start, calib).model
        errors.append(float(jnp.sum((logits_of(quantized, tokens) - expected) ** 2)))
    assert errors[1] < 0.5 * errors[0]


def test_heads_that_share_a_value_head_get_one_scale(calib):
    model = model_of(num_attention_heads=4, num_key_value_heads=1)
    result = SmoothQuant(0.5, ("attn_out",))(model, calib)
    ratio = result.model.blocks[0].attn.o.w / model.blocks[0].attn.o.w
    heads = np.asarray(ratio).reshape(4, 8, -1)
    np.testing.assert_allclose(heads, np.broadcast_to(heads[:1, :, :1], heads.shape), rtol=1e-4)
    assert np.ptp(heads) > 0.1


def test_how_the_text_is_cut_into_batches_does_not_matter(calib):
    split = dataclasses.replace(calib, batch=3)
    first, second = (SmoothQuant()(model_of(), c).model for c in (calib, split))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_stored_dtypes_are_kept(calib):
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model_of())
    after = SmoothQuant(sites=EVERY_SITE)(model, calib).model
    assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(alpha=1.5), "alpha=1.5"),
        (dict(alpha=-0.1), "alpha=-0.1"),
        (dict(sites=()), "sites"),
        (dict(sites=("attn_in", "attn_in")), "twice"),
        (dict(sites=("ffn_inn",)), "ffn_inn"),
        (dict(sites=("query",)), "query"),
    ],
)
def test_settings_that_fit_no_model_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        SmoothQuant(**settings).check(model_of())


def test_what_cannot_absorb_a_scale_is_refused_with_block_and_reason():
    model = model_of()
    first, second = model.blocks

    def refuses(block, *words, cfg=SmoothQuant(sites=EVERY_SITE)):
        with pytest.raises(ValueError) as caught:
            cfg.check(model.replace(blocks=(first, block)))
        assert all(word in str(caught.value) for word in ("block 1", *words))

    quantized = RTN()(model).model.blocks[1]
    refuses(quantized, "already quantized to 4 bits")
    refuses(second.replace(ffn_norm=None), "ffn_in", "nothing before it")
    rotated = Site(transforms=(Hadamard(8),))
    for there, site in [("ffn_in", "ffn_in"), ("v_cache", "attn_out"), ("up_in", "ffn_in")]:
        refuses(second.replace(sites={there: rotated}), site, "transforms", "Hadamard")
    grid = QuantSpec(8, granularity="tensor")
    static = Site(ActQuantizer(grid, jnp.float32(0.1)))
    refuses(second.replace(sites={"ffn_mid": static}), "ffn_mid", "static")
    SmoothQuant().check(model.replace(blocks=(first, second.replace(sites={"ffn_mid": rotated}))))


def test_activations_that_overflow_name_the_block_and_the_site(calib):
    model = model_of()
    huge = model.blocks[1].replace(
        attn_norm=model.blocks[1].attn_norm.replace(weight=jnp.full(32, 3e38))
    )
    with pytest.raises(ValueError, match=r"block 1, site attn_in.*infinity"):
        SmoothQuant()(model.replace(blocks=(model.blocks[0], huge)), calib)


def test_every_scaled_site_has_a_producer_in_the_anatomy():
    parts = anatomy(model_of().blocks[0]).sites
    assert all(get_at(model_of().blocks[0], parts[site].producer) for site in EVERY_SITE)
