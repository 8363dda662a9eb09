import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.linear import Linear
from jaxcomp.core.quantize import QuantSpec, quantize
from jaxcomp.core.site import Site
from jaxcomp.core.transforms import Diag, Hadamard, Kron, inverse_transpose
from jaxcomp.core.tree import get_at, named_leaves, replace_at
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import block_forward
from jaxcomp.models.fold import (
    append_transform,
    fold_norm,
    fold_scale,
    insert_online,
    rotate_keys,
    rotate_values,
    scale_output,
)
from jaxcomp.models.layers import RMSNorm
from tests import tiny

WIDTHS = {"attn_in": 32, "attn_out": 32, "ffn_in": 32, "ffn_mid": 48}
CTX = plain_context(2, 7)
forward = jax.jit(lambda block, x: block_forward(block, x, CTX))


def block_of(name):
    """Grouped heads with biases; norms on queries and keys; norms stored as 1 + w; norms behind
    the units as well; a head that turns in part."""
    family = {
        "biases": "qwen2",
        "head norms": "qwen3",
        "offset": "qwen2",
        "sandwich": "gemma3_text",
        "partial": "phi3",
    }[name]
    block = tiny.model(family, jax.random.key(0), head_dim=8, num_hidden_layers=1).blocks[0]
    if name != "offset":
        return block
    norm = lambda p: RMSNorm(p.weight - 1, p.eps, offset=1)  # noqa: E731
    return block.replace(attn_norm=norm(block.attn_norm), ffn_norm=norm(block.ffn_norm))


every_block = pytest.mark.parametrize(
    "name", ["biases", "head norms", "offset", "sandwich", "partial"]
)
every_site = pytest.mark.parametrize("site", WIDTHS)


def matrix(n, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.eye(n) + rng.normal(size=(n, n)) / (3 * n**0.5), jnp.float32)


def scale_for(site, seed=1):
    """Positive factors; alike over the heads that share a value head."""
    s = np.exp(0.5 * np.random.default_rng(seed).normal(size=WIDTHS[site])).astype(np.float32)
    if site == "attn_out":
        s = np.repeat(s.reshape(2, 2, 8)[:, :1], 2, axis=1).reshape(-1)
    return jnp.asarray(s)


def assert_same(changed, block, tolerance=1e-5):
    x = jax.random.normal(jax.random.key(2), (2, 7, 32))
    expected = forward(block, x)
    spread = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(forward(changed, x), expected, rtol=0, atol=tolerance * spread)


def changed_leaves(a, b):
    a, b = named_leaves(a), named_leaves(b)
    return {name for name in a.keys() & b.keys() if not np.allclose(a[name], b[name], rtol=1e-3)}


@every_site
@every_block
def test_a_scale_moves_from_the_consumers_to_the_producer(name, site):
    block = block_of(name)
    folded = fold_scale(block, site, scale_for(site))
    assert_same(folded, block)
    assert len(changed_leaves(folded, block)) >= 2 and not folded.sites
    back = fold_scale(folded, site, 1 / scale_for(site))
    assert not changed_leaves(back, block)


@every_site
def test_a_transform_online_is_undone_in_the_consumers(site):
    n1, n2 = {32: (4, 8), 48: (6, 8)}[WIDTHS[site]]
    left, right = matrix(n1), matrix(n2, 1)
    krons = (Kron(left, right), Kron(left=left), Kron(right=right))
    for t in (*krons, Diag(scale_for(site)), Hadamard(8)):
        block = block_of("head norms")
        changed = insert_online(block, site, t)
        assert_same(changed, block)
        assert changed.sites[site].transforms == (t,) and changed_leaves(changed, block)
        assert_same(insert_online(changed, site, Hadamard(4), Hadamard(4)), block)


@every_block
def test_keys_are_turned_and_queries_follow(name):
    block = block_of(name)
    for t in (Hadamard(8), Kron(right=matrix(8)), Diag(scale_for("attn_in")[:8])):
        changed = rotate_keys(block, t)
        assert_same(changed, block)
        (q,), (k,) = (changed.sites[name].transforms for name in ("query", "k_cache"))
        assert k is t and jax.tree.all(jax.tree.map(np.array_equal, q, inverse_transpose(t)))
        assert not changed_leaves(changed, block)
        assert_same(rotate_keys(block, t, inverse_transpose(t)), block)


@every_block
def test_values_are_turned_in_the_weights_on_both_sides(name):
    block = block_of(name)
    for t in (Hadamard(8), Kron(right=matrix(8)), Kron(matrix(2), matrix(4))):
        changed = rotate_values(block, t)
        assert_same(changed, block)
        bias = {"attn.v.b"} if block.attn.v.b is not None else set()
        assert changed_leaves(changed, block) == {"attn.v.w", "attn.o.w"} | bias
        assert not changed.sites


@every_block
def test_a_norm_gives_its_weight_to_what_reads_it(name):
    block = block_of(name)
    folded = fold_norm(fold_norm(block, "attn_in"), "ffn_in")
    assert_same(folded, block)
    for norm in (folded.attn_norm, folded.ffn_norm):
        np.testing.assert_array_equal(norm.offset + norm.weight, np.ones(32))
    assert fold_norm(block, "ffn_mid") is block  # no norm there
    bare = block.replace(ffn_norm=None)
    assert fold_norm(bare, "ffn_in") is bare


def test_folds_compose_into_a_fully_rotated_block():
    block = block_of("biases")
    changed = fold_scale(block, "ffn_in", scale_for("ffn_in"))
    changed = fold_scale(changed, "attn_out", scale_for("attn_out"))
    changed = rotate_values(fold_norm(changed, "attn_in"), Hadamard(8))
    changed = insert_online(changed, "attn_out", Hadamard(4, inner=8))
    changed = rotate_keys(insert_online(changed, "ffn_mid", Hadamard(48)), Hadamard(8))
    assert_same(changed, block, 2e-5)


def test_stored_dtypes_are_kept_and_arithmetic_is_wide():
    block = jax.tree.map(lambda x: x.astype(jnp.bfloat16), block_of("biases"))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), block)
    s = scale_for("ffn_in")
    for f in (
        lambda b: fold_scale(b, "ffn_in", s),
        lambda b: fold_norm(b, "attn_in"),
        lambda b: rotate_values(b, Hadamard(8)),
        lambda b: insert_online(b, "ffn_mid", Hadamard(48)),
    ):
        for found, expected in zip(*(jax.tree.leaves(f(b)) for b in (block, wide)), strict=True):
            assert found.dtype == jnp.bfloat16
            np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))


def test_transforms_of_a_site_are_kept_in_order():
    block = block_of("biases").replace(sites={"ffn_in": Site(transforms=(Hadamard(4),))})
    twice = append_transform(block, "ffn_in", Hadamard(8))
    assert twice.sites["ffn_in"].transforms == (Hadamard(4), Hadamard(8))


def test_a_scale_that_nothing_can_absorb_is_refused():
    block = block_of("biases")
    bare = block.replace(ffn_norm=None)
    with pytest.raises(ValueError, match="nothing before ffn_in that could absorb a scale"):
        fold_scale(bare, "ffn_in", scale_for("ffn_in"))
    for path, site in (("attn.v", "attn_out"), ("attn.o", "attn_out"), ("ffn.up", "ffn_in")):
        w = quantize(get_at(block, path).w, QuantSpec(4))
        done = replace_at(block, f"{path}.w", w)
        with pytest.raises(ValueError, match=rf"{path} is already quantized to 4 bits.*before the"):
            fold_scale(done, site, scale_for(site))


def test_a_linear_without_a_bias_stays_without():
    p = scale_output(Linear(jnp.ones((3, 2))), jnp.array([2.0, 0.5]))
    assert p.b is None and p.w.tolist() == [[2.0, 0.5]] * 3
