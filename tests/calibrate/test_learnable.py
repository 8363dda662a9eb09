import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.calibrate.learnable import (
    BlockSetting,
    block_loss,
    factor_shapes,
    flat_block,
    init_clips,
    init_transforms,
    merge,
    simulated_weights,
)
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.scheme import Scheme
from jaxcomp.core.site import Site
from jaxcomp.core.transforms import Diag, Kron
from jaxcomp.core.tree import get_at
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import block_forward
from jaxcomp.models.families import FAMILIES
from jaxcomp.solvers.invertible import materialize
from tests import tiny

W4, A4 = QuantSpec(4), QuantSpec(4, granularity="token", dynamic=True)
KV4 = QuantSpec(4, granularity="head", symmetric=False, dynamic=True)
SITES = ("attn_in", "attn_out", "ffn_in", "ffn_mid", "k_cache", "v_cache")
FULL = Scheme(W4, A4, KV4, KV4)


def setting_of(scheme=FULL, **kwargs):
    return BlockSetting(tuple((site, scheme) for site in SITES), **kwargs)


def params_of(block, setting, form="svd", init="cayley"):
    """Parameters away from their start, as after a fit."""
    transforms = init_transforms(factor_shapes(block, setting, {}), jax.random.key(0), form, init)
    weight_clip, act_clip = init_clips(block, setting)
    widths = {"attn_in": 32, "ffn_in": 32, "ffn_mid": 48}
    absorbed = {s: n for s, n in widths.items() if anatomy(block)[s].producer}
    draw = lambda n: jnp.exp(jax.random.normal(jax.random.key(1), (n,)) / 2)  # noqa: E731
    scale = {s: draw(n) for s, n in absorbed.items()}
    params = {"transform": transforms, "scale": scale}
    params |= {"weight_clip": weight_clip, "act_clip": act_clip}
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(params))))

    def move(path, x):
        fixed = jax.tree_util.keystr(path).endswith(".base")
        return x if fixed else x * jnp.exp(0.1 * jax.random.normal(next(keys), x.shape))

    return jax.tree_util.tree_map_with_path(move, params)


def block_of(family):
    return tiny.model(family, jax.random.key(3)).blocks[1]


def inputs():
    return jax.random.normal(jax.random.key(4), (2, 12, 32))


def run(block, x=None):
    x = inputs() if x is None else x
    return block_forward(block, x, plain_context(*x.shape[:2]))


@pytest.mark.parametrize("form", ["svd", "direct"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_quantizers_the_block_computes_what_it_did(family, form):
    block, setting = block_of(family), setting_of()
    params = params_of(block, setting, form, "haar")
    expected = run(block)
    found = run(flat_block(params, block))
    assert float(jnp.abs(found - expected).max()) < 1e-4 * float(jnp.ptp(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_scales_agree_with_scales_at_the_sites(family):
    block, setting = block_of(family), setting_of()
    params = params_of(block, setting)
    merged = flat_block(params, block)
    # The same transforms with nothing folded but the inverses: c is applied online.
    sites = {site: s for site, s in merged.sites.items()}
    for site, c in params["scale"].items():
        sites[site] = Site(transforms=(Diag(c), *merged.sites[site].transforms))
    up = merged.ffn.up.replace(w=merged.ffn.up.w / params["scale"]["ffn_mid"])
    if up.b is not None:
        up = up.replace(b=up.b / params["scale"]["ffn_mid"])
    unmerged = merged.replace(
        sites=sites,
        attn_norm=block.attn_norm,
        ffn_norm=block.ffn_norm,
        ffn=merged.ffn.replace(up=up),
    )
    np.testing.assert_allclose(run(unmerged), run(merged), atol=2e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_the_merged_block_computes_what_the_fit_saw(shared):
    block, setting = block_of("qwen2"), setting_of(shared_quantizer=shared)
    params = params_of(block, setting)
    simulate = jax.jit(lambda p, b: simulated_weights(p, b, setting))  # a tie may round either way
    fitted = simulate(params, merge(params, block, setting=setting, finish="keep")[0])
    merged, _ = merge(params, block, setting=setting, finish="round")
    np.testing.assert_allclose(run(merged), run(fitted), atol=1e-5)
    clipped, _ = merge(params, block, setting=setting, finish="clip")
    later = simulate(params | {"weight_clip": {}}, clipped)
    for path in anatomy(block).linears:
        w, expected = get_at(later, path).w, get_at(fitted, path).w
        assert float(jnp.mean(jnp.abs(w - expected) > 1e-5)) < 0.02


def test_scores_do_not_feel_the_key_transform_nor_outputs_the_value_transform():
    block, setting = block_of("qwen3"), setting_of()
    params, expected = params_of(block, setting), run(block_of("qwen3"))
    for sites in (("k_cache",), ("v_cache",), ("attn_out",), ("v_cache", "attn_out")):
        part = {site: params["transform"][site] for site in sites}
        found = run(flat_block({"scale": {}, "transform": part}, block))
        assert float(jnp.abs(found - expected).max()) < 1e-4 * float(jnp.ptp(expected))


@pytest.mark.parametrize(
    ("scheme", "sites"),
    [
        (Scheme(weight=W4), {"attn_in", "attn_out", "ffn_in", "ffn_mid", "v_cache"}),
        (Scheme(act=A4), {"attn_in", "attn_out", "ffn_in", "ffn_mid", "v_cache"}),
        (Scheme(k=KV4), {"k_cache"}),
        (Scheme(k=KV4, v=KV4), {"k_cache", "v_cache"}),
        (Scheme(), set()),
        (FULL, set(SITES)),
    ],
)
def test_transforms_are_only_where_something_is_quantized(scheme, sites):
    assert set(factor_shapes(block_of("qwen2"), setting_of(scheme), {})) == sites


@pytest.mark.slow
def test_every_parameter_gets_a_gradient_and_the_transform_is_where_the_docs_say():
    block, setting = block_of("qwen2"), setting_of()
    params = params_of(block, setting, init="haar")
    x, target = inputs(), run(block)
    grads = jax.grad(block_loss)(params, setting, block, x, target)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert bool(jnp.isfinite(g).all()), name
        assert float(jnp.abs(g).max()) > 0 or name.endswith(".base"), name
    kron = flat_block(params, block).sites["ffn_mid"].transforms[0]
    factors = params["transform"]["ffn_mid"]
    assert isinstance(kron, Kron)
    np.testing.assert_array_equal(kron.left, materialize(factors["left"])[0])
    assert set(anatomy(block).sites) < set(SITES)


def test_a_pair_of_ones_own_and_its_refusal():
    block = block_of("qwen2")
    assert factor_shapes(block, setting_of(), {"ffn_mid": (1, 48)})["ffn_mid"] == (1, 48)
    with pytest.raises(ValueError, match="site ffn_mid: factor pair 5·5 = 25 is not 48"):
        factor_shapes(block, setting_of(), {"ffn_mid": (5, 5)})
