import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import artefact
from jaxcomp.calibrate.comparison import compare, residual_rotation
from jaxcomp.calibrate.flatness import CURVE, channel_curve
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.transforms import Diag
from jaxcomp.methods import RTN
from jaxcomp.methods.quarot import QuaRot
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import forward
from jaxcomp.models.depth import drop
from jaxcomp.models.patch import Patch
from tests import tiny

SITES = ["attn_in", "attn_out", "ffn_in", "ffn_mid"]


@pytest.fixture(scope="module")
def model():
    return tiny.model("qwen2", jax.random.key(0), num_hidden_layers=3)


@pytest.fixture(scope="module")
def tokens():
    return np.asarray(tiny.tokens(jax.random.key(1), 1, 48))


@pytest.fixture(scope="module")
def rounded(model):
    return RTN(QuantSpec(4))(model, None).model


@pytest.fixture(scope="module")
def rotated(model):
    return QuaRot()(model).model


def flatness(comparison, kind, when):
    return np.array([entry[kind][when]["flatness"] for entry in comparison.flatness])


def test_a_model_beside_itself_has_no_error_and_the_same_curves(model, tokens):
    found = compare(model, model, tokens)
    assert found.depth == {"rotated": False} | dict.fromkeys(
        ("median", "energy", "local"), [0.0] * 4
    )
    assert found.output == {"kl": 0.0, "top1": 1.0} and found.tokens == 48
    assert [(e["block"], e["site"]) for e in found.flatness] == [
        (i, site) for i in range(3) for site in SITES
    ]
    for entry in found.flatness:
        assert entry["activation"]["before"] == entry["activation"]["after"]
        assert entry["weight"]["before"] == entry["weight"]["after"]


def test_a_rotated_model_has_no_error_either_but_other_channels(model, rotated, tokens):
    found = compare(model, rotated, tokens)
    assert found.depth["rotated"] and found.output["top1"] == 1.0
    assert max(found.depth["median"] + found.depth["energy"] + found.depth["local"]) < 1e-9
    before, after = (flatness(found, "weight", when) for when in ("before", "after"))
    assert np.all(np.abs(before - after) > 1e-4)


def test_rounding_errs_alike_in_a_rotated_model_and_grows_with_depth(model, rotated, tokens):
    plain = compare(model, RTN(QuantSpec(4))(model, None).model, tokens)
    turned = compare(model, RTN(QuantSpec(4))(rotated, None).model, tokens)
    for found in (plain, turned):
        median, local = found.depth["median"], found.depth["local"]
        assert median[0] < 1e-9 and 0 < median[1] < median[2] < median[3]
        assert median[1] == pytest.approx(local[1], rel=1e-4) and local[3] < median[3]
        assert found.output["kl"] > 0
    np.testing.assert_allclose(turned.depth["median"][1:], plain.depth["median"][1:], rtol=2.0)


def test_a_rounded_embedding_is_not_taken_for_a_rotated_one(model, rotated):
    noise = 0.02 * jax.random.normal(jax.random.key(2), model.embed.weight.shape)
    noisy = lambda m: m.replace(embed=m.embed.replace(weight=m.embed.weight + noise))  # noqa: E731
    assert residual_rotation(model, noisy(model)) == (None, "")
    r, reason = residual_rotation(model, noisy(rotated))
    assert reason == "" and np.allclose(r @ r.T, np.eye(32), atol=1e-5)


def test_models_that_cannot_be_compared_in_depth_say_why(model, tokens):
    other = tiny.model("qwen2", jax.random.key(9), num_hidden_layers=3)
    found = compare(model, other, tokens)
    assert found.depth["skipped"].startswith("no rotation brings") and len(found.flatness) == 12
    shorter = model.replace(blocks=model.blocks[:2])
    found = compare(model, shorter, tokens)
    assert found.depth == {"skipped": "the models have 3 and 2 blocks"} and not found.flatness
    assert found.output["kl"] > 0


def test_one_loud_token_decides_the_energy_and_not_the_median(model, rounded, tokens):
    quiet = compare(model, rounded, tokens).depth
    word = tokens[0, 0]
    loud = lambda m: m.replace(  # noqa: E731
        embed=m.embed.replace(weight=m.embed.weight.at[word, 3].set(1e4))
    )
    found = compare(loud(model), loud(rounded), tokens).depth
    assert found["energy"][3] < 1e-3 * quiet["energy"][3]
    assert found["median"][3] > 0.3 * quiet["median"][3]


def test_handles_give_what_memory_gives(model, rounded, tokens, tmp_path):
    for name, m in (("a", model), ("b", rounded)):
        artefact.save(m, tmp_path / name)
    lazy = [artefact.load(tmp_path / name, lazy=True) for name in ("a", "b")]
    seen = []
    found = compare(*lazy, tokens, lambda pairs: (seen.append(1) or pair for pair in pairs))
    assert dataclasses.asdict(found) == dataclasses.asdict(compare(model, rounded, tokens))
    assert len(seen) == 3


def test_channels_that_are_alike_are_flat_and_a_single_one_is_not():
    even = channel_curve(np.full(100, 9.0))
    assert even == {"flatness": 0.0, "rms": 3.0, "channels": [1.0] * CURVE}
    one = channel_curve(np.eye(100)[7])
    assert one["flatness"] == pytest.approx(np.sqrt(2 - 2 / 10), rel=1e-3)
    assert one["channels"][0] == 10 and one["channels"][-1] == 0
    assert channel_curve(np.zeros(4))["flatness"] == 1.0


def test_the_weight_curve_is_of_the_input_channels_of_all_consumers(model, tokens):
    entry = compare(model, model, tokens).flatness[0]
    assert entry["consumers"] == list(anatomy(model.blocks[0])["attn_in"].consumers)
    attn = model.blocks[0].attn
    together = np.concatenate([attn.q.w, attn.k.w, attn.v.w], axis=1)
    norms = np.sort(np.linalg.norm(together, axis=1))
    curve = entry["weight"]["before"]
    assert curve["rms"] == pytest.approx(float(jnp.sqrt(np.mean(norms**2))), rel=1e-3)
    assert curve["channels"][0] == pytest.approx(norms[-1] / curve["rms"], rel=1e-3)


def test_a_pruned_model_departs_where_blocks_are_missing_and_is_compared_with_its_own(tokens):
    model = tiny.model("qwen2", jax.random.key(0), num_hidden_layers=5)
    pruned = drop(model, (1, 4))
    found = compare(model, pruned, tokens)
    median, local = (np.array(found.depth[name]) for name in ("median", "local"))
    assert len(median) == 4 and (median[:2] == 0).all() and (median[2:] > 1e-3).all()
    assert (local == 0).all()  # every block that is left is what it was
    assert found.output["kl"] > 0 and [e["block"] for e in found.flatness[::4]] == [0, 1, 2]
    expected = np.asarray(jax.nn.log_softmax(forward(model, tokens)), np.float64)
    other = np.asarray(jax.nn.log_softmax(forward(pruned, tokens)), np.float64)
    kl = np.mean(np.sum(np.exp(expected) * (expected - other), -1))
    assert found.output["kl"] == pytest.approx(kl, rel=1e-3)
    nameless = pruned.replace(kept=None)
    assert compare(model, nameless, tokens).depth == {"skipped": "the models have 5 and 3 blocks"}
    ones = Patch((Diag(jnp.full(32, 2.0)),))
    scaled = pruned.replace(
        blocks=(pruned.blocks[0], pruned.blocks[1].replace(patch=ones), pruned.blocks[2])
    )
    patched = compare(model, scaled, tokens).depth
    assert (np.array(patched["local"]) == 0).all() and patched["median"] != found.depth["median"]
