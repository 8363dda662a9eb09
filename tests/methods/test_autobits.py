"""Sensitivity and AutoBits: prices against a direct measurement, budgets kept, choices optimal."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.calibrate import Calibration, Run, StepStore
from jaxcomp.calibrate.sensitivity import prices, rounded
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.tree import get_at
from jaxcomp.methods import GPTQ, RTN, AutoBits, FlatQuant, Sensitivity, SmoothQuant
from jaxcomp.models.decoder import forward
from jaxcomp.models.sizes import sizes
from tests import tiny

W4 = QuantSpec(4, group_size=16)


@pytest.fixture(scope="module")
def model():
    return tiny.model("qwen2", jax.random.key(0))


@pytest.fixture(scope="module")
def calib():
    return Calibration(np.asarray(tiny.tokens(jax.random.key(1), 4, 12)), batch=2)


def divergence(model, other, tokens):
    """Mean KL of the next-token distributions, from whole logits; the last has no next token."""
    p, q = (jax.nn.log_softmax(forward(m, tokens)[:, :-1]) for m in (model, other))
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))


@pytest.mark.parametrize("by", ["linear", "site", "block"])
def test_a_price_is_the_divergence_of_the_model_with_that_part_alone_quantized(model, calib, by):
    cfg = Sensitivity(W4, bits=(2, 5), by=by)
    rows = cfg(model, calib).rows
    found = {(b, what, bits): kl for b, what, bits, kl in prices(rows, "Sensitivity")}
    parts = {"linear": 7, "site": 4, "block": 1}[by]
    assert len(found) == 2 * 2 * parts
    linears = {"linear": ("ffn.up",), "site": ("ffn.gate", "ffn.up"), "block": None}[by]
    what = {"linear": "ffn.up", "site": "ffn_in", "block": "block"}[by]
    linears = linears or LINEARS
    for i, bits in itertools.product((0, 1), (2, 5)):
        spec = dataclasses.replace(W4, bits=bits)
        blocks = [rounded(b, linears, spec) if j == i else b for j, b in enumerate(model.blocks)]
        expected = divergence(model, model.replace(blocks=tuple(blocks)), calib.tokens)
        assert found[i, what, bits] == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert found[i, what, 2] > found[i, what, 5] > 0


def test_windows_limit_what_is_measured_on_and_what_is_planned(model, calib):
    cfg = Sensitivity(W4, by="block", windows=2)
    half = Calibration(calib.tokens[:2], batch=2)
    strip = lambda result: [row.metrics for row in result.rows]  # noqa: E731
    assert strip(cfg(model, calib)) == strip(Sensitivity(W4, by="block")(model, half))
    hidden = jax.ShapeDtypeStruct((2, 12, 32), jnp.float32)
    calls = lambda c: c.plan_block(model.blocks[0], hidden, 2, 3).programs[-1].calls  # noqa: E731
    assert calls(Sensitivity(W4, by="block")) == 2 * calls(cfg)


def test_the_measured_model_is_left_alone_and_not_copied(model, calib, tmp_path):
    result = Sensitivity(W4, by="block")(model, calib, Run(StepStore(tmp_path)))
    assert all(new is old for new, old in zip(result.model.blocks, model.blocks, strict=True))
    assert not list(tmp_path.glob("blocks.*"))
    again = Sensitivity(W4, by="block")(model, calib, Run(StepStore(tmp_path)))
    assert again.rows == result.rows  # read, times included


@pytest.mark.parametrize("by", ["site", "linear"])
@pytest.mark.parametrize("target", [4.3, 5.0, 6.1])
def test_the_budget_is_kept_and_no_swap_within_it_is_better(model, calib, target, by):
    cfg = AutoBits(RTN(W4), target, bits=(2, 3, 5, 8), by=by)
    result = cfg(model, calib)
    assert sizes(result.model)["bits_per_weight"] <= target
    losses = {}
    for block, what, bits, kl in prices(result.rows, "AutoBits"):
        losses.setdefault((block, what), {})[bits] = kl
    chosen = {
        (row.block, key.removeprefix("bits:")): bits
        for row in result.rows
        if row.step == "AutoBits"
        for key, bits in row.metrics.items()
        if key.startswith("bits:")
    }
    assert chosen.keys() == losses.keys()
    # The next width up anywhere, where it is better, does not fit beside the rest.
    spare = (target - sizes(result.model)["bits_per_weight"]) * sum(
        get_at(b, p).w.size for b in model.blocks for p in LINEARS
    )
    for (block, what), bits in chosen.items():
        paths = LINEARS_OF[what] if by == "site" else (what,)
        size = sum(get_at(model.blocks[block], p).w.size for p in paths)
        for other, kl in losses[block, what].items():
            if kl < losses[block, what][bits]:
                assert (other - bits) * size > spare


LINEARS_OF = {
    "attn_in": ("attn.q", "attn.k", "attn.v"),
    "attn_out": ("attn.o",),
    "ffn_in": ("ffn.gate", "ffn.up"),
    "ffn_mid": ("ffn.down",),
}
LINEARS = [path for paths in LINEARS_OF.values() for path in paths]


@pytest.mark.parametrize("by", ["site", "linear"])
def test_the_method_found_gives_the_very_same_weights(model, calib, by):
    cfg = AutoBits(GPTQ(W4), 5.0, bits=(2, 4, 8), by=by)
    result = cfg(model, calib)
    found = cfg.found(result.rows)
    assert isinstance(found, GPTQ) and found.overrides
    direct = found(model, calib).model
    for a, b in zip(jax.tree.leaves(result.model), jax.tree.leaves(direct), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_search_that_was_interrupted_continues(model, calib, tmp_path):
    cfg = AutoBits(RTN(W4), 5.0, bits=(2, 4, 8))
    expected = cfg(model, calib)

    class Interrupted(Exception):
        pass

    def stop(name, done, total, rows):
        if (name, done) == ("RTN", 1):
            raise Interrupted

    with pytest.raises(Interrupted):
        cfg(model, calib, Run(StepStore(tmp_path), stop))
    told = []
    result = cfg(model, calib, Run(StepStore(tmp_path), lambda *told_: told.append(told_[:2])))
    assert told == [("AutoBits", 2), ("RTN", 1), ("RTN", 2)]
    assert [r.metrics for r in result.rows] == [r.metrics for r in expected.rows]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(method=SmoothQuant()), "has no weight grid with exceptions; use one with"),
        (dict(by="block"), "by='block' is none of site, linear"),
        (dict(windows=0), "windows=0 is below 1"),
        (dict(bits=()), "must name at least one width"),
        (dict(bits=(4, 9)), "bits=9"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoBits(**{"method": RTN(W4), "target_bits": 4.0, **settings})


def test_what_does_not_fit_the_model_is_refused_before_anything_is_measured(model, calib):
    with pytest.raises(ValueError, match=r"target_bits=2.5 is below 4\.000, what the smallest"):
        AutoBits(RTN(W4), 2.5).check(model)
    with pytest.raises(ValueError, match=r"attn\.q is already quantized to 4 bits, and its sens"):
        AutoBits(RTN(W4), 5.0).check(RTN(W4)(model).model)
    with pytest.raises(ValueError, match="by='head' is none of linear, site, block"):
        Sensitivity(by="head").check(model)
    with pytest.raises(ValueError, match="FlatQuant has one width for all linears at a site"):
        AutoBits(FlatQuant(epochs=1), 6.5, bits=(4, 5), by="linear")(model, calib)
