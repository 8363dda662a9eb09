"""Maps across cuts: planted maps are found again, and each kind does what defines it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.calibrate import Calibration
from jaxcomp.calibrate.cuts import fit_cuts
from jaxcomp.calibrate.patch_fit import Fitting, fit_patch
from jaxcomp.core.transforms import Diag, Hadamard, Kron, transform
from jaxcomp.core.tree import get_at, replace_at, replace_many
from jaxcomp.models.attention import plain_context
from jaxcomp.models.decoder import block_forward, forward
from jaxcomp.models.depth import drop
from jaxcomp.models.layers import embed_tokens
from jaxcomp.models.patch import Patch, patch_matrix
from tests import tiny

CALIB = Calibration(np.asarray(tiny.tokens(jax.random.key(1), 8, 16)), batch=3)
A = 1.5 ** jax.random.normal(jax.random.key(7), (32,))
TURNED = Patch((Hadamard(32), Diag(A), Hadamard(32, transposed=True)))
ANY = Patch((Kron(right=jnp.eye(32) + 0.1 * jax.random.normal(jax.random.key(8), (32, 32))),))


@pytest.fixture(scope="module")
def model():
    return tiny.model("qwen3", jax.random.key(0), num_hidden_layers=6)


def planted(model, patch, at=2):
    """The model with a block that is nothing but a map, and the same without this block."""
    blocks = list(model.blocks)
    idle = {p: jnp.zeros_like(get_at(blocks[at], p)) for p in ("attn.o.w", "ffn.down.w")}
    blocks[at] = replace_many(blocks[at], idle).replace(patch=patch)
    rest = tuple(i for i in range(len(blocks)) if i != at)
    original = model.replace(blocks=tuple(blocks))
    return original, original.replace(blocks=tuple(blocks[i] for i in rest), kept=rest)


def fitted(how, model, original, calib=CALIB, **settings):
    """The patched model, the patches and what was measured."""
    found = {}
    branch = how.kind == "mlp_branch"
    fit = functools.partial(fit_patch, how, found)
    patches = fit_cuts(model, original, calib, fit, branch=branch, **settings)
    blocks = [b.replace(patch=patches.get(i, b.patch)) for i, b in enumerate(model.blocks)]
    return model.replace(blocks=tuple(blocks)), patches, found


def states(model, tokens):
    x = embed_tokens(model.embed, jnp.asarray(tokens), "float32")
    out = [np.asarray(x, np.float64)]
    for block in model.blocks:
        x = block_forward(block, x, plain_context(*tokens.shape))
        out.append(np.asarray(x, np.float64))
    return out


@pytest.mark.parametrize(
    ("how", "patch"),
    [
        (Fitting("hadamard"), TURNED),
        (Fitting("hadamard", reduction="mean_of_ratios", form="dense"), TURNED),
        (Fitting("diag"), Patch((Diag(A),))),
        (Fitting("scalar"), Patch((Diag(jnp.full(32, 1.3)),))),
        (Fitting("lstsq", ridge=0.0), ANY),
    ],
)
@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_a_map_of_its_own_kind_is_found_again_and_mends_the_model(how, patch, inputs, model):
    original, pruned = planted(model, patch)
    mended, patches, found = fitted(how, pruned, original, inputs=inputs)
    assert patches.keys() == {2}
    np.testing.assert_allclose(patch_matrix(patches[2], 32), patch_matrix(patch, 32), atol=2e-3)
    tokens = tiny.tokens(jax.random.key(3))
    np.testing.assert_allclose(forward(mended, tokens), forward(original, tokens), atol=5e-3)
    assert found[2]["error_after"] < 1e-5 < found[2]["error_before"]
    assert (found[2]["start"], found[2]["end"]) == (2, 3)


def test_every_rotated_channel_gets_the_magnitude_that_it_had(model):
    pruned = drop(model, (2, 3))
    _, patches, _ = fitted(Fitting("hadamard"), pruned, model)
    x, p = states(model, CALIB.tokens), np.asarray(patch_matrix(patches[2], 32), np.float64)
    h = np.asarray(transform(Hadamard(32), jnp.eye(32)), np.float64)
    size = lambda a: np.abs(a).mean((0, 1))  # noqa: E731
    np.testing.assert_allclose(size(x[2] @ p @ h), size(x[4] @ h), rtol=1e-4)
    assert np.abs(size(x[2] @ h) / size(x[4] @ h) - 1).max() > 0.1
    per_window = lambda a: np.abs(a @ h).mean(1)  # noqa: E731
    _, other, _ = fitted(Fitting("hadamard", reduction="mean_of_ratios"), pruned, model)
    expected = (per_window(x[4]) / per_window(x[2])).mean(0)
    np.testing.assert_allclose(other[2].transforms[1].scale, expected, rtol=1e-4)


def test_least_squares_leaves_the_smallest_error_of_all_kinds(model):
    pruned, x = drop(model, (2, 3)), states(model, CALIB.tokens)
    gaps = {}
    for kind in ("hadamard", "diag", "scalar", "lstsq"):
        _, patches, _ = fitted(Fitting(kind, ridge=0.0), pruned, model)
        gaps[kind] = np.sum((x[2] @ np.asarray(patch_matrix(patches[2], 32)) - x[4]) ** 2)
    assert gaps["lstsq"] == min(gaps.values()) and gaps["lstsq"] < np.sum((x[2] - x[4]) ** 2)


def test_a_ridge_without_end_gives_the_identity(model):
    _, patches, _ = fitted(Fitting("lstsq", ridge=1e9), drop(model, (2,)), model)
    np.testing.assert_allclose(patch_matrix(patches[2], 32), np.eye(32), atol=1e-6)


def test_blocks_that_did_nothing_get_a_map_that_does_nothing(model):
    original, pruned = planted(model, None)
    for kind in ("hadamard", "diag", "scalar", "lstsq", "mlp_branch"):
        _, patches, _ = fitted(Fitting(kind), pruned, original)
        np.testing.assert_allclose(patch_matrix(patches[2], 32), np.eye(32), atol=1e-5)


def test_the_first_token_is_out_of_sight_where_it_is_skipped(model):
    original, pruned = planted(model, ANY)
    changed = CALIB.tokens.copy()
    changed[:, 0] = (changed[:, 0] + 1) % tiny.VOCAB
    blind = lambda m: m.replace(  # noqa: E731
        blocks=tuple(b.replace(attn=b.attn.replace(window=1)) for b in m.blocks)
    )
    other = Calibration(changed, CALIB.batch)
    for skip, same in ((True, True), (False, False)):
        how = Fitting("diag", skip_first=skip)
        scales = [
            fitted(how, blind(pruned), blind(original), calib)[1][2].transforms[0].scale
            for calib in (CALIB, other)
        ]
        assert np.allclose(*scales, rtol=1e-6) == same
        assert fitted(how, pruned, original)[1][2].skip_first == skip


def test_a_run_of_blocks_is_one_cut_and_cuts_are_fitted_on_the_original_alone(model):
    pruned = drop(model, (1, 2, 4))
    _, patches, found = fitted(Fitting("diag"), pruned, model)
    assert {i: (n["start"], n["end"]) for i, n in found.items()} == {1: (1, 3), 2: (4, 5)}
    alone = fitted(Fitting("diag"), drop(model, (4,)), model)[1]
    np.testing.assert_allclose(
        patches[2].transforms[0].scale, alone[4].transforms[0].scale, rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["lstsq", "mlp_branch"])
def test_on_its_own_prefix_a_later_map_makes_up_for_the_earlier_cut(kind, model):
    how, pruned = Fitting(kind, ridge=1e-6), drop(model, (1, 3, 4))
    compressed = fitted(how, pruned, model, inputs="compressed")
    original = fitted(how, pruned, model)
    np.testing.assert_allclose(  # up to the first cut nothing is different
        patch_matrix(compressed[1][1], 32), patch_matrix(original[1][1], 32), atol=1e-4
    )
    assert (
        np.abs(patch_matrix(compressed[1][2], 32) - patch_matrix(original[1][2], 32)).max() > 0.01
    )
    if kind == "lstsq":
        wanted = states(model, CALIB.tokens)[5]
        gaps = []
        for mended, patches, _ in (compressed, original):
            x = states(mended, CALIB.tokens)[2] @ np.asarray(patch_matrix(patches[2], 32))
            gaps.append(np.sum((x - wanted) ** 2))
        assert gaps[0] < gaps[1]


def test_a_map_of_the_unit_before_the_cut_changes_what_it_adds(model):
    """Folded into `down`, T gives behind the block x + M T with M what the unit added."""
    pruned = drop(model, (2, 3))
    _, patches, found = fitted(Fitting("mlp_branch", ridge=0.0), pruned, model)
    t = np.asarray(patch_matrix(patches[2], 32), np.float64)
    x, block = states(model, CALIB.tokens), model.blocks[1]
    bare = replace_at(block, "ffn.down.w", jnp.zeros_like(block.ffn.down.w))
    middle = states(model.replace(blocks=(model.blocks[0], bare)), CALIB.tokens)[2]
    branch = x[2] - middle
    folded = replace_at(block, "ffn.down.w", block.ffn.down.w @ jnp.asarray(t, jnp.float32))
    found_states = states(model.replace(blocks=(model.blocks[0], folded)), CALIB.tokens)[2]
    np.testing.assert_allclose(found_states, middle + branch @ t, atol=1e-4)
    rows = branch.reshape(-1, 32)
    best = np.linalg.lstsq(rows, (x[4] - middle).reshape(-1, 32), rcond=None)[0]
    np.testing.assert_allclose(t, best, atol=2e-2)
    assert found[2]["error_after"] < found[2]["error_before"]


def test_another_stream_silent_channels_and_too_few_tokens_are_refused(model):
    pruned = drop(model, (2,))
    turned = pruned.replace(embed=pruned.embed.replace(weight=2 * pruned.embed.weight))
    with pytest.raises(ValueError, match="the embedding is not the original's"):
        fitted(Fitting("diag"), turned, model)
    few = Calibration(CALIB.tokens[:1], 1)
    with pytest.raises(
        ValueError, match=r"the cut \[2, 3\): 16 tokens do not determine a map of 32"
    ):
        fitted(Fitting("lstsq", ridge=0.0), pruned, model, few)
    zero = jnp.zeros(32).at[3:].set(1.0)
    mute = lambda block: replace_many(  # noqa: E731
        block, {p: get_at(block, p) * zero for p in ("attn.o.w", "ffn.down.w")}
    )
    embed = model.embed.replace(weight=model.embed.weight * zero)
    silent = model.replace(embed=embed, blocks=tuple(map(mute, model.blocks)))
    with pytest.raises(ValueError, match="3 of 32 channels are 0 on one side of the cut"):
        fitted(Fitting("diag"), drop(silent, (2,)), silent)
    assert fitted(Fitting("diag", eps=1e-6), drop(silent, (2,)), silent)[1]
    damaged = replace_at(
        model.blocks[1], "ffn.down.w", jnp.full_like(model.blocks[1].ffn.down.w, jnp.nan)
    )
    broken = model.replace(blocks=(model.blocks[0], damaged, *model.blocks[2:]))
    with pytest.raises(ValueError, match="the output of block 1 of the original, batch, 0"):
        fitted(Fitting("diag"), drop(broken, (2,)), broken)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kind="best"), "kind='best' is none of hadamard"),
        (dict(reduction="sum"), "reduction='sum' is none of"),
        (dict(ridge=-1.0), "ridge=-1.0 is not a number from 0"),
        (dict(eps=float("nan")), "eps=nan is not"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Fitting(**settings)
