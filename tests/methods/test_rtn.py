import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.calibrate import Calibration
from jaxcomp.calibrate.plan import plan
from jaxcomp.core.quantize import QTensor, QuantSpec
from jaxcomp.core.scheme import Override
from jaxcomp.core.transforms import Hadamard
from jaxcomp.core.tree import get_at
from jaxcomp.methods import RTN
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import block_forward, forward
from jaxcomp.models.fold import insert_online
from jaxcomp.models.layers import embed_tokens
from tests import tiny

TOKEN4 = QuantSpec(4, granularity="token", dynamic=True)
HEAD4 = QuantSpec(4, granularity="head", symmetric=False, dynamic=True)
TENSOR8 = QuantSpec(8, granularity="tensor", symmetric=False)
HEAD8 = QuantSpec(8, granularity="head", dynamic=True)
CHANNEL4 = QuantSpec(4, granularity="channel", symmetric=False)


@pytest.fixture(scope="module")
def model():
    return tiny.model("qwen2", jax.random.key(0))


@pytest.fixture(scope="module")
def calib():
    return Calibration(np.asarray(tiny.tokens(jax.random.key(1), 4, 12)), batch=2)


def activations(block, x):
    """What arrives at every site of a block."""
    seen = {}
    tap = lambda name, h: seen.setdefault(name, np.asarray(h))  # noqa: E731
    block_forward(block, x, plain_context(*x.shape[:2]), tap)
    return seen


def test_quantizers_are_put_behind_the_transforms_of_a_site(model):
    turn = Hadamard(8)
    turned = model.replace(blocks=tuple(insert_online(b, "ffn_mid", turn) for b in model.blocks))
    block = RTN(weight=None, act=TOKEN4, kv=HEAD4)(turned).model.blocks[0]
    assert block.sites["ffn_mid"].transforms == (turn,)
    assert block.sites["ffn_mid"].quantizer.spec == TOKEN4
    assert block.sites["v_cache"].quantizer.spec == HEAD4
    assert block.sites.keys() == {"attn_in", "attn_out", "ffn_in", "ffn_mid", "k_cache", "v_cache"}


def test_keys_and_values_may_differ(model):
    block = RTN(weight=None, kv=HEAD4, v=HEAD8)(model).model.blocks[0]
    assert block.sites["k_cache"].quantizer.spec == HEAD4
    assert block.sites["v_cache"].quantizer.spec == HEAD8
    assert RTN(weight=None, k=HEAD4)(model).model.blocks[0].sites.keys() == {"k_cache"}


def test_clip_ratios_keep_a_share_of_the_range(model):
    cfg = RTN(weight=None, act=TOKEN4, kv=HEAD4, act_clip=0.9, kv_clip=0.5)
    sites = cfg(model).model.blocks[0].sites
    np.testing.assert_array_equal(sites["attn_in"].quantizer.clip, np.float32([0.9, 0.9]))
    np.testing.assert_array_equal(sites["k_cache"].quantizer.clip, np.float32([0.5, 0.5]))
    assert RTN(act=TOKEN4)(model).model.blocks[0].sites["attn_in"].quantizer.clip is None


def test_static_ranges_are_those_of_the_calibration_text(model, calib):
    result = RTN(weight=None, act=TENSOR8, k=CHANNEL4, kv_clip=0.5)(model, calib)
    block, sites = model.blocks[0], result.model.blocks[0].sites
    x = embed_tokens(model.embed, jnp.asarray(calib.tokens), "float32")
    seen = activations(block, x)
    low, high = (f(seen["ffn_in"]) for f in (np.min, np.max))
    quantizer = sites["ffn_in"].quantizer
    np.testing.assert_allclose(quantizer.scale, (high - low) / 255, rtol=1e-4)
    assert quantizer.clip is None and quantizer.zero_point.dtype == jnp.int8
    keys = sites["k_cache"].quantizer
    spread = np.maximum(seen["k_cache"].max((0, 1)), 0) - np.minimum(seen["k_cache"].min((0, 1)), 0)
    assert keys.scale.shape == (2, 8)  # a step for each channel of each key head
    np.testing.assert_allclose(keys.scale, 0.5 * spread / 15, rtol=1e-4)
    assert "v_cache" not in sites


def test_a_static_grid_for_each_channel_holds_keys_with_a_loud_channel(model, calib):
    bias = model.blocks[0].attn.k.b.at[jnp.array([3, 7])].set(60.0)  # a pair that RoPE turns
    attn = model.blocks[0].attn.replace(k=model.blocks[0].attn.k.replace(b=bias))
    loud = model.replace(blocks=(model.blocks[0].replace(attn=attn), model.blocks[1]))
    expected = forward(loud, calib.tokens)
    error = lambda kv: np.mean(  # noqa: E731
        (forward(RTN(weight=None, k=kv)(loud, calib).model, calib.tokens) - expected) ** 2
    )
    assert error(CHANNEL4) < 0.5 * error(HEAD4)


def test_static_ranges_need_text_and_a_dry_run_knows_their_pass(model, calib):
    static = RTN(act=TENSOR8)
    with pytest.raises(ValueError, match="RTN needs calibration text"):
        static(model)
    dynamic = RTN(act=TOKEN4)
    plans = [plan(model, (cfg,), calib)[0] for cfg in (static, dynamic)]
    assert all(p.seconds > 0 for p in plans)
    names = lambda cfg: [  # noqa: E731
        p.function.__name__ for p in cfg.plan_block(model.blocks[0], jnp.ones((2, 12, 32)), 2, 2)[0]
    ]
    assert names(static) == [*names(dynamic), "capture_batch", "block_step"]


def test_weights_that_are_quantized_already_are_kept_and_said(model):
    once = RTN(QuantSpec(3))(model).model
    twice = RTN(QuantSpec(8), act=TOKEN4)(once)
    w = twice.model.blocks[0].attn.q.w
    assert isinstance(w, QTensor) and w.bits == 3
    skipped = {row.metrics["skipped"] for row in twice.rows if row.linear}
    assert skipped == {"already quantized to 3 bits"}


def test_exceptions_hold_where_they_say(model):
    rules = (
        Override(sites=("ffn_mid",), weight_bits=16, act_bits=8),
        Override(blocks=(-1,), weight_bits=8, kv_bits=16),
    )
    result = RTN(act=TOKEN4, kv=HEAD4, overrides=rules)(model)
    first, last = result.model.blocks
    bits = lambda block, path: getattr(get_at(block, path).w, "bits", 16)  # noqa: E731
    assert [bits(first, p) for p in ("attn.q", "ffn.up", "ffn.down")] == [4, 4, 16]
    assert [bits(last, p) for p in ("attn.q", "ffn.down")] == [8, 8]
    assert first.sites["ffn_mid"].quantizer.spec.bits == 8
    assert "k_cache" in first.sites and "k_cache" not in last.sites
    rows = {(row.block, row.linear): row.metrics for row in result.rows}
    assert rows[0, "ffn.down"] == {"skipped": "an override leaves it at 16 bits"}
    assert rows[1, "ffn.down"]["bits"] == 8
    with pytest.raises(ValueError, match="block 2, and the model has 2 blocks"):
        RTN(overrides=(Override(blocks=(2,), weight_bits=8),)).check(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(act=HEAD4), "act has granularity='head' .*use granularity='token' with dynamic=True"),
        (dict(act=CHANNEL4), "act has granularity='channel' with dynamic=False"),
        (dict(act=QuantSpec(4, granularity="token")), "granularity='token' with dynamic=False"),
        (dict(kv=TOKEN4), "kv has granularity='token' .*use granularity='head'"),
        (dict(v=QuantSpec(4, granularity="head")), "v has granularity='head' with dynamic=False"),
        (dict(k=QuantSpec(4, group_size=64)), "k has group_size=64, and only weights .*head_dim"),
        (dict(act_clip=0.0), r"act_clip=0\.0 is outside \(0, 1\]"),
        (dict(kv_clip=1.5), r"kv_clip=1\.5 is outside \(0, 1\]; 1\.0 keeps"),
    ],
)
def test_a_grid_that_an_activation_cannot_have_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RTN(**settings)


def test_an_activation_is_not_quantized_twice(model):
    once = RTN(None, act=TOKEN4)(model).model
    with pytest.raises(ValueError, match="block 0 has a quantizer at attn_in already, and RTN"):
        RTN(None, act=TOKEN4)(once)
    block = once.blocks[0]
    views = {"q_in": block.sites["attn_in"]}
    with pytest.raises(ValueError, match="has a quantizer at q_in already, and RTN would add one"):
        RTN(None, act=TOKEN4)(once.replace(blocks=(block.replace(sites=views),)))
    RTN(None, kv=HEAD4)(once)  # other sites may get theirs
