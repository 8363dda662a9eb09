"""A model on kernels and the same model on references, whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxcomp.core.linear import Linear, linear
from jaxcomp.core.quantize import QuantSpec, quantize
from jaxcomp.core.scheme import Override
from jaxcomp.methods import RTN
from jaxcomp.models.decoder import empty_cache, extend, forward
from jaxcomp.models.execution import use_integer
from jaxcomp.models.families import FAMILIES
from jaxcomp.models.prepare import join, prepare
from pallas_kernels import DenseWeight, Weight, use
from pallas_kernels.native import library
from tests import tiny

ACT = QuantSpec(8, granularity="token", dynamic=True)
KV4 = QuantSpec(4, granularity="head", symmetric=False, dynamic=True)
METHODS = {
    "dense": None,
    "w4": RTN(QuantSpec(4, group_size=8)),
    "w4 channel": RTN(QuantSpec(4)),
    "w3 asymmetric": RTN(QuantSpec(3, group_size=8, symmetric=False)),
    "w8a8": RTN(QuantSpec(8), act=ACT),
    "w4a4kv4": RTN(QuantSpec(4), act=QuantSpec(4, granularity="token", dynamic=True), kv=KV4),
    "w8a8 shifted": RTN(
        QuantSpec(8), act=QuantSpec(8, granularity="token", symmetric=False, dynamic=True)
    ),
}


def made(family, method):
    model = tiny.model(family, jax.random.key(0))
    if METHODS[method] is None:
        return model
    model = METHODS[method](model).model
    return use_integer(model) if METHODS[method].act else model


def steps(model):
    """Logits of a prompt padded on the left and of three tokens after it, one by one."""
    tokens = tiny.tokens(jax.random.key(1), 2, 12)
    valid = jnp.ones((2, 9), bool).at[1, :4].set(False)
    cache, out = empty_cache(model, 2, 16), []
    call = jax.jit(extend, static_argnames=("last_only", "left_padded", "fresh"))
    for part, mask in (
        (tokens[:, :9], valid),
        *((tokens[:, i : i + 1], None) for i in (9, 10, 11)),
    ):
        y, cache = call(model, part, cache, mask, left_padded=True, fresh=mask is not None)
        out.append(np.array(y))
    out[0][1, :4] = 0  # padding
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(("llama", m) for m in METHODS if m != "w4 channel"),
        ("gemma3_text", "w4a4kv4"),
        ("qwen2", "w8a8"),
    ],
)
def test_kernels_and_references_give_the_same_logits(family, method):
    model = made(family, method)
    prepared = prepare(model)
    found = steps(prepared)
    with use(reference=True):
        expected = steps(model)
        # The prepared forms mean the same to the references.
        again = steps(prepared)
    np.testing.assert_allclose(again, expected, atol=1e-4 * np.ptp(expected))
    # A code at a tie may round the other way after sums in another order; with 4 bits that shows.
    off = np.abs(found - expected) / np.ptp(expected)
    act = METHODS[method] and METHODS[method].act
    limit = 1e-4 if not act else 2e-2 if act.bits == 8 else 0.2
    assert np.median(off) < 1e-5 and off.max() < limit


@pytest.mark.parametrize("method", ["w4 channel", "w4a4kv4"])
def test_a_model_on_the_kernels_of_a_tpu_interpreted(method):
    model = made("llama", method)
    model = model.replace(blocks=model.blocks[:1])
    with use(reference=True):
        expected = steps(model)
    with use("v6e", interpret=pltpu.InterpretParams()):
        prepared = prepare(model)
        assert prepared.blocks[0].attn.qkv.w.layout == "nibbles"
        found = steps(prepared)
    off = np.abs(found - expected) / np.ptp(expected)
    assert np.median(off) < 1e-3 and off.max() < (0.2 if METHODS[method].act else 1e-2)


@pytest.mark.skipif(not library.available(), reason="no native library")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_block_takes_the_form_of_the_chip(family):
    for method, kind in (("dense", DenseWeight), ("w8a8", Weight)):
        prepared = prepare(made(family, method))
        for block in prepared.blocks:
            attn, ffn = block.attn, block.ffn
            assert attn.q is attn.k is attn.v is ffn.gate is ffn.up is None
            for p in (attn.qkv, attn.o, ffn.gate_up, ffn.down):
                assert isinstance(p.w, kind) and (kind is DenseWeight or p.w.layout == "native")
        assert isinstance(prepared.lm_head.w, DenseWeight)
        again = prepare(prepared)
        assert jax.tree.structure(again) == jax.tree.structure(prepared)


def test_a_tied_head_shares_the_embedding():
    model = tiny.model("gemma3_text", jax.random.key(0))
    assert model.lm_head is None
    prepared = prepare(model)
    assert prepared.lm_head.w is prepared.embed.weight


def test_linears_that_differ_stay_apart():
    rng = np.random.default_rng(0)
    w = [jnp.asarray(rng.standard_normal((16, n)), jnp.float32) for n in (8, 4, 4)]
    four, three = (lambda a, b=b: Linear(quantize(a, QuantSpec(b, group_size=8))) for b in (4, 3))
    assert join([four(w[0]), three(w[1])]) is None
    assert join([four(w[0]), Linear(w[1])]) is None
    assert join([Linear(w[0]), Linear(w[1].astype(jnp.bfloat16))]) is None
    bias = jnp.arange(4.0)
    for make in (four, Linear):
        parts = [make(w[0]), make(w[1]).replace(b=bias), make(w[2])]
        x = jnp.asarray(rng.standard_normal((3, 16)), jnp.float32)
        apart = jnp.concatenate([linear(p, x) for p in parts], axis=-1)
        np.testing.assert_allclose(linear(join(parts), x), apart, atol=1e-5)


def test_widths_that_differ_in_a_block_and_inputs_of_their_own_are_multiplied_apart():
    model = tiny.model("llama", jax.random.key(0))
    override = Override(linears=("attn.v",), weight_bits=8)
    model = RTN(QuantSpec(4), act=ACT, overrides=(override,))(model).model
    prepared = prepare(use_integer(model))
    block = prepared.blocks[0]
    assert block.attn.qkv is None and block.ffn.gate is None
    assert (block.attn.q.w.bits, block.attn.v.w.bits) == (4, 8)
    found = steps(prepared)
    with use(reference=True):
        expected = steps(use_integer(model))
    assert np.median(np.abs(found - expected)) < 1e-5 * np.ptp(expected)


def test_a_prepared_model_evaluates_like_the_original():
    model = made("llama", "w4")
    tokens = tiny.tokens(jax.random.key(1), 2, 12)
    expected = jax.jit(forward)(model, tokens)
    np.testing.assert_allclose(
        jax.jit(forward)(prepare(model), tokens), expected, atol=1e-4 * np.ptp(expected)
    )
