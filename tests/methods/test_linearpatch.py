import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp
from jaxcomp import artefact
from jaxcomp.calibrate import Calibration, Run, StepStore
from jaxcomp.calibrate.comparison import compare
from jaxcomp.calibrate.plan import check_steps, plan
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.tree import get_at, named_leaves, replace_at
from jaxcomp.export import export
from jaxcomp.methods import GPTQ, RTN, FlatQuant, LinearPatch, PruneBlocks, QuaRot
from jaxcomp.models.decoder import forward
from jaxcomp.models.depth import drop
from jaxcomp.models.patch import patch_matrix
from jaxcomp.recipe import CalibSpec, Recipe
from tests import tiny

CALIB = Calibration(np.asarray(tiny.tokens(jax.random.key(1), 8, 16)), batch=4)
TOKENS = tiny.tokens(jax.random.key(2))


@pytest.fixture(scope="module")
def model():
    return tiny.model("qwen2", jax.random.key(0), num_hidden_layers=5)


def patched_at(model):
    return [i for i, block in enumerate(model.blocks) if block.patch is not None]


def test_one_step_that_chooses_is_two_steps(model):
    alone = LinearPatch(remove=2)(model, CALIB)
    pruned = PruneBlocks(2, "block_cos")(model, CALIB)
    after = LinearPatch()(pruned.model, CALIB, Run(original=model))
    assert alone.model.kept == after.model.kept and len(patched_at(alone.model)) == 1
    a, b = named_leaves(alone.model), named_leaves(after.model)
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    hand = LinearPatch(remove=2).found(alone.rows)
    assert hand.blocks == tuple(i for i in range(5) if i not in alone.model.kept)
    assert hand.remove is None and LinearPatch().found(after.rows) == LinearPatch()


def test_every_cut_gets_one_patch_and_its_row(model):
    result = LinearPatch(blocks=(1, 3))(model, CALIB)
    assert patched_at(result.model) == [1, 2]
    rows = {r.block: r.metrics for r in result.rows if r.step == "LinearPatch"}
    assert rows.keys() == {0, 1, 2} and not rows[0]
    assert (rows[1]["start"], rows[1]["end"], rows[2]["start"]) == (1, 2, 3)
    assert rows[1]["error_after"] != rows[1]["error_before"]


def test_a_cut_at_the_very_end_is_named(model):
    rows = LinearPatch("diag", blocks=(1, 4))(model, CALIB).rows
    assert "blocks 4 to 4 are removed at the very end" in rows[-1].metrics["warning 1"]
    assert rows[-1].block is None


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "olmo2", "phi3"])
@pytest.mark.parametrize("blocks", [(2, 3), (1, 3)])
def test_a_folded_scalar_is_the_patch(family, blocks):
    """Biases, norms behind the units and none before them: what writes behind a cut is scaled, and
    nothing else changes, so a tied head stays tied."""
    model = tiny.model(family, jax.random.key(0), num_hidden_layers=5)
    folded = LinearPatch("scalar", blocks=blocks)(model, CALIB).model
    explicit = LinearPatch("scalar", blocks=blocks, fold=False)(model, CALIB).model
    assert not patched_at(folded) and patched_at(explicit)
    planned = check_steps(model, (LinearPatch("scalar", blocks=blocks),), CALIB)
    assert folded.lm_head is model.lm_head and folded.embed is model.embed
    assert (planned.lm_head is None) == (model.lm_head is None)
    a, b = forward(folded, TOKENS), forward(explicit, TOKENS)
    np.testing.assert_allclose(a, b, atol=1e-3 * float(jnp.abs(b).max()))
    assert np.abs(a - forward(drop(model, blocks), TOKENS)).max() > 0.01 * float(jnp.abs(b).max())


@pytest.mark.parametrize("kind", ["scalar", "mlp_branch"])
def test_what_is_folded_leaves_a_mark_and_is_not_folded_again(model, kind, tmp_path):
    folded = LinearPatch(kind, blocks=(1, 3))(model, CALIB).model
    assert len(folded.stream) == 3 and (folded.stream == (1.0,) * 3) == (kind == "mlp_branch")
    assert folded.stream[0] == 1.0 and LinearPatch("diag", blocks=(1,))(model, CALIB)
    assert drop(folded, (1,)).stream == folded.stream[::2]
    with pytest.raises(ValueError, match="folded into the model already; patch it once"):
        LinearPatch(kind)(folded, CALIB, Run(original=model))
    artefact.save(folded, tmp_path / "m")
    assert artefact.load(tmp_path / "m").stream == folded.stream


def test_a_folded_scalar_is_compared_as_the_patch_is(model):
    """Of another size than the original's, the stream means the same."""
    models = (
        LinearPatch("scalar", blocks=(1, 3), fold=f)(model, CALIB).model for f in (True, False)
    )
    folded, explicit = (compare(model, m, np.asarray(TOKENS)) for m in models)
    for name in ("median", "energy", "local"):
        np.testing.assert_allclose(folded.depth[name], explicit.depth[name], rtol=1e-3, atol=1e-7)


def test_only_what_a_scalar_changes_has_to_be_dense():
    """Norms behind the units take the scale; without norms before them the readers are divided."""
    codes = lambda m: RTN(QuantSpec(4))(m, None).model  # noqa: E731
    gemma = tiny.model("gemma3_text", jax.random.key(0), num_hidden_layers=5)
    quantized = codes(gemma)
    folded, explicit = (
        LinearPatch("scalar", blocks=(2,), fold=f)(quantized, CALIB).model for f in (True, False)
    )
    a, b = forward(folded, TOKENS), forward(explicit, TOKENS)
    np.testing.assert_allclose(a, b, atol=1e-3 * float(jnp.abs(b).max()))
    olmo = tiny.model("olmo2", jax.random.key(0), num_hidden_layers=5)
    for name in ("ffn.up", "attn.q"):
        last = replace_at(olmo.blocks[4], name, get_at(codes(olmo).blocks[4], name))
        one = olmo.replace(blocks=(*olmo.blocks[:4], last))
        with pytest.raises(ValueError, match=f"block 4, {name} is already quantized"):
            LinearPatch("scalar", blocks=(2,)).check(one)
    early = olmo.replace(blocks=(*codes(olmo).blocks[:2], *olmo.blocks[2:]))
    LinearPatch("scalar", blocks=(2,)).check(early)
    static = RTN(None, act=QuantSpec(8, granularity="tensor"))
    ranged = static(olmo, CALIB).model
    with pytest.raises(ValueError, match="block 2, attn_in reads the residual stream itself"):
        LinearPatch("scalar", blocks=(2,)).check(ranged)


def test_the_dense_form_computes_what_the_factors_compute(model):
    factors, dense = (
        LinearPatch(blocks=(2,), form=form)(model, CALIB).model for form in ("factors", "dense")
    )
    np.testing.assert_allclose(forward(factors, TOKENS), forward(dense, TOKENS), atol=1e-4)
    assert len(dense.blocks[2].patch.transforms) == 1


@pytest.mark.parametrize("rotation", ["block", "orthogonal"])
def test_a_width_without_a_hadamard_matrix_has_ways_out(rotation):
    model = tiny.model("llama", jax.random.key(0), num_hidden_layers=3, hidden_size=92)
    with pytest.raises(ValueError, match=r"d_model=92: no Hadamard.*odd part 23.*rotation='block'"):
        LinearPatch(blocks=(1,)).check(model)
    step = LinearPatch(blocks=(1,), rotation=rotation)
    patch = step(model, CALIB).model.blocks[1].patch
    p = np.asarray(patch_matrix(patch, 92))
    np.testing.assert_allclose(p, p.T, atol=1e-5)
    scale = patch.transforms[1].scale
    np.testing.assert_allclose(np.linalg.eigvalsh(p), np.sort(scale), atol=1e-4)


def test_a_killed_step_goes_on_with_the_maps_that_it_found(model, tmp_path):
    class Killed(Exception):
        pass

    def die(name, done, total, rows):
        if rows:  # the first block of the last walk
            raise Killed

    step, run = LinearPatch("mlp_branch", remove=2), Run(StepStore(tmp_path / "s"), die)
    with pytest.raises(Killed):
        step(model, CALIB, run)
    told = []
    again = step(
        model, CALIB, Run(run.store, lambda name, done, total, rows: told.append((done, total)))
    )
    assert told == [(1, 3), (2, 3), (3, 3)]  # nothing is measured again
    expected = step(model, CALIB)
    assert [r.metrics for r in again.rows] == [r.metrics for r in expected.rows]
    np.testing.assert_array_equal(forward(again.model, TOKENS), forward(expected.model, TOKENS))


@pytest.mark.parametrize(
    "steps",
    [
        (PruneBlocks(2, "bi"), LinearPatch(), GPTQ(QuantSpec(8))),
        pytest.param(
            (LinearPatch("lstsq", remove=2), FlatQuant(QuantSpec(8), epochs=1, act=None)),
            marks=pytest.mark.slow,
        ),
        (LinearPatch(remove=2, skip_first=True), QuaRot(), RTN(QuantSpec(8))),
        (LinearPatch("scalar", remove=2), RTN(QuantSpec(8))),
    ],
    ids=["then GPTQ", "then FlatQuant", "then QuaRot", "scalar then RTN"],
)
def test_a_patched_model_is_planned_and_quantized_like_any_other(steps, model):
    planned, found, patched = check_steps(model, steps, CALIB), model, None
    for step in steps:
        found, _ = step(found, CALIB, Run(original=model))
        patched = found if isinstance(step, LinearPatch) else patched
    expected = forward(patched, TOKENS)
    gap = np.asarray(forward(found, TOKENS) - expected)
    assert 0 < np.sum(gap**2) < 3e-3 * float(jnp.sum(expected**2))
    assert len(planned.blocks) == len(found.blocks) == 3
    assert len(patched_at(planned)) == len(patched_at(found))


def test_a_dry_run_reads_nothing_and_takes_its_time(model):
    steps = plan(model, (PruneBlocks(1, "bi"), LinearPatch(inputs="compressed")), CALIB)
    assert [s.step for s in steps] == ["PruneBlocks", "LinearPatch"]
    assert all(s.seconds > 0 for s in steps)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (LinearPatch(), "no cut with a block behind it"),
        (LinearPatch(blocks=(4,)), "no cut with a block behind it"),
        (LinearPatch(blocks=(0,)), "the first block is removed.*allow_first=True"),
        (LinearPatch("mlp_branch", blocks=(0,), allow_first=True), "has no unit there"),
        (LinearPatch(remove=4), "of the 5 blocks 3 may go"),
        (LinearPatch(blocks=(7,)), "no block 7"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_begins(step, message, model):
    with pytest.raises(ValueError, match=message):
        check_steps(model, (step,), CALIB)


def test_a_cut_before_all_blocks_is_patched_on_request(model):
    for kind in ("diag", "scalar"):
        result = LinearPatch(kind, blocks=(0,), allow_first=True)(model, CALIB)
        assert jnp.isfinite(forward(result.model, TOKENS)).all()
        assert result.model.kept == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kind="x"), "kind='x' is none of"),
        (dict(inputs="x"), "inputs='x' is none of"),
        (dict(remove=1, blocks=(1,)), "give one of them"),
        (dict(kind="scalar", skip_first=True), "fold=False"),
        (dict(kind="mlp_branch", skip_first=True), "folds into weights"),
        (dict(remove=1, metric="x"), "metric='x'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LinearPatch(**settings)


def test_the_original_is_asked_for_and_must_be_the_one_that_was_pruned(model):
    pruned = drop(model, (2,))
    with pytest.raises(ValueError, match=r"LinearPatch looks at the model as it was"):
        LinearPatch()(pruned, CALIB)
    with pytest.raises(ValueError, match="nothing is missing between the original and the model"):
        LinearPatch()(pruned, CALIB, Run(original=pruned))
    with pytest.raises(ValueError, match=r"keeps block 1 .* which the original given lacks"):
        LinearPatch()(pruned, CALIB, Run(original=drop(model, (1,))))
    twice = drop(pruned, (2,))  # block 3 of the model that was first pruned
    result = LinearPatch("diag")(twice, CALIB, Run(original=pruned))
    assert [r.metrics.get("start") for r in result.rows] == [None, None, 2]
    alone = LinearPatch("diag", blocks=(2,))(drop(model, (0,)), CALIB)  # 0 was no cut of its own
    assert alone.model.kept == (1, 2, 4) and patched_at(alone.model) == [2]


def test_codes_and_patches_that_are_there_already_are_refused(model):
    quantized, _ = RTN(QuantSpec(4))(drop(model, (2,)), None)
    with pytest.raises(ValueError, match=r"block 2, \S+ is already quantized to 4 bits"):
        LinearPatch("scalar").check(quantized)
    LinearPatch("diag").check(quantized)
    once = LinearPatch("diag", blocks=(2,))(model, CALIB).model
    with pytest.raises(ValueError, match="block 2 carries a patch already"):
        LinearPatch("diag").check(once)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    there = tmp_path_factory.mktemp("hf")
    (there / "text.txt").write_text(" ".join(tiny.SENTENCES * 40))
    return tiny.checkpoint("qwen2", jax.random.key(0), there / "model", num_hidden_layers=5)


def compressed(source, out, *steps):
    calib = CalibSpec(str(source.parent / "text.txt"), samples=4, length=16, batch=2)
    return jaxcomp.compress(source, Recipe(steps, calib), out)


@pytest.mark.parametrize("kind", ["scalar", "mlp_branch"])
def test_what_folds_is_exported_and_computes_the_same_elsewhere(kind, source, tmp_path):
    import torch
    import transformers

    compressed(source, tmp_path / "out", LinearPatch(kind, remove=2))
    export(tmp_path / "out", "hf", tmp_path / "export")
    there = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", dtype=torch.float32
    )
    with torch.no_grad():
        found = there(torch.asarray(np.asarray(TOKENS, np.int64))).logits.numpy()
    expected = forward(jaxcomp.load(tmp_path / "out").model, TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("format", ["hf", "compressed-tensors", "gguf", "ascend"])
def test_what_does_not_fold_has_no_place_in_other_formats(format, source, tmp_path):
    compressed(source, tmp_path / "out", PruneBlocks(2, "bi"), LinearPatch(), RTN(QuantSpec(8)))
    with pytest.raises(ValueError, match=r"block \d maps its input by a patch.*kind='scalar'"):
        export(tmp_path / "out", format, tmp_path / "export")
    loaded = jaxcomp.load(tmp_path / "out")
    assert len(patched_at(loaded.model)) == 1 and loaded.model.kept
    text = jaxcomp.generate(loaded, "In 1492", 4)
    assert text is not None
    found = json.loads((tmp_path / "out" / "found_recipe.json").read_text())
    assert found["steps"][0]["blocks"]
