import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import artefact
from jaxcomp.calibrate import Calibration, Run, StepStore
from jaxcomp.calibrate.plan import plan
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.transforms import Diag, Hadamard, Kron
from jaxcomp.core.tree import named_leaves
from jaxcomp.methods import RTN
from jaxcomp.methods import quarot as module
from jaxcomp.methods.quarot import QuaRot
from jaxcomp.models.decoder import forward, map_blocks
from jaxcomp.models.layers import RMSNorm
from jaxcomp.models.patch import Patch
from tests import tiny

CACHE_ALONE = QuaRot(residual=False, values=False, ffn=False, head_mix="none")


@pytest.fixture(scope="module")
def model():
    return tiny.model("qwen2", jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return tiny.tokens(jax.random.key(1))


def assert_same_function(found, expected, tokens, tolerance=1e-4):
    a, b = forward(found, tokens), forward(expected, tokens)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(jnp.max(b) - jnp.min(b)))


def changed(a, b):
    """Names of leaves that are in both models and differ."""
    a, b = named_leaves(a), named_leaves(b)
    return {name for name in a.keys() & b.keys() if not np.allclose(a[name], b[name], atol=1e-3)}


def test_every_weight_is_rotated_and_every_norm_loses_its_weight(model):
    rotated = QuaRot()(model).model
    names = named_leaves(model)
    kept = {n for n in names if n.split(".")[-1] == "b"}  # biases of q and k; v's are rotated
    assert changed(model, rotated) >= names.keys() - kept
    assert "blocks.0.attn.v.b" in changed(model, rotated)
    norms = [x for name, x in named_leaves(rotated).items() if "norm" in name]
    assert all(np.array_equal(x, np.ones_like(x)) for x in norms)
    assert model.lm_head is None and rotated.lm_head.w.shape == (32, tiny.VOCAB)


def test_the_online_transforms_are_said_by_the_sites(model):
    sites = {k: s.transforms for k, s in QuaRot()(model).model.blocks[0].sites.items()}
    assert sites == {
        "attn_out": (Hadamard(4, inner=8),),
        "ffn_mid": (Hadamard(48),),
        "k_cache": (Hadamard(8),),
        "query": (Hadamard(8),),
    }
    mixed = QuaRot(head_mix="orthogonal")(model).model.blocks[1].sites["attn_out"].transforms[0]
    assert isinstance(mixed, Kron) and mixed.left.shape == (4, 4) and mixed.right is None
    assert CACHE_ALONE(model).model.blocks[0].sites.keys() == {"k_cache", "query"}


def test_the_cache_alone_leaves_every_weight(model):
    assert not changed(model, CACHE_ALONE(model).model)
    assert CACHE_ALONE(model).model.lm_head is None  # and the head stays tied


def test_a_rotated_input_of_the_second_unit_has_no_loud_channel(model):
    table = model.embed.weight.at[:, 5].multiply(100.0)  # an outlier channel of the stream
    loud = model.replace(embed=model.embed.replace(weight=table))
    peak = lambda m: float(  # noqa: E731
        jnp.max(jnp.abs(m.embed.weight)) / jnp.sqrt(jnp.mean(m.embed.weight**2))
    )
    assert peak(QuaRot()(loud).model) < peak(loud) / 3
    (row, *_) = QuaRot()(loud).rows
    assert row.block == 0 and set(row.metrics) == {"weight_peak_before", "weight_peak_after"}


def test_the_seed_decides_the_rotation_and_needs_no_compilation(model, tokens):
    first = QuaRot(seed=1)(model).model
    before = module._rotate._cache_size()
    again, other = (QuaRot(seed=s)(model).model for s in (1, 2))
    assert module._rotate._cache_size() == before
    assert not changed(first, again) and "blocks.0.attn.q.w" in changed(first, other)
    assert_same_function(other, model, tokens)


@pytest.mark.parametrize("offset", [0, 1])
def test_norm_offsets_embedding_scales_and_gates_are_kept_exact(offset, model, tokens):
    def change(i, block):
        norm = lambda p: RMSNorm(p.weight - offset, p.eps, offset)  # noqa: E731
        block = block.replace(attn_norm=norm(block.attn_norm), ffn_norm=norm(block.ffn_norm))
        return block.replace(gate=jnp.float32(0.5)) if i else block

    norm = RMSNorm(model.norm.weight - offset, model.norm.eps, offset)
    embed = model.embed.replace(scale=5.5)
    odd = map_blocks(model, change).replace(embed=embed, norm=norm)
    rotated = QuaRot(head_mix="orthogonal")(odd).model
    assert_same_function(rotated, odd, tokens)
    assert rotated.embed.scale == 5.5 and rotated.blocks[1].gate == 0.5


def test_biases_everywhere_are_rotated_with_their_outputs(tokens):
    fields = dict(attention_bias=True, mlp_bias=True, num_key_value_heads=1)
    model = tiny.model("llama", jax.random.key(3), **fields)
    assert model.blocks[0].ffn.down.b is not None and model.blocks[0].attn.o.b is not None
    rotated = QuaRot()(model).model
    assert_same_function(rotated, model, tokens)
    assert {"blocks.0.ffn.down.b", "blocks.0.attn.o.b"} <= changed(model, rotated)


def test_in_bfloat16_weights_are_rounded_once(model, tokens):
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
    rotated = QuaRot()(stored).model
    for a, b in zip(jax.tree.leaves(rotated), jax.tree.leaves(QuaRot()(wide).model), strict=True):
        np.testing.assert_array_equal(a, b.astype(a.dtype))
    assert_same_function(rotated, stored, tokens, 2e-2)


def test_a_rotated_model_survives_the_artefact(model, tokens, tmp_path):
    rotated = QuaRot(head_mix="orthogonal")(model).model
    artefact.save(rotated, tmp_path / "out")
    loaded = artefact.load(tmp_path / "out", lazy=True)
    np.testing.assert_array_equal(forward(loaded, tokens), forward(rotated, tokens))
    assert loaded.blocks[0].load().sites["ffn_mid"].transforms == (Hadamard(48),)


def test_a_killed_run_continues_with_the_same_rotation(model, tmp_path):
    whole = QuaRot(seed=4)(model)

    def kill(step, done, total, rows):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        QuaRot(seed=4)(model, None, Run(StepStore(tmp_path), kill))
    resumed = QuaRot(seed=4)(model, None, Run(StepStore(tmp_path)))
    found = resumed.model.replace(blocks=tuple(b.load() for b in resumed.model.blocks))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, whole.model))
    assert [r.metrics for r in resumed.rows] == [r.metrics for r in whole.rows]


def test_a_dry_run_knows_the_program(model):
    calib = Calibration(np.zeros((2, 8), np.int32))
    for cfg in (QuaRot(), QuaRot(head_mix="orthogonal", rotation="orthogonal"), CACHE_ALONE):
        (step,) = plan(model, (cfg,), calib)
        assert step.step == "QuaRot" and step.seconds > 0


def without_hadamard(**fields):
    return tiny.model("qwen3", jax.random.key(0), **fields)


@pytest.mark.parametrize(
    ("cfg", "fields", "message"),
    [
        (
            QuaRot(),
            dict(num_attention_heads=9, num_key_value_heads=3),
            r"block 0, site attn_out: n_heads=9: no Hadamard matrix of order 9 .*multiple of 4.*"
            "use head_mix='orthogonal' or head_mix='none'",
        ),
        (
            QuaRot(),
            dict(head_dim=12),
            "block 0, site k_cache: head_dim=12 is no power .*keys=False",
        ),
        (QuaRot(), dict(head_dim=6), "block 0, the values: head_dim=6: no Had.*use values=False"),
        (QuaRot(), dict(intermediate_size=50), "block 0, site ffn_mid: d_ff=50: .*use ffn=False"),
        (
            QuaRot(),
            dict(hidden_size=92),
            "d_model=92: .*odd part 23; .*use rotation='ortho",
        ),
    ],
)
def test_a_size_without_a_hadamard_matrix_names_the_place_and_the_ways_out(cfg, fields, message):
    with pytest.raises(ValueError, match=message):
        cfg.check(without_hadamard(**fields))


def test_the_ways_out_lead_out(tokens):
    fields = dict(num_attention_heads=9, num_key_value_heads=3, hidden_size=54, head_dim=12)
    odd = without_hadamard(intermediate_size=50, **fields)
    way = QuaRot(head_mix="orthogonal", rotation="orthogonal", keys=False, ffn=False)
    assert_same_function(way(odd).model, odd, tokens)
    assert_same_function(dataclasses.replace(way, head_mix="none")(odd).model, odd, tokens)


def test_what_was_rotated_or_quantized_is_refused(model):
    with pytest.raises(ValueError, match=r"block 0, site .* has a transform already: .*as it was"):
        QuaRot()(QuaRot()(model).model)
    with pytest.raises(ValueError, match=r"block 0, attn\.q is already quantized to 4 bits"):
        QuaRot()(RTN()(model).model)
    kv = QuantSpec(4, granularity="head", dynamic=True)
    with pytest.raises(ValueError, match=r"block 0, site k_cache has a quantizer.*QuaRot before"):
        QuaRot()(RTN(weight=None, kv=kv)(model).model)
    post = model.blocks[1].replace(ffn_post_norm=model.blocks[1].ffn_norm)
    gemma = model.replace(blocks=(model.blocks[0], post))
    with pytest.raises(ValueError, match=r"block 1, anatomy: a norm .*use residual=False"):
        QuaRot().check(gemma)
    QuaRot(residual=False).check(gemma)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="head_mix='random' is none of hadamard, orthogonal, none"):
        QuaRot(head_mix="random")
    with pytest.raises(ValueError, match="rotation='none' is none of hadamard, orthogonal"):
        QuaRot(rotation="none")


def test_a_patched_model_is_rotated_with_its_patch():
    model, tokens = tiny.model("llama", jax.random.key(0)), tiny.tokens(jax.random.key(2))
    scale = 1.2 ** jax.random.normal(jax.random.key(5), (32,))
    block = model.blocks[1].replace(patch=Patch((Diag(scale),), skip_first=True))
    model = model.replace(blocks=(model.blocks[0], block))
    rotated, _ = QuaRot()(model)
    np.testing.assert_allclose(forward(rotated, tokens), forward(model, tokens), atol=1e-3)
    assert rotated.blocks[1].patch.transforms[0].right.shape == (32, 32)
