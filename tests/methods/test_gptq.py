import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.calibrate import Calibration
from jaxcomp.core.linear import Linear
from jaxcomp.core.quantize import QuantSpec, dequantize, fake_quantize
from jaxcomp.core.scheme import Override
from jaxcomp.core.site import ActQuantizer, Site
from jaxcomp.core.transforms import Kron
from jaxcomp.core.tree import get_at
from jaxcomp.methods import GPTQ, RTN
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import block_forward
from jaxcomp.models.fold import insert_online
from jaxcomp.models.layers import embed_tokens
from jaxcomp.solvers.orthogonal import random_orthogonal
from tests import tiny

W3 = QuantSpec(bits=3)
TOKEN4 = QuantSpec(4, granularity="token", dynamic=True)


@pytest.fixture(scope="module")
def model():
    made = tiny.model("qwen2", jax.random.key(0), num_hidden_layers=1)
    loud = jnp.ones(32).at[jnp.array([3, 17])].set(20.0)  # coarse steps for all other channels
    block = made.blocks[0]
    norms = {name: getattr(block, name) for name in ("attn_norm", "ffn_norm")}
    louder = {name: norm.replace(weight=norm.weight * loud) for name, norm in norms.items()}
    return made.replace(blocks=(block.replace(**louder),))


@pytest.fixture(scope="module")
def calib():
    return Calibration(np.asarray(tiny.tokens(jax.random.key(1), 32, 32)), batch=16)


def solve(model, calib, on):
    return GPTQ(W3, quantized_activations=on)(model, calib)


def site_input(model, tokens, site):
    """What arrives at a site of the first block, `[tokens, channels]`."""
    x, seen = embed_tokens(model.embed, jnp.asarray(tokens), "float32"), {}
    tap = lambda name, h: seen.setdefault(name, h)  # noqa: E731
    block_forward(model.blocks[0], x, plain_context(*x.shape[:2]), tap)
    return seen[site].reshape(-1, seen[site].shape[-1])


def test_solving_for_quantized_activations_pays_behind_loud_channels(model, calib):
    rounded = RTN(weight=None, act=TOKEN4)(model).model
    x = fake_quantize(site_input(model, tiny.tokens(jax.random.key(9), 16, 32), "attn_in"), TOKEN4)

    def error(on):
        """Of what reads the first site, where both see the same quantized activation."""
        solved, total = solve(rounded, calib, on).model.blocks[0], 0.0
        for path in ("attn.q", "attn.k", "attn.v"):
            change = dequantize(get_at(solved, path).w) - get_at(model.blocks[0], path).w
            total += float(jnp.sum((x @ change) ** 2))
        return total

    assert error(True) < 0.98 * error(False)  # 2 to 9 % over six seeds


def test_quantizers_are_off_during_calibration_and_on_afterwards(model, calib):
    plain, rounded = model, RTN(weight=None, act=TOKEN4)(model).model
    off, on, without = (
        solve(rounded, calib, False),
        solve(rounded, calib, True),
        solve(plain, calib, False),
    )
    assert [r.metrics for r in off.rows] == [r.metrics for r in without.rows]
    assert [r.metrics for r in off.rows] != [r.metrics for r in on.rows]
    sites = off.model.blocks[0].sites
    assert sites.keys() == rounded.blocks[0].sites.keys()
    assert all(site.quantizer.spec == TOKEN4 for site in sites.values())


def test_hessians_are_taken_behind_the_transforms_of_a_site(model, calib):
    turn = Kron(right=random_orthogonal(jax.random.key(5), 48))
    turned = model.replace(blocks=(insert_online(model.blocks[0], "ffn_mid", turn, turn),))
    solved = solve(turned, calib, False)
    (row,) = [r.metrics for r in solved.rows if r.linear == "ffn.down"]
    assert row["error_after"] < row["error_before"]
    assert solved.model.blocks[0].sites["ffn_mid"].transforms == (turn,)
    seen = site_input(turned, calib.tokens, "ffn_mid") @ turn.right
    w = turned.blocks[0].ffn.down.w
    error = seen @ (dequantize(solved.model.blocks[0].ffn.down.w) - w)
    found = float(jnp.sum(error**2) / jnp.sum((seen @ w) ** 2))
    assert found < 1.5 * row["error_after"]  # the earlier sites were not quantized here


def test_a_linear_with_a_site_of_its_own_is_solved_for_what_it_sees(model, calib):
    silence = jnp.ones(32).at[:16].set(0.0)
    half = Kron(right=jnp.diag(silence))  # the gate reads half of the channels only
    block = model.blocks[0].replace(sites={"gate_in": Site(transforms=(half,))})
    solved = solve(model.replace(blocks=(block,)), calib, False).model.blocks[0]
    assert not np.asarray(dequantize(solved.ffn.gate.w))[:16].any()  # dead channels round to 0
    assert np.asarray(dequantize(solved.ffn.up.w))[:16].any()
    own = Site(ActQuantizer(QuantSpec(2, granularity="token", dynamic=True)))
    coarse = model.replace(blocks=(model.blocks[0].replace(sites={"q_in": own}),))
    on, off = (solve(coarse, calib, on).model.blocks[0].attn for on in (True, False))
    assert not np.array_equal(on.q.w.packed, off.q.w.packed)
    assert np.array_equal(on.k.w.packed, off.k.w.packed)


@pytest.mark.parametrize("sequential", [True, False])
def test_an_exception_may_be_for_one_of_the_linears_at_a_site(model, calib, sequential):
    rule = Override(linears=("attn.v",), weight_bits=8)
    mixed = GPTQ(W3, overrides=(rule,), sequential=sequential)(model, calib).model.blocks[0]
    wide = GPTQ(dataclasses.replace(W3, bits=8), sequential=sequential)(model, calib).model
    assert [get_at(mixed, p).w.bits for p in ("attn.q", "attn.k", "attn.v")] == [3, 3, 8]
    # The linears at a site see the same Hessian, so v comes out as where all have eight bits.
    np.testing.assert_array_equal(mixed.attn.v.w.packed, wide.blocks[0].attn.v.w.packed)


def test_exceptions_hold_where_they_say(model, calib):
    rules = (
        Override(sites=("attn_in",), weight_bits=8),
        Override(sites=("ffn_mid",), blocks=(-1,), weight_bits=16),
    )
    result = GPTQ(W3, overrides=rules)(model, calib)
    block, rows = result.model.blocks[0], {r.linear: r.metrics for r in result.rows}
    assert [get_at(block, p).w.bits for p in ("attn.q", "attn.o", "ffn.up")] == [8, 3, 3]
    assert rows["attn.q"]["bits"] == 8
    assert rows["ffn.down"] == {"skipped": "an override leaves it at 16 bits"}
    np.testing.assert_array_equal(block.ffn.down.w, model.blocks[0].ffn.down.w)
    assert isinstance(block.ffn.down, Linear)
    with pytest.raises(ValueError, match=r"no block has a linear 'attn.qkv'; there is: attn.q, "):
        GPTQ(overrides=(Override(linears=("attn.qkv",), weight_bits=8),)).check(model)
    with pytest.raises(ValueError, match="block 7, and the model has 1 blocks"):
        GPTQ(overrides=(Override(blocks=(7,), weight_bits=8),)).check(model)
