import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.activation import as_float
from jaxcomp.core.linear import linear
from jaxcomp.core.quantize import QuantSpec, dequantize, quantize
from jaxcomp.core.site import ActQuantizer, Site, enter_site
from jaxcomp.core.store import save_tree
from jaxcomp.core.transforms import Diag
from jaxcomp.core.tree import get_at, replace_at
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import block_forward, block_struct, empty_cache, extend, map_blocks
from jaxcomp.models.execution import integer_block, integer_sites, use_integer
from jaxcomp.models.families import FAMILIES
from tests import tiny

KV4 = QuantSpec(4, granularity="head", symmetric=False, dynamic=True)
ACT8 = QuantSpec(8, granularity="token", dynamic=True)
step = jax.jit(block_forward)


def compressed(model, weight=QuantSpec(8), act=ACT8, kv=None):
    """Weights, inputs of the linears and caches rounded to grids; no step of a recipe needed."""

    def change(_, block):
        for path in anatomy(block).linears:
            block = replace_at(block, f"{path}.w", quantize(get_at(block, path).w, weight))
        grids = dict.fromkeys(anatomy(block).sites, act) | {"k_cache": kv, "v_cache": kv}
        sites = {n: Site(ActQuantizer(s)) for n, s in grids.items() if s is not None}
        return block.replace(sites=sites)

    return map_blocks(model, change)


def hidden(batch=2, time=9):
    return jax.random.normal(jax.random.key(3), (batch, time, 32))


def assert_agree(simulated, integer):
    """Block by block on the same input. Most tokens agree to float32; an activation between two
    codes may go either way, which moves its token, and those that see its key, by a step."""
    x = hidden()
    for a, b in zip(simulated.blocks, integer.blocks, strict=True):
        ctx = plain_context(*x.shape[:2])
        expected = np.asarray(step(a, x, ctx))
        off = np.abs(np.asarray(step(b, x, ctx)) - expected).max(-1) / np.ptp(expected)
        assert np.median(off) <= 1e-5 and off.max() <= 0.1
        x = expected


GRIDS = [  # bits of weights and activations; group of the weight; both symmetric, or neither
    (family, bits, (None, 8)[(i + j) % 2], (True, False)[(i + j // 2) % 2])
    for i, family in enumerate(FAMILIES)
    for j, bits in enumerate([(4, 4), (8, 8), (4, 8)])
]


@pytest.mark.parametrize(("family", "bits", "group", "symmetric"), GRIDS)
def test_integer_execution_is_the_simulation_to_float32(family, bits, group, symmetric):
    weight = QuantSpec(bits[0], group_size=group, symmetric=symmetric)
    act = QuantSpec(bits[1], granularity="token", symmetric=symmetric, dynamic=True)
    model = compressed(tiny.model(family, jax.random.key(0)), weight, act, KV4)
    assert_agree(model, use_integer(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_gives_the_same_for_the_same_activation(family):
    block = compressed(tiny.model(family, jax.random.key(0)), QuantSpec(4)).blocks[0]
    raw = {}

    def tap(name, h):
        raw[name] = h
        return enter_site(block.sites.get(name, Site()), h)

    block_forward(block, hidden(), plain_context(2, 9), tap)
    for path, name in anatomy(block).linears.items():
        p, x = get_at(block, path), enter_site(block.sites[name], raw[name])
        codes = enter_site(integer_block(block).sites[name], raw[name])
        np.testing.assert_array_equal(x, as_float(codes))
        expected = np.asarray(linear(p, x))
        np.testing.assert_allclose(linear(p, codes), expected, atol=1e-5 * np.ptp(expected))


def test_decoding_in_integers_through_a_packed_cache_is_the_simulated_one():
    model = compressed(tiny.model("mistral", jax.random.key(0)), QuantSpec(4), ACT8, KV4)
    tokens = tiny.tokens(jax.random.key(1), 2, 10)
    logits = []
    for m in (model, use_integer(model)):
        cache, out = empty_cache(m, 2, 12), []
        for part in (tokens[:, :9], tokens[:, 9:]):
            y, cache = jax.jit(extend)(m, part, cache)
            out.append(y)
        logits.append(jnp.concatenate(out, axis=1))
    np.testing.assert_allclose(*logits, atol=1e-3)


def test_static_grids_and_long_inputs_are_tiled_alike(monkeypatch):
    monkeypatch.setattr("jaxcomp.models.ffn.TOKEN_TILE", 4)
    model = compressed(tiny.model("llama", jax.random.key(0)))
    spec = QuantSpec(8, granularity="tensor", symmetric=False)
    static = Site(ActQuantizer(spec, jnp.float32(0.03), jnp.int8(5)))
    model = map_blocks(model, lambda _, b: b.replace(sites=dict.fromkeys(anatomy(b).sites, static)))
    integer = use_integer(model)
    assert integer.blocks[0].sites["ffn_in"].quantizer.integer
    x = hidden()[:, :7]
    for a, b in zip(model.blocks, integer.blocks, strict=True):
        ctx = plain_context(*x.shape[:2])
        expected = block_forward(a, x, ctx)
        np.testing.assert_allclose(block_forward(b, x, ctx), expected, atol=2e-3)


def with_sites(model, **sites):
    return map_blocks(model, lambda _, b: b.replace(sites=b.sites | sites))


def test_consumers_with_quantizers_of_their_own_run_in_integers():
    clipped = Site(ActQuantizer(ACT8, clip=jnp.array([0.8, 0.9])))
    model = with_sites(
        compressed(tiny.model("qwen2", jax.random.key(0))),
        attn_in=Site(None, (Diag(jnp.linspace(0.5, 2, 32)),)),
        q_in=clipped,
        k_in=clipped,
        up_in=clipped,
    )
    block = model.blocks[0]
    assert integer_sites(block) == ("q_in", "k_in", "attn_out", "ffn_in", "up_in", "ffn_mid")
    assert_agree(model, use_integer(model))


def test_only_the_inputs_of_linears_are_switched_and_blocks_stay_behind_their_handles(tmp_path):
    model = compressed(tiny.model("qwen3", jax.random.key(0)), kv=KV4)
    stored = map_blocks(model, lambda _, b: b, lambda i, b: save_tree(tmp_path / f"{i}", b))
    switched = use_integer(stored)
    for block in (block_struct(switched.blocks[1]), switched.blocks[1].load()):
        on = {name for name, site in block.sites.items() if site.quantizer.integer}
        assert on == {"attn_in", "attn_out", "ffn_in", "ffn_mid"}
    assert_agree(model, switched.replace(blocks=tuple(b.load() for b in switched.blocks)))


def test_what_cannot_run_in_integers_is_refused_with_its_place():
    plain = tiny.model("llama", jax.random.key(0))
    with pytest.raises(ValueError, match="no linear of the model reads a quantized activation"):
        use_integer(plain)
    model = compressed(plain)
    broken = model.blocks[1]
    broken = replace_at(broken, "attn.o.w", dequantize(broken.attn.o.w))
    with pytest.raises(ValueError, match=r"block 1, attn\.o: its input attn_out .* is dense"):
        use_integer(model.replace(blocks=(model.blocks[0], broken)))
    static = ActQuantizer(QuantSpec(8, granularity="channel"), jnp.ones(32))
    with pytest.raises(ValueError, match=r"block 0, ffn\.gate: the grid of ffn_in is int8 per-ch"):
        use_integer(with_sites(model, ffn_in=Site(static)))
    own = Site(None, (Diag(jnp.ones(32)),))
    with pytest.raises(ValueError, match=r"attn\.v: what v_in transforms after attn_in"):
        use_integer(with_sites(model, v_in=own))


def test_a_linear_without_quantized_input_is_left_alone():
    model = compressed(tiny.model("llama", jax.random.key(0)))
    part = {name: site for name, site in model.blocks[0].sites.items() if name != "ffn_mid"}
    model = map_blocks(model, lambda _, b: dataclasses.replace(b, sites=part))
    assert "ffn_mid" not in use_integer(model).blocks[0].sites
    assert_agree(model, use_integer(model))
