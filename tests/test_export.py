"""From any model to any format: what is opened, what is refused, what is left when it fails."""

import errno
import inspect
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import jaxcomp
from jaxcomp import artefact
from jaxcomp import export as exporting
from jaxcomp.__main__ import app
from jaxcomp.commands.export import parse_size
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.tensorfile import TensorFile
from jaxcomp.export import FORMATS, Exported, export
from jaxcomp.hub.card import find_origin, model_card
from jaxcomp.hub.read import open_checkpoint
from jaxcomp.hub.write import CARD, CHECKSUMS, verify_checksums
from jaxcomp.methods import RTN
from jaxcomp.recipe import Recipe
from tests import tiny

KEY = jax.random.key(0)
TOKEN8 = QuantSpec(bits=8, granularity="token", dynamic=True)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint that states a licence, and artefacts of it: weights alone, and inputs too."""
    place = tmp_path_factory.mktemp("export")
    source = tiny.checkpoint("llama", KEY, place / "model")
    (source / "README.md").write_text("---\nlicense: mit\nbase_model: owner/base\n---\n# Model\n")
    (source / "LICENSE").write_text("terms")
    rtn = RTN(weight=QuantSpec(bits=4, group_size=16))
    jaxcomp.compress(source, Recipe(steps=(rtn,)), place / "w4", compare=False)
    rtn = RTN(weight=QuantSpec(bits=8), act=TOKEN8)
    jaxcomp.compress(source, Recipe(steps=(rtn,)), place / "w8a8", compare=False)
    return place


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_what_the_dispatcher_asks_for(name):
    module = FORMATS[name]
    assert "{out}" in module.LOAD and module.__doc__
    assert [*inspect.signature(module.check).parameters] == ["model", "hf_config"]
    assert inspect.getfullargspec(module.write).args == ["source", "out"]


def test_an_artefact_becomes_a_directory_with_card_and_checksums(place, tmp_path):
    done = export(place / "w4", "compressed-tensors", tmp_path / "out")
    out = tmp_path / "out"
    assert done == Exported(out, done.load, ()) and str(out) in done.load
    names = {p.name for p in out.iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "LICENSE", CARD}
    assert verify_checksums(out) == len(names) - 1
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # older transformers know it
    card = (out / CARD).read_text()
    for said in ('license: "mit"', 'base_model: "owner/base"', '"class": "RTN"', "jaxcomp 0."):
        assert said in card
    assert "| bits per quantized weight |  | 6 |" in card and "see LICENSE" in card


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_any_checkpoint_becomes_a_dense_directory(kind, place, tmp_path):
    source = place / "model"
    if kind == "gguf":
        if "gguf" not in FORMATS:
            pytest.skip("needs the writer of GGUF")
        source = export(source, "gguf", tmp_path / "gguf").out / "model.gguf"
    export(source, "hf", tmp_path / "out")
    wanted, found = (open_checkpoint(p).model for p in (place / "model", tmp_path / "out"))
    for a, b in zip(wanted.blocks, found.blocks, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a.load(), b.load())
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_refusal_names_the_formats_that_can(place, tmp_path):
    with pytest.raises(ValueError) as caught:
        export(place / "w8a8", "hf", tmp_path / "out")
    message = str(caught.value)
    assert "hf cannot hold this model: block 0 quantizes attn_in (int8 per-token sym)" in message
    assert "formats that can: compressed-tensors" in message
    with pytest.raises(ValueError, match=r"no weight is quantized.*formats that can: hf"):
        export(place / "model", "compressed-tensors", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(format="onnx"), "there is no format 'onnx'; there is hf, compressed-tensors"),
        (dict(format="hf", bits=3), "bits is no option of hf; it has dtype, shard_size"),
        (dict(format="hf", dtype="int4"), "dtype='int4' is not supported"),
    ],
)
def test_a_format_or_option_that_does_not_exist_is_refused(options, message, place, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(place / "model", out=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_replaced_only_when_that_is_asked_for(place, tmp_path):
    out = tmp_path / "out"
    export(place / "w4", "hf", out)
    with pytest.raises(ValueError, match="holds an export already"):
        export(place / "w4", "compressed-tensors", out)
    export(place / "w4", "compressed-tensors", out, overwrite=True)
    assert "quantization_config" in json.loads((out / "config.json").read_text())
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds mine\.txt, which no export put there"):
        export(place / "w4", "hf", out, overwrite=True)
    with pytest.raises(ValueError, match=r"w4 holds .*which no export put there"):
        export(place / "model", "hf", place / "w4", overwrite=True)  # an artefact is no export


def test_a_full_disk_names_the_place_and_leaves_what_was_there(place, tmp_path, monkeypatch):
    out, real, written = tmp_path / "out", os.pwrite, []
    export(place / "w4", "hf", out)
    before = (out / CHECKSUMS).read_bytes()

    def pwrite(fd, data, offset):
        written.append(len(data))
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match=f"the disk of {tmp_path} is full.*choose another place"):
        export(place / "w4", "compressed-tensors", out, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / CHECKSUMS).read_bytes() == before and verify_checksums(out)


def test_a_damaged_artefact_is_refused_before_anything_is_written(place, tmp_path):
    import shutil

    bad = shutil.copytree(place / "w4", tmp_path / "bad")
    file = max(bad.glob("params/blocks.1/**/*"), key=lambda p: p.is_file() and p.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"blocks\.1.* has changed: its sha256"):
        export(bad, "hf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_an_artefact_without_a_config_says_what_is_missing(place, tmp_path):
    model = artefact.load(place / "w4")
    files = {f"tokenizer/{p.name}": p for p in (place / "w4" / "tokenizer").iterdir()}
    artefact.save(model, tmp_path / "bare", files=files)
    with pytest.raises(ValueError, match=r"bare has no config\.json, so nothing says which class"):
        export(tmp_path / "bare", "hf", tmp_path / "out")


def test_the_command_says_what_was_written_and_how_to_load_it(place, tmp_path):
    out = tmp_path / "out"
    result = run("export", place / "w8a8", "-f", "compressed-tensors", "-o", out)
    assert result.exit_code == 0, result.output
    assert f"wrote {out}: " in result.output and " files, " in result.output
    assert "note: Inputs of 8 bits" in result.output
    assert f'load it with: vllm serve "{out}"' in result.output
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ((place / "w4", "-f", "hf", "-o", out), "holds an export already"),
        ((tmp_path, "-f", "hf", "-o", tmp_path / "new"), "is no checkpoint"),
        ((place / "w4", "-f", "hf", "-o", tmp_path / "file" / "out"), "Not a directory"),
        ((place / "w4", "-f", "hf", "-o", "new", "--shard-size", "big"), "is no size; give one"),
    ):
        result = run("export", *arguments)
        assert result.exit_code == 2 and message in result.output, result.output
        assert "Traceback" not in result.output


def test_the_command_hands_on_the_options_that_were_given(monkeypatch, tmp_path):
    seen = {}

    def fake(*arguments, console, **options):
        seen.update(options, arguments=arguments)
        return Exported(tmp_path, "load")

    monkeypatch.setattr(exporting, "export", fake)
    flags = ["--dtype", "bfloat16", "--shard-size", "1.5GB", "--overwrite", "--allow-config", "a"]
    assert run("export", "DIR", "--format", "hf", "--out", "o", *flags).exit_code == 0
    assert seen == {
        "arguments": ("DIR", "hf", Path("o")),
        "overwrite": True,
        "allow_config": ("a",),
        "dtype": "bfloat16",
        "shard_size": 1_500_000_000,
    }


def test_sizes_are_read_with_and_without_a_unit():
    assert [parse_size(text) for text in ("5GB", "500 mb", "1.5kb", "17")] == [
        5 * 10**9,
        5 * 10**8,
        1500,
        17,
    ]
    with pytest.raises(ValueError, match="'5 TB' is no size"):
        parse_size("5 TB")


def test_the_card_shows_what_the_report_measured():
    report = {
        "evals_before": {"perplexity wiki": {"perplexity": 20.1238}},
        "evals_after": {"perplexity wiki": {"perplexity": 26.0979, "tokens": 8184}},
        "sizes": {"quantized_bits": 4.5},
        "environment": {"device": "1 x cpu", "jax": "0.10.2"},
        "started": "2026-11-25T00:59:29+00:00",
    }
    origin = find_origin("owner/model")
    card = model_card(
        "title", origin, "jaxcomp 0.1.0", "load(it)", ("Be careful.",), ("a",), {}, report
    )
    assert 'base_model: "owner/model"' in card and "license" not in card.partition("\n#")[0]
    assert "| perplexity wiki: perplexity | 20.12 | 26.1 |" in card
    assert "| perplexity wiki: tokens |  | 8184 |" in card
    assert "device 1 x cpu, jax 0.10.2, 2026-11-25" in card
    assert "- Be careful." in card and "The source states none" in card


def test_the_origin_of_what_is_not_there_is_its_name(tmp_path):
    (tmp_path / "README.md").write_text("---\n: [broken\n---\n")
    assert find_origin("demo:nothing").licence == ""
    assert find_origin(str(tmp_path)).licence == ""
    assert find_origin("gone/away/now").base_model == ""


@pytest.mark.slow
def test_smollm2_continues_alike_in_transformers(tmp_path):
    """A real model: logits, and 32 tokens of greedy text, from packed weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("gguf")
    from jaxcomp import job
    from jaxcomp.models.decoder import forward

    recipe = Recipe(steps=(RTN(weight=QuantSpec(bits=4, group_size=64)),))
    jaxcomp.compress("demo:smollm2", recipe, tmp_path / "w4", compare=False)
    export(tmp_path / "w4", "compressed-tensors", tmp_path / "out")
    assert 'license: "apache-2.0"' in (tmp_path / "out" / CARD).read_text()
    packed = TensorFile(tmp_path / "out" / "model.safetensors").specs
    assert packed["model.layers.29.mlp.down_proj.weight_packed"].shape == (576, 192)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(tmp_path / "out", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    loaded, prompt = job.load(tmp_path / "w4"), "The Atlantic Ocean is"
    ids = loaded.encode(f"{prompt} 85,133,000 km2 large. In 1492")[None]
    with torch.no_grad():
        logits = theirs(torch.tensor(np.asarray(ids, np.int64))).logits.numpy()
        inputs = tokenizer(prompt, return_tensors="pt")
        text = theirs.generate(**inputs, max_new_tokens=32, do_sample=False)[0]
    ours = np.asarray(forward(loaded.model, ids))
    assert np.abs(ours - logits).max() <= 1e-4 * np.ptp(logits)
    text = tokenizer.decode(text[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert jaxcomp.generate(loaded, prompt, 32) == text
