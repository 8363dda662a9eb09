"""A packed directory is a model like any other: every command works on it, or says why not."""

import json

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import jaxcomp
from jaxcomp import artefact, job
from jaxcomp.__main__ import app
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.evals import Perplexity
from jaxcomp.hub import open_checkpoint
from jaxcomp.methods import GPTQ, RTN
from jaxcomp.models.decoder import iter_blocks
from jaxcomp.recipe import CalibSpec, Recipe
from tests import packed, tiny

GROUP = dict(targets=["Linear"], weights=dict(num_bits=4, group_size=16))
TOKEN8 = dict(num_bits=8, strategy="token", dynamic=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The same codes in three formats, the weights they stand for, and a text."""
    place = tmp_path_factory.mktemp("use")
    found = {n: packed.quantized(w, 4, 16) for n, w in packed.modules().items()}
    ct = {n: packed.ct_tensors(n, q, True) for n, q in found.items()}
    gptq = {n: packed.gptq_tensors(n, q) for n, q in found.items()}
    awq = {n: packed.awq_tensors(n, q) for n, q in found.items()}
    weights = {n: {f"{n}.weight": q.dense} for n, q in found.items()}
    grid = dict(bits=4, group_size=16)
    packed.directory(place / "ct", ct, packed.ct_config({"g": GROUP}))
    packed.directory(place / "gptq", gptq, dict(quant_method="gptq", **grid))
    packed.directory(place / "awq", awq, dict(quant_method="awq", version="gemm", **grid))
    packed.directory(place / "dense", weights, None)
    (place / "text.txt").write_text(" ".join(tiny.SENTENCES * 8))
    return place


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120"})


def calibration(place):
    return CalibSpec(str(place / "text.txt"), samples=4, length=16)


@pytest.mark.parametrize("format", ["ct", "gptq", "awq"])
def test_perplexity_and_text_are_those_of_the_dequantized_model(format, place):
    evaluation = Perplexity(str(place / "text.txt"), context=16, tokens=60)
    one, other = (job.load(place / name, lazy=True) for name in (format, "dense"))
    numbers = job.evaluate(one, [evaluation])[evaluation.name]
    wanted = job.evaluate(other, [evaluation])[evaluation.name]
    np.testing.assert_allclose(numbers["perplexity"], wanted["perplexity"], rtol=1e-5)
    prompt = tiny.SENTENCES[0]
    assert jaxcomp.generate(one, prompt, 8) == jaxcomp.generate(other, prompt, 8) != ""


@pytest.mark.parametrize(
    ("format", "grid"),
    [("ct", "4 bit, groups of 16, symmetric"), ("awq", "4 bit, groups of 16, asymmetric")],
)
def test_inspect_shows_the_grids(format, grid, place):
    result = run("inspect", place / format, "--check")
    assert result.exit_code == 0, result.output
    assert grid in result.output and "intact" in result.output


def test_gptq_becomes_compressed_tensors_with_the_codes_it_had(place, tmp_path):
    result = run("export", place / "gptq", "-f", "compressed-tensors", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    before, after = packed.tensors_of(place / "ct"), packed.tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(x, after[name], err_msg=name)


def test_a_dense_export_says_nothing_of_codes(place, tmp_path):
    result = run("export", place / "ct", "--format", "hf", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    before, after = (packed.tensors_of(p) for p in (place / "dense", tmp_path / "out"))
    assert before.keys() == after.keys()
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_rounding_leaves_what_is_quantized_and_adds_the_rest(place, tmp_path):
    act = QuantSpec(8, granularity="token", dynamic=True)
    recipe = Recipe(steps=(RTN(act=act),))
    report = jaxcomp.compress(place / "ct", recipe, tmp_path / "out", compare=False)
    skipped = [row for row in report.rows if "skipped" in row.metrics]
    assert len(skipped) == 14 and skipped[0].metrics["skipped"] == "already quantized to 4 bits"
    made, source = artefact.load(tmp_path / "out"), open_checkpoint(place / "ct").model
    for a, b in zip(iter_blocks(made), iter_blocks(source), strict=True):
        assert a.sites["ffn_mid"].quantizer.spec == act and not b.sites
        jax.tree.map(np.testing.assert_array_equal, a.replace(sites={}), b)
    assert "quantization_config" not in artefact.read_json(tmp_path / "out", "config.json")


def test_gptq_says_that_the_weights_are_quantized(place, tmp_path):
    recipe = Recipe(steps=(GPTQ(),), calib=calibration(place))
    with pytest.raises(ValueError, match=r"block 0, attn.q is already quantized to 4 bits; GPTQ"):
        jaxcomp.compress(place / "gptq", recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_w8a8_runs_in_integers(place, tmp_path):
    tensors = {}
    for name, w in packed.modules().items():
        q = packed.quantized(w, 8)
        codes = (q.codes - 128).astype(np.int8)
        tensors[name] = {f"{name}.weight": codes, f"{name}.weight_scale": q.scale}
    group = dict(
        targets=["Linear"], weights=dict(num_bits=8, group_size=-1), input_activations=TOKEN8
    )
    config = packed.ct_config({"g": group}, format="int-quantized")
    packed.directory(tmp_path, tensors, config)
    evaluation = Perplexity(str(place / "text.txt"), context=16, tokens=30)
    a, b = (
        job.evaluate(job.load(tmp_path, lazy=True, integer=integer), [evaluation])
        for integer in (False, True)
    )
    pair = [numbers[evaluation.name]["perplexity"] for numbers in (a, b)]
    np.testing.assert_allclose(*pair, rtol=1e-4)


def test_the_fingerprint_knows_how_the_weights_were_packed(place):
    prints = {open_checkpoint(place / name).fingerprint for name in ("ct", "gptq", "awq", "dense")}
    assert len(prints) == 4
