import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.activation import QActivation
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.site import ActQuantizer, Site
from jaxcomp.core.transforms import Hadamard
from jaxcomp.kv.cache import PackedRows, append, read_rows
from jaxcomp.models.decoder import empty_cache, empty_layer, extend, forward, map_blocks
from jaxcomp.models.families import FAMILIES
from jaxcomp.models.fold import rotate_keys
from jaxcomp.models.generate import generate_tokens
from jaxcomp.models.sizes import cache_sizes
from tests import tiny

logits_of, extend_jit = jax.jit(forward), jax.jit(extend)


def head(bits, symmetric=False):
    return QuantSpec(bits, granularity="head", symmetric=symmetric, dynamic=True)


def per_channel(block, bits=4, symmetric=False):
    """A static grid with a range for each channel of each key head, narrower than the keys."""
    shape = (block.attn.n_kv_heads, block.attn.head_dim)
    scale = jax.random.uniform(jax.random.key(4), shape, minval=1.5, maxval=3.0) / 2**bits
    zero = None if symmetric else jax.random.randint(jax.random.key(5), shape, -2, 3, jnp.int8)
    spec = QuantSpec(bits, granularity="channel", symmetric=symmetric)
    return ActQuantizer(spec, scale, zero)


def quantized(model, k=None, v=None):
    """The model with quantizers at the caches' sites: a quantizer, or one made for each block."""

    def change(_, block):
        made = {"k_cache": k(block) if callable(k) else k, "v_cache": v}
        sites = {
            n: dataclasses.replace(block.sites.get(n, Site()), quantizer=q) for n, q in made.items()
        }
        return block.replace(sites=block.sites | sites)

    return map_blocks(model, change)


def through_cache(model, tokens, pieces, valid=None):
    """Logits of the tokens fed to a cache piece by piece, the last ones one at a time."""
    time = tokens.shape[1]
    cache, out, start = empty_cache(model, len(tokens), time + 3, horizon=time), [], 0
    for n in (*pieces, *[1] * (time - sum(pieces))):
        part = slice(start, start + n)
        mask = None if valid is None else valid[:, part]
        logits, cache = extend_jit(model, tokens[:, part], cache, mask)
        out.append(logits)
        start += n
    return jnp.concatenate(out, axis=1), cache


def assert_same(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "bits", "symmetric"),
    [(f, 4, False) for f in FAMILIES]
    + [("mistral", b, s) for b in (2, 3, 8) for s in (True, False)],
)
def test_a_packed_cache_gives_the_logits_of_the_simulation(family, bits, symmetric):
    quantizer = ActQuantizer(head(bits, symmetric), clip=jnp.array([0.9, 0.8]))
    model = quantized(tiny.model(family, jax.random.key(0)), quantizer, quantizer)
    tokens = tiny.tokens(jax.random.key(1), 2, 12)
    found, _ = through_cache(model, tokens, (11,))
    assert_same(found, logits_of(model, tokens))


def test_padding_on_the_left_changes_nothing():
    quantizer = ActQuantizer(head(4))
    model = quantized(tiny.model("mistral", jax.random.key(0)), quantizer, quantizer)
    tokens = tiny.tokens(jax.random.key(1), 2, 14)
    valid = jnp.ones(tokens.shape, bool).at[1, :5].set(False)
    found, _ = through_cache(model, tokens, (13,), valid)
    expected = logits_of(model, tokens, valid)
    assert_same(found[valid], expected[valid])


@pytest.mark.parametrize(("family", "symmetric"), [("mistral", True), ("qwen2", False)])
def test_keys_on_a_static_grid_per_channel_beside_plain_values(family, symmetric):
    make = lambda block: per_channel(block, symmetric=symmetric)  # noqa: E731
    model = quantized(tiny.model(family, jax.random.key(0)), k=make)
    tokens = tiny.tokens(jax.random.key(1), 2, 12)
    found, cache = through_cache(model, tokens, (11,))
    assert_same(found, logits_of(model, tokens))
    layer = cache.layers[0]
    assert layer.k.scale is None and layer.k.zero_point is None
    assert isinstance(layer.v, jax.Array) and layer.v.dtype == jnp.float32


def test_keys_and_values_of_other_widths_after_a_rotation():
    model = tiny.model("mistral", jax.random.key(0))
    model = map_blocks(model, lambda _, b: rotate_keys(b, Hadamard(16)))
    static = ActQuantizer(QuantSpec(8, granularity="tensor"), jnp.float32(0.02))
    model = quantized(model, ActQuantizer(head(3)), static)
    tokens = tiny.tokens(jax.random.key(1), 2, 12)
    found, cache = through_cache(model, tokens, (11,))
    assert_same(found, logits_of(model, tokens))
    assert (cache.layers[1].k.bits, cache.layers[1].v.bits) == (3, 8)


def test_generation_through_a_packed_cache_is_that_of_the_simulation():
    quantizer = ActQuantizer(head(4))
    model = quantized(tiny.model("mistral", jax.random.key(0)), quantizer, quantizer)
    prompts = np.asarray(tiny.tokens(jax.random.key(2), 2, 9))
    found = generate_tokens(model, prompts, 5).tokens
    ids = prompts
    for _ in range(5):
        padded = np.pad(ids, ((0, 0), (0, 14 - ids.shape[1])))
        next_ids = logits_of(model, jnp.asarray(padded))[:, ids.shape[1] - 1].argmax(-1)
        ids = np.concatenate([ids, next_ids[:, None]], axis=1)
    np.testing.assert_array_equal(found, ids[:, 9:])


def test_what_is_read_is_what_was_appended_and_other_slots_are_untouched():
    block = tiny.model("qwen3", jax.random.key(0)).blocks[0]
    quantizer = ActQuantizer(head(3))
    block = block.replace(sites={n: Site(quantizer) for n in ("k_cache", "v_cache")})
    layer = empty_layer(block, 2, 7, "float32")
    codes = jax.random.randint(jax.random.key(1), (2, 3, 2, 16), -4, 4, jnp.int8)
    scale = jax.random.uniform(jax.random.key(2), (2, 3, 2, 1))
    new = QActivation(codes, scale, jnp.ones((2, 3, 2, 1), jnp.int8), 3)
    layer = append(layer, new, new, jnp.int32(2))
    found = np.asarray(read_rows(layer.k, new))
    expected = ((np.asarray(codes) - 1.0) * scale).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(found[:, :, 2:5], expected, rtol=1e-6)
    assert not found[:, :, :2].any() and not found[:, :, 5:].any()
    assert layer.k.packed.shape == (2, 2, 7, 6) and layer.k.packed.dtype == jnp.uint8


def test_one_range_for_all_tokens_of_a_call_is_refused():
    spec = QuantSpec(8, granularity="tensor", dynamic=True)
    model = quantized(tiny.model("llama", jax.random.key(0)), v=ActQuantizer(spec))
    with pytest.raises(ValueError, match=r"dynamic over all tokens.*granularity='head'"):
        empty_cache(model, 1, 8)
    assert not isinstance(empty_cache(quantized(model), 1, 8).layers[0].v, PackedRows)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_the_cache_takes_the_bytes_of_its_format(bits, symmetric):
    model = quantized(tiny.model("qwen3", jax.random.key(0)), ActQuantizer(head(bits, symmetric)))
    rows = 2 * 7 * 2  # blocks, tokens, key heads
    grid = 4 if symmetric else 5
    packed = rows * (-(-16 * bits // 8) + grid)
    expected = packed + rows * 16 * 4
    size = cache_sizes(model, 7)
    assert size["cache_bytes"] == expected
    assert size["bits_per_cached_value"] == 8 * expected / (2 * rows * 16)
    assert sum(a.nbytes for a in jax.tree.leaves(empty_cache(model, 1, 7).layers)) == expected
    static = quantized(model, k=lambda b: per_channel(b, bits))
    assert cache_sizes(static, 7)["cache_bytes"] == expected - rows * grid
