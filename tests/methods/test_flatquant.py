import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.calibrate import Calibration, Run, StepStore, learnable
from jaxcomp.calibrate.plan import plan
from jaxcomp.core.quantize import QTensor, QuantSpec
from jaxcomp.core.scheme import Override
from jaxcomp.core.tree import named_leaves
from jaxcomp.methods import GPTQ, RTN, FlatQuant, QuaRot
from jaxcomp.methods import flatquant as method
from jaxcomp.models.decoder import forward
from tests import tiny

W4, A4 = QuantSpec(4), QuantSpec(4, granularity="token", dynamic=True)
KV4 = QuantSpec(4, granularity="head", symmetric=False, dynamic=True)
SHORT = dict(init="hadamard", epochs=4, lr=1e-2)


@pytest.fixture(scope="module")
def calib():
    return Calibration(np.asarray(tiny.tokens(jax.random.key(1), 8, 16)), batch=4)


def outlier_model():
    """Channels 3 and 20 of the residual stream are 20 times as loud, for the weights to read."""
    model = tiny.model("qwen2", jax.random.key(0))
    loud = jnp.ones(32).at[jnp.array([3, 20])].set(20.0)
    blocks = []
    for block in model.blocks:
        norms = {n: getattr(block, n).replace(weight=loud) for n in ("attn_norm", "ffn_norm")}
        blocks.append(block.replace(**norms))
    return model.replace(blocks=tuple(blocks))


def error(model, original, tokens=None):
    tokens = tiny.tokens(jax.random.key(2)) if tokens is None else tokens
    expected = forward(original, tokens)
    return float(jnp.sum((forward(model, tokens) - expected) ** 2) / jnp.sum(expected**2))


def block_rows(result):
    return [row.metrics for row in result.rows if row.linear is None]


def test_it_beats_rounding_and_the_loss_falls(calib):
    model = outlier_model()
    fitted = FlatQuant(W4, A4, KV4, init="hadamard", epochs=30, lr=1e-2)(model, calib)
    rounded = RTN(W4, act=A4, kv=KV4)(model)
    assert error(fitted.model, model) < 0.6 * error(rounded.model, model)
    for numbers in block_rows(fitted):
        assert numbers["mse_after"] < numbers["mse_before"] < numbers["mse_rounding"]
        assert numbers["loss_curve"][-1] < numbers["loss_curve"][0]
        assert 1 <= numbers["condition"] < 100


def test_weights_and_norms_are_not_trained(calib):
    model = outlier_model()
    before = {name: np.asarray(x).copy() for name, x in named_leaves(model).items()}
    kept = FlatQuant(W4, A4, KV4, finish="keep", **SHORT)(model, calib).model
    for name, x in named_leaves(model).items():
        np.testing.assert_array_equal(x, before[name])
    off = kept.replace(blocks=tuple(without_quantizers(b) for b in kept.blocks))
    assert error(off, model) < 1e-9
    top = lambda m: jnp.argmax(forward(m, tiny.tokens(jax.random.key(2))), -1)  # noqa: E731
    np.testing.assert_array_equal(top(off), top(model))


def without_quantizers(block):
    sites = {name: site.replace(quantizer=None) for name, site in block.sites.items()}
    return block.replace(sites=sites)


def test_the_steps_compile_once_for_all_blocks(calib):
    method.fit_step.clear_cache()
    FlatQuant(W4, A4, KV4, **SHORT)(outlier_model(), calib)
    assert method.fit_step._cache_size() == 1


def test_what_is_switched_off_is_absent(calib):
    model = outlier_model()
    bare = dict(learn_transform=False, learn_scale=False, learn_clip=False)
    plain = FlatQuant(W4, A4, KV4, epochs=1, **bare)(model, calib).model
    rounded = RTN(W4, act=A4, kv=KV4)(model).model
    assert error(plain, rounded) < 1e-10  # nothing to learn: plain rounding
    only_clip = FlatQuant(W4, A4, KV4, epochs=1, **bare | dict(learn_clip=True))(model, calib).model
    assert all(not s.transforms for b in only_clip.blocks for s in b.sites.values())
    assert only_clip.blocks[0].sites["attn_in"].quantizer.clip is not None
    only_scale = FlatQuant(W4, A4, KV4, epochs=1, **bare | dict(learn_scale=True))(
        model, calib
    ).model
    assert not np.array_equal(
        only_scale.blocks[0].attn_norm.weight, model.blocks[0].attn_norm.weight
    )


def test_gptq_finishes_what_was_kept_dense(calib):
    model = outlier_model()
    kept = FlatQuant(W4, A4, KV4, finish="keep", **SHORT)(model, calib).model
    assert not any(isinstance(x, QTensor) for x in qtensors(kept))
    bare = kept.replace(blocks=tuple(without_quantizers(b) for b in kept.blocks))
    solved = GPTQ(W4, clip="output")(bare, calib).model
    assert len(qtensors(solved)) == 14
    assert error(solved, model) < error(RTN(W4)(bare).model, model)


def qtensors(model):
    leaves = jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, QTensor))
    return [x for x in leaves if isinstance(x, QTensor)]


def test_a_token_limit_keeps_one_massive_token_from_deciding():
    model = outlier_model()
    block, x = model.blocks[0], jax.random.normal(jax.random.key(5), (2, 12, 32))
    setting = FlatQuant(W4, A4, token_limit=5.0).setting(block, 0, 1)
    plain = dataclasses.replace(setting, token_limit=None)
    nothing = {"transform": {}, "scale": {}, "weight_clip": {}, "act_clip": {}}
    target = x + 1.0
    massive = target.at[0, 3].add(1e4)
    losses = {
        (s.token_limit, t is massive): float(learnable.block_loss(nothing, s, block, x, t))
        for s in (setting, plain)
        for t in (target, massive)
    }
    assert losses[5.0, False] == pytest.approx(losses[None, False])  # nobody is above the limit
    assert losses[None, True] > 1e4 * losses[5.0, True]
    assert losses[5.0, True] < 3 * losses[5.0, False]


def test_a_site_can_have_eight_bits_and_a_block_none(calib):
    rules = (
        Override(sites=("ffn_mid",), weight_bits=8, act_bits=8),
        Override(blocks=(-1,), weight_bits=16, act_bits=16, kv_bits=16),
    )
    result = FlatQuant(W4, A4, KV4, overrides=rules, **SHORT)(outlier_model(), calib)
    first, last = result.model.blocks
    assert first.ffn.down.w.bits == 8 and first.ffn.up.w.bits == 4
    assert first.sites["ffn_mid"].quantizer.spec.bits == 8
    assert not isinstance(last.attn.q.w, QTensor) and not last.sites
    bits = {row.linear: row.metrics["bits"] for row in result.rows if row.block == 0 and row.linear}
    assert bits["ffn.down"] == 8 and bits["attn.q"] == 4


def test_a_killed_run_continues_and_the_seed_decides(calib, tmp_path):
    model, cfg = outlier_model(), FlatQuant(W4, A4, KV4, **SHORT)
    expected = named_leaves(cfg(model, calib).model)
    store = StepStore(tmp_path)
    stop = lambda step, done, total, rows: 1 / (done != 1)  # noqa: E731
    with pytest.raises(ZeroDivisionError):
        cfg(model, calib, Run(store, stop))
    found = cfg(model, calib, Run(StepStore(tmp_path))).model
    found = named_leaves(
        found.replace(blocks=tuple(b if not hasattr(b, "load") else b.load() for b in found.blocks))
    )
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
    other = named_leaves(dataclasses.replace(cfg, seed=1)(model, calib).model)
    assert not np.array_equal(
        other["blocks.0.ffn.down.w.packed"], expected["blocks.0.ffn.down.w.packed"]
    )


def test_transforms_are_reused_for_weights_or_cache_alone(calib):
    model = outlier_model()
    kept = FlatQuant(W4, A4, KV4, finish="keep", **SHORT)(model, calib).model
    bare = kept.replace(blocks=tuple(without_quantizers(b) for b in kept.blocks))
    weights = RTN(W4)(bare).model
    assert error(weights, model) < error(RTN(W4)(model).model, model)
    cache = RTN(None, kv=KV4)(bare).model
    assert error(cache, model) < error(kept, model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(form="lu"), "form='lu' is none of svd, direct"),
        (dict(init="ones"), "init='ones' is none of cayley, haar, hadamard, identity"),
        (dict(finish="gptq"), "finish='gptq' is none of round, clip, keep"),
        (dict(epochs=0), "epochs=0 is below 1"),
        (dict(lr=0.0), "lr=0.0 is not positive"),
        (dict(token_limit=-1.0), "token_limit=-1.0 is not positive"),
        (dict(act=QuantSpec(4, granularity="tensor")), "is static"),
        (dict(act=QuantSpec(4, granularity="head", dynamic=True)), "use 'token'"),
        (dict(weight=QuantSpec(4, granularity="token")), "is a grid for activations"),
        (dict(alpha=7.0), r"alpha=7.0 is outside \[0, 1\]"),
        (dict(warmup=-1), "warmup=-1 and weight_decay=0.01 are 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FlatQuant(**settings)


def test_a_model_it_cannot_take_is_refused_at_the_door(calib):
    model = outlier_model()
    with pytest.raises(ValueError, match=r"block 0, attn.q is quantized already"):
        FlatQuant(W4)(RTN(W4)(model).model, calib)
    with pytest.raises(ValueError, match=r"block 0 has a transform at .* already"):
        FlatQuant(W4)(QuaRot()(model, None).model, calib)
    with pytest.raises(ValueError, match="block 0, site ffn_mid: factor pair"):
        FlatQuant(W4, factors=(("ffn_mid", (7, 7)),))(model, calib)
    with pytest.raises(ValueError, match=r"block 0 has a quantizer at .*, made for what passes"):
        FlatQuant(W4)(RTN(None, act=A4)(model).model, calib)
    with pytest.raises(ValueError, match="an override is for block 99"):
        FlatQuant(W4, overrides=(Override(blocks=(99,), weight_bits=8),))(model, calib)
    with pytest.raises(ValueError, match="site 'attn_out' takes no factor pair; those that do"):
        FlatQuant(W4, factors=(("attn_out", (2, 16)),))(model, calib)
    prime = tiny.model("qwen2", jax.random.key(0), intermediate_size=37)
    with pytest.raises(ValueError, match="site ffn_mid: 37 channels have no balanced Kronecker"):
        FlatQuant(W4)(prime, calib)


@pytest.mark.parametrize("overrides", [(), (Override(blocks=(0,), weight_bits=16),)])
def test_a_dry_run_plans_the_fit(calib, overrides):
    cfg = FlatQuant(W4, A4, KV4, overrides=overrides, **SHORT)
    (step,) = plan(outlier_model(), [cfg], calib)
    assert step.step == "FlatQuant" and step.seconds > 0 and step.peak_bytes > 0


def test_too_little_text_is_refused_and_a_ragged_batch_mentioned(calib, caplog):
    model, cfg = outlier_model(), FlatQuant(W4, epochs=1)
    with pytest.raises(ValueError, match="needs calibration text"):
        cfg(model, None)
    few = Calibration(calib.tokens[:3], batch=4)
    with pytest.raises(ValueError, match="3 calibration windows do not fill a batch of 4"):
        cfg(model, few)
    with caplog.at_level(logging.WARNING):
        cfg(model, Calibration(calib.tokens[:6], batch=4))
    assert "the last batch has 2 of 4 windows" in caplog.text


def test_an_exploding_fit_stops_with_the_finished_blocks_kept(calib, tmp_path, monkeypatch):
    model, cfg = outlier_model(), FlatQuant(W4, A4, KV4, **SHORT)
    calls = []

    def exploding(params, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("step 3 of 8: the loss is nan")
        return params, [1.0] * 8

    monkeypatch.setattr(method, "run_fit", exploding)
    with pytest.raises(ValueError, match=r"block 1, step 3 of 8: the loss is nan; finished blocks"):
        cfg(model, calib, Run(StepStore(tmp_path)))
    assert StepStore(tmp_path).resume()[0] == 1


def test_a_scale_that_came_to_zero_or_a_singular_transform_is_refused():
    params = {"transform": {}, "scale": {"attn_in": jnp.array([1.0, 0.0])}}
    with pytest.raises(ValueError, match="block 7, site attn_in: 1 scales came to 0 or below"):
        method._check_params(params, 7)
    singular = learnable.Direct(jnp.diag(jnp.array([1.0, 1e-6])))
    params = {"transform": {"ffn_mid": {"left": singular, "right": None}}, "scale": {}}
    with pytest.raises(ValueError, match="the left factor has condition 1e\\+06, the limit is"):
        method._check_params(params, 2)
