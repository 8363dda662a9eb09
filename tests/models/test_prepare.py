"""A model on kernels and the same model on references, whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.quantize import QTensor, QuantSpec
from jaxcomp.core.tree import get_at
from jaxcomp.methods import RTN
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import empty_cache, extend, forward
from jaxcomp.models.execution import prepare, use_integer
from jaxcomp.models.families import FAMILIES
from pallas_kernels import DenseWeight, Weight, use
from pallas_kernels.native import library
from tests import tiny

ACT = QuantSpec(8, granularity="token", dynamic=True)
KV4 = QuantSpec(4, granularity="head", symmetric=False, dynamic=True)
METHODS = {
    "dense": None,
    "w4": RTN(QuantSpec(4, group_size=8)),
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
    [*(("llama", m) for m in METHODS), ("gemma3_text", "w4a4kv4"), ("qwen2", "w8a8")],
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


@pytest.mark.skipif(not library.available(), reason="no native library")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_block_takes_the_form_of_the_chip(family):
    for method, kind in (("dense", DenseWeight), ("w8a8", Weight)):
        prepared = prepare(made(family, method))
        for block in prepared.blocks:
            for path in anatomy(block).linears:
                w = get_at(block, path).w
                assert isinstance(w, kind) and (kind is DenseWeight or w.layout == "native")
        assert isinstance(prepared.lm_head.w, DenseWeight)


def test_a_prepared_model_is_half_as_large_as_its_codes_in_bytes_and_shares_the_embedding():
    model = made("llama", "w4")
    prepared = prepare(model)
    for block, before in zip(prepared.blocks, model.blocks, strict=True):
        for path in anatomy(block).linears:
            w, q = get_at(block, path).w, get_at(before, path).w
            assert isinstance(q, QTensor) and w.shape == q.shape
    if model.lm_head is None:
        assert prepared.lm_head.w.array is prepared.embed.weight


def test_a_prepared_model_evaluates_like_the_original():
    model = made("llama", "w4")
    tokens = tiny.tokens(jax.random.key(1), 2, 12)
    expected = jax.jit(forward)(model, tokens)
    np.testing.assert_allclose(
        jax.jit(forward)(prepare(model), tokens), expected, atol=1e-4 * np.ptp(expected)
    )
