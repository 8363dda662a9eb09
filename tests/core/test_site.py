import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.activation import QActivation, as_float
from jaxcomp.core.quantize import QuantSpec, fake_quantize, range_to_grid
from jaxcomp.core.site import CONSUMER_SITES, SITES, ActQuantizer, Site, enter_site, site_tap
from jaxcomp.core.transforms import Diag, Kron, transform
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import block_forward
from tests import tiny

TOKEN4 = QuantSpec(bits=4, granularity="token", dynamic=True)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (2, 5, 8))


def test_an_empty_site_and_a_site_not_named_change_nothing(x):
    assert enter_site(Site(), x) is x
    assert site_tap({"ffn_in": Site(ActQuantizer(TOKEN4))})("attn_in", x) is x


def test_a_dynamic_quantizer_measures_what_passes(x):
    tap = site_tap({"ffn_in": Site(ActQuantizer(TOKEN4))})
    np.testing.assert_array_equal(tap("ffn_in", x), fake_quantize(x, TOKEN4))
    assert tap("ffn_in", x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_static_quantizer_uses_its_own_range(x):
    spec = QuantSpec(bits=8, granularity="tensor", symmetric=False)
    scale, zero = range_to_grid(jnp.float32(-1), jnp.float32(1), spec)
    y = np.asarray(enter_site(Site(ActQuantizer(spec, scale, zero)), x))
    clipped = np.clip(x, -1, 1)
    assert np.max(np.abs(y - clipped)) <= 1.01 * float(scale)
    assert len(set(y[np.asarray(x) > 1.1])) == len(set(y[np.asarray(x) < -1.1])) == 1


def test_a_block_passes_every_site_once_in_the_order_of_the_list():
    block = tiny.model("qwen3", jax.random.key(0), num_hidden_layers=1).blocks[0]
    seen = []
    tap = lambda name, x: seen.append(name) or x  # noqa: E731
    block_forward(block, jnp.ones((1, 3, 32)), plain_context(1, 3), tap)
    assert tuple(name for name in seen if name in SITES) == SITES
    assert sorted(set(seen) - set(SITES)) == sorted(CONSUMER_SITES.values())
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("site", SITES)
def test_what_a_site_does_reaches_the_output(site):
    block = tiny.model("qwen3", jax.random.key(0), num_hidden_layers=1).blocks[0]
    x, ctx = jax.random.normal(jax.random.key(1), (1, 6, 32)), plain_context(1, 6)
    plain = block_forward(block, x, ctx)
    coarse = block.replace(sites={site: Site(ActQuantizer(TOKEN4))})
    fine_spec = QuantSpec(bits=8, granularity="token", dynamic=True)
    fine = block.replace(sites={site: Site(ActQuantizer(fine_spec))})
    far, near = (np.abs(block_forward(b, x, ctx) - plain).max() for b in (coarse, fine))
    assert 0 < near < far / 4


QUANTIZERS = {
    "token": ActQuantizer(TOKEN4, clip=jnp.array([0.9, 0.7])),
    "asymmetric": ActQuantizer(QuantSpec(3, granularity="token", symmetric=False, dynamic=True)),
    "whole": ActQuantizer(QuantSpec(8, granularity="tensor", dynamic=True)),
    "static": ActQuantizer(
        QuantSpec(8, granularity="tensor", symmetric=False), jnp.float32(0.02), jnp.int8(-3)
    ),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_codes_stand_for_the_simulated_activation_token_by_token(name, x):
    simulated = Site(QUANTIZERS[name], (Diag(jnp.arange(1.0, 9.0)),))
    integer = simulated.replace(quantizer=QUANTIZERS[name].replace(integer=True))
    codes, expected = enter_site(integer, x), enter_site(simulated, x)
    assert isinstance(codes, QActivation) and codes.shape == x.shape and codes.dtype == x.dtype
    np.testing.assert_array_equal(as_float(codes), expected)
    np.testing.assert_array_equal(as_float(codes[:, 2:4]), expected[:, 2:4])
    stored = site_tap({"v_cache": simulated}, as_codes=("v_cache",))("v_cache", x)
    np.testing.assert_array_equal(stored.codes, codes.codes)


def test_a_consumer_that_changes_codes_of_a_shared_site_sees_their_value(x):
    shared = Site(ActQuantizer(TOKEN4, integer=True))
    own = Site(QUANTIZERS["asymmetric"], (Diag(jnp.arange(1.0, 9.0)),))
    found = enter_site(own, enter_site(shared, x))
    np.testing.assert_array_equal(found, enter_site(own, fake_quantize(x, TOKEN4)))
    assert enter_site(Site(), enter_site(shared, x)).bits == 4


@pytest.mark.parametrize("clip", [None, (0.9, 0.7)])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_kronecker_transform_before_codes_is_one_operation_with_the_same_codes(bits, clip):
    spec = QuantSpec(bits, granularity="token", dynamic=True)
    clip = None if clip is None else jnp.asarray(clip)
    keys = jax.random.split(jax.random.key(0), 3)
    kron = Kron(jax.random.normal(keys[0], (4, 4)), jax.random.normal(keys[1], (8, 8)))
    before = Diag(jnp.linspace(0.5, 2.0, 32))
    x = jax.random.normal(keys[2], (2, 9, 32)).at[0, 3].set(0.0)
    quantizer = ActQuantizer(spec, clip=clip, integer=True)
    found = enter_site(Site(quantizer, (before, kron)), x)
    simulated = ActQuantizer(spec, clip=clip)
    expected = enter_site(Site(simulated, (before, kron)), x)
    np.testing.assert_allclose(as_float(found), expected, atol=1e-5)
    assert isinstance(found, QActivation) and not np.any(found.codes[0, 3])
    whole = enter_site(Site(quantizer), transform(kron, transform(before, x)))
    np.testing.assert_array_equal(found.codes, whole.codes)
