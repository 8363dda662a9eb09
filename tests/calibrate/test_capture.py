import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.calibrate import Calibration
from jaxcomp.calibrate.capture import capture, capture_batch
from jaxcomp.calibrate.stats import hessian_finish, hessian_init, hessian_update
from jaxcomp.core.linear import Linear
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.site import ActQuantizer, Site
from jaxcomp.methods import GPTQ
from jaxcomp.methods import gptq as gptq_method
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import block_forward
from tests import tiny

WIDTHS = {"attn_in": 32, "attn_out": 64, "ffn_in": 32, "ffn_mid": 48}


@pytest.fixture(scope="module")
def block():
    return tiny.model("qwen3", jax.random.key(0), num_hidden_layers=1).blocks[0]


@pytest.fixture(scope="module")
def hidden():
    x = np.random.default_rng(0).standard_normal((4, 10, 32)).astype(np.float32)
    return [x[:2], x[2:]]


def activations(block, hidden):
    """Every site's activation as it arrives, [tokens, channels], float64, by an eager tap."""
    seen = {}

    def tap(name, x):
        seen.setdefault(name, []).append(np.asarray(x, np.float64).reshape(-1, x.shape[-1]))
        return x

    for x in hidden:
        block_forward(block, jnp.asarray(x), plain_context(*x.shape[:2]), tap)
    return {name: np.concatenate(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("first", [1.0, 16.0])
def test_second_moments_of_all_sites_agree_with_float64(first, block, hidden):
    init = {name: hessian_init(width, first) for name, width in WIDTHS.items()}
    found = capture(block, hidden, init, hessian_update)
    assert found.keys() == WIDTHS.keys() == anatomy(block).sites.keys()
    weight = np.where(np.arange(40) % 10 == 0, first, 1.0)  # four windows of ten tokens
    for name, x in activations(block, hidden).items():
        if name in WIDTHS:
            h = hessian_finish(found[name])
            expected = 2 * (weight * x.T) @ x / weight.sum()
            np.testing.assert_allclose(h, expected, rtol=1e-4, atol=1e-5)
    again = capture(block, hidden, init, hessian_update)  # the initial states are not used up
    assert jax.tree.all(jax.tree.map(np.array_equal, again, found))


def test_only_the_sites_asked_for_are_captured(block, hidden):
    found = capture(block, hidden[:1], {"ffn_in": hessian_init(32)}, hessian_update)
    assert found.keys() == {"ffn_in"}


def test_an_activation_is_recorded_before_its_quantizer_and_passed_on_behind_it(block, hidden):
    coarse = Site(ActQuantizer(QuantSpec(bits=2, granularity="token", dynamic=True)))
    rounded = block.replace(sites={"attn_in": coarse})
    plain, coarse = (
        capture(b, hidden, {name: hessian_init(WIDTHS[name]) for name in WIDTHS}, hessian_update)
        for b in (block, rounded)
    )
    np.testing.assert_array_equal(plain["attn_in"].total, coarse["attn_in"].total)
    assert not np.allclose(plain["attn_out"].total, coarse["attn_out"].total, rtol=0.01)


def test_a_running_second_moment_does_not_depend_on_the_batches():
    x = np.random.default_rng(1).standard_normal((6, 5, 4)).astype(np.float32)
    x = jnp.asarray(x)
    whole, parts = hessian_update(hessian_init(4, 3.0), x), hessian_init(4, 3.0)
    for part in jnp.split(x, [1, 3]):
        parts = hessian_update(parts, part)
    np.testing.assert_allclose(hessian_finish(whole), hessian_finish(parts), rtol=1e-5, atol=1e-6)
    assert not np.asarray(hessian_finish(hessian_init(4))).any()  # nothing seen: zeros, not NaN


def test_products_are_in_float32_whatever_the_dtype_of_the_activations():
    x = jnp.full((1, 3000, 2), 1.0, jnp.bfloat16)  # bfloat16 stops counting at 256
    assert np.array_equal(hessian_update(hessian_init(2), x).total, np.full((2, 2), 3000.0))


def test_more_blocks_need_no_more_compilations():
    def sizes():
        return capture_batch._cache_size(), gptq_method._solve_jit._cache_size()

    calib = Calibration(np.asarray(tiny.tokens(jax.random.key(2), 2, 9)), batch=1)
    before = sizes()
    for blocks, new in ((1, 4), (3, 4)):  # four sites, however many blocks
        GPTQ(act_order=False)(
            tiny.model("qwen3", jax.random.key(0), num_hidden_layers=blocks), calib
        )
        assert sizes() == (before[0] + new, before[1] + new)


def test_activations_that_are_not_finite_are_refused_with_block_and_site():
    model = tiny.model("llama", jax.random.key(0))
    unit = model.blocks[0].ffn
    unit = unit.replace(up=Linear(unit.up.w * 1e4), down=Linear(unit.down.w * 1e38))
    model = model.replace(blocks=(model.blocks[0].replace(ffn=unit), model.blocks[1]))
    calib = Calibration(np.asarray(tiny.tokens(jax.random.key(2), 1, 9)), batch=1)
    with pytest.raises(ValueError, match=r"block 1, site attn_in: .*NaN or infinity.*evaluate"):
        GPTQ(act_order=False)(model, calib)
