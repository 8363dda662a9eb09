import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.linear import Linear
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.tree import get_at, named_leaves, replace_at
from jaxcomp.models.anatomy import anatomy, check_grid
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import block_forward, forward, map_blocks
from jaxcomp.models.families import FAMILIES
from jaxcomp.models.layers import RMSNorm
from tests import tiny

SITES = ("attn_in", "attn_out", "ffn_in", "ffn_mid")
NORMS_BEHIND = ("gemma3_text", "olmo2")  # a norm between a unit and the residual stream
every_family = pytest.mark.parametrize("family", FAMILIES)

logits_of = jax.jit(forward)


def model_of(family):
    return tiny.model(family, jax.random.key(0))


def is_linear(x):
    return isinstance(x, Linear)


def linears(block):
    return {k for k, x in named_leaves(block, is_leaf=is_linear).items() if is_linear(x)}


@every_family
def test_the_consumers_are_all_the_linears_of_the_block_each_once(family):
    block = model_of(family).blocks[0]
    parts = anatomy(block)
    consumers = [path for part in parts.sites.values() for path in part.consumers]
    assert set(consumers) == linears(block) and len(consumers) == len(set(consumers))
    assert parts.linears == {p: s for s, part in parts.sites.items() for p in part.consumers}
    assert anatomy(jax.eval_shape(lambda b: b, block)) == parts  # structs will do


@every_family
def test_consumers_read_what_passes_at_their_site(family):
    block = model_of(family).blocks[0]
    x, seen = jax.random.normal(jax.random.key(1), (1, 6, 32)), {}
    block_forward(block, x, plain_context(1, 6), lambda name, h: seen.setdefault(name, h))
    assert tuple(anatomy(block).sites) == tuple(name for name in seen if name in SITES)
    for name, part in anatomy(block).sites.items():
        assert {get_at(block, path).w.shape[0] for path in part.consumers} == {seen[name].shape[-1]}


def fold(block, site, s):
    """Divides the site's activation by `s` at its producer and multiplies it into its consumers.

    `s` has a value for each of the producer's channels; where the site repeats whole heads of them,
    the consumers see it repeated.
    """
    part = anatomy(block)[site]
    producer = get_at(block, part.producer)
    if isinstance(producer, RMSNorm):
        weight = (producer.offset + producer.weight) / s - producer.offset
        block = replace_at(block, f"{part.producer}.weight", weight)
    else:
        bias = None if producer.b is None else producer.b / s
        block = replace_at(block, part.producer, Linear(producer.w / s, bias))
    if part.repeats > 1:
        s = np.repeat(s.reshape(-1, block.attn.head_dim), part.repeats, axis=0).ravel()
    for path in part.consumers:
        block = replace_at(block, f"{path}.w", get_at(block, path).w * s[:, None])
    return block


@pytest.mark.parametrize("site", SITES)
@every_family
def test_a_scale_folded_into_producer_and_consumers_leaves_the_logits(family, site):
    model, tokens = model_of(family), tiny.tokens(jax.random.key(1))
    part = anatomy(model.blocks[0])[site]
    if part.producer is None:
        pytest.skip("nothing can absorb a scale here")
    node = get_at(model.blocks[0], part.producer)
    channels = len(node.weight) if isinstance(node, RMSNorm) else node.w.shape[-1]
    s = np.exp(np.random.default_rng(0).standard_normal(channels)).astype(np.float32)
    folded = map_blocks(model, lambda _, block: fold(block, site, s))
    np.testing.assert_allclose(logits_of(folded, tokens), logits_of(model, tokens), atol=2e-4)
    one_sided = map_blocks(  # the same without the consumers is another function
        model, lambda _, b: fold(b, site, s).replace(**{u: getattr(b, u) for u in ("attn", "ffn")})
    )
    if isinstance(node, RMSNorm):
        assert np.abs(logits_of(one_sided, tokens) - logits_of(model, tokens)).max() > 0.01


@every_family
def test_only_a_unit_without_a_norm_before_it_has_no_producer(family):
    sites = anatomy(model_of(family).blocks[0]).sites
    bare = {"attn_in", "ffn_in"} if family == "olmo2" else set()
    assert {name for name, part in sites.items() if part.producer is None} == bare


def fold_norms(block):
    """Both norms' weights moved into the linears that read through them."""
    for site, norm in (("attn_in", "attn_norm"), ("ffn_in", "ffn_norm")):
        weight = getattr(block, norm).weight
        for path in anatomy(block)[site].consumers:
            block = replace_at(block, f"{path}.w", get_at(block, path).w * weight[:, None])
        block = replace_at(block, f"{norm}.weight", jnp.ones_like(weight))
    return block


def rotate(model, r):
    """The same function with the residual stream in another orthonormal basis, x → x r."""

    def block(_, b):
        b = fold_norms(b)
        parts = anatomy(b)
        for path in parts.readers:
            b = replace_at(b, f"{path}.w", r.T @ get_at(b, path).w)
        for path in parts.writers:
            p = get_at(b, path)
            b = replace_at(b, path, Linear(p.w @ r, None if p.b is None else p.b @ r))
        return b

    table = model.embed.weight
    head = table.T if model.lm_head is None else model.lm_head.w
    return map_blocks(model, block).replace(
        embed=model.embed.replace(weight=table @ r),
        lm_head=Linear(r.T @ (head * model.norm.weight[:, None])),
        norm=model.norm.replace(weight=jnp.ones_like(model.norm.weight)),
    )


@every_family
def test_readers_and_writers_are_the_whole_boundary_of_the_residual_stream(family):
    model, tokens = model_of(family), tiny.tokens(jax.random.key(1))
    rotatable = family not in NORMS_BEHIND
    assert all(anatomy(block).rotatable == rotatable for block in model.blocks)
    if not rotatable:
        return
    r, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((32, 32)))
    rotated = rotate(model, r.astype(np.float32))
    np.testing.assert_allclose(logits_of(rotated, tokens), logits_of(model, tokens), atol=2e-4)


@pytest.mark.parametrize("norm", ["attn_post_norm", "ffn_post_norm"])
def test_a_norm_between_writer_and_residual_stream_forbids_rotation(norm):
    block = model_of("llama").blocks[0].replace(**{norm: RMSNorm(jnp.full(32, 0.7))})
    assert not anatomy(block).rotatable
    model = model_of("llama")
    model = model.replace(blocks=(block.replace(**{norm: RMSNorm(jnp.arange(1.0, 33))}),))
    r, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((32, 32)))
    tokens = tiny.tokens(jax.random.key(1))
    difference = logits_of(rotate(model, r.astype(np.float32)), tokens) - logits_of(model, tokens)
    assert np.abs(difference).max() > 0.01  # rightly so


def test_without_a_norm_the_site_has_no_producer():
    block = model_of("llama").blocks[0].replace(attn_norm=None)
    assert anatomy(block)["attn_in"].producer is None
    assert anatomy(block)["ffn_in"].producer == "ffn_norm"


def test_a_node_without_anatomy_is_named():
    block = model_of("llama").blocks[0]
    with pytest.raises(TypeError, match="attention node RMSNorm; register one here"):
        anatomy(block.replace(attn=block.attn_norm))


def test_a_grid_that_does_not_fit_names_block_and_linear():
    model = tiny.model("llama", jax.random.key(0))
    check_grid(model, QuantSpec(bits=4, group_size=16))
    with pytest.raises(ValueError, match=r"block 0, attn\.q: in_ch=32 .*group_size=24.*divisor"):
        check_grid(model, QuantSpec(bits=4, group_size=24))
