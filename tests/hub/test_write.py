"""Dense directories come out bit for bit; what no stock class computes is refused."""

import dataclasses
import functools
import json
import shutil
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.files import read_sealed
from jaxcomp.core.linear import Linear
from jaxcomp.core.quantize import QTensor, QuantSpec, dequantize
from jaxcomp.core.site import ActQuantizer, Site
from jaxcomp.core.tensorfile import TensorFile, TensorSpec, TensorWriter, write_tensors
from jaxcomp.core.transforms import Diag, Hadamard, Kron, inverse_transpose
from jaxcomp.core.tree import named_leaves
from jaxcomp.hub import dense
from jaxcomp.hub.read import open_checkpoint
from jaxcomp.hub.shards import Entry, shard_names, write_shards
from jaxcomp.hub.stock import stock
from jaxcomp.hub.write import (
    CHECKSUMS,
    ExportSource,
    check_output,
    verify_checksums,
    write_checksums,
)
from jaxcomp.methods import RTN
from jaxcomp.models.decoder import forward, load_block
from jaxcomp.models.families import FAMILIES
from jaxcomp.models.fold import absorb, append_transform, insert_online, rotate_keys
from tests import tiny

KEY = jax.random.key(0)
INT4 = QuantSpec(bits=4, group_size=16)


def source_of(directory, **changes):
    """An `ExportSource` of a checkpoint, its tokenizer in a directory of its own."""
    opened = open_checkpoint(directory)
    tokenizer = directory.parent / f"{directory.name}-tokenizer"
    tokenizer.mkdir(exist_ok=True)
    for file in directory.glob("tokenizer*"):
        shutil.copyfile(file, tokenizer / file.name)
    files = {"generation_config.json": directory / "generation_config.json"}
    given = dict(model=opened.model, hf_config=opened.hf_config, tokenizer=tokenizer, files=files)
    return ExportSource(**given | changes)


run = jax.jit(forward)


def stay(model):
    """The model with its blocks in memory."""
    return model.replace(blocks=tuple(map(load_block, model.blocks)))


def write(source, out, **options):
    out.mkdir()
    return dense.write(source, out, **options)


@functools.cache
def random_model(family, **overrides):
    return tiny.model(family, KEY, **overrides)


@functools.cache
def rounded(family="llama"):
    return RTN(INT4)(random_model(family)).model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_directory_comes_back_byte_for_byte(family, tmp_path):
    place = tiny.checkpoint(family, KEY, tmp_path / "in", dtype="bfloat16", torch_dtype="bfloat16")
    write(source_of(place), tmp_path / "out")
    for file in place.iterdir():
        copy = tmp_path / "out" / file.name
        if file.name == "config.json":
            assert json.loads(copy.read_text()) == json.loads(file.read_text())
        else:
            assert copy.read_bytes() == file.read_bytes(), file.name
    assert {p.name for p in place.iterdir()} == {p.name for p in (tmp_path / "out").iterdir()}


def test_tensors_of_several_dtypes_keep_them(tmp_path):
    tensors = tiny.hf_tensors("llama", KEY, "bfloat16")
    norms = {n: x.astype(np.float32) for n, x in tensors.items() if "norm" in n}
    place = tiny.checkpoint("llama", KEY, tmp_path / "in")
    tiny.write_weights(place, tensors | norms)
    write(source_of(place), tmp_path / "out")
    assert_same_tensors(tmp_path / "out" / "model.safetensors", tensors | norms)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_quantized_weights_are_dequantized(dtype, tmp_path):
    place = tiny.checkpoint("phi3", KEY, tmp_path / "in")
    model = rounded("phi3")
    notes = write(source_of(place, model=model), tmp_path / "out", dtype=dtype)
    read = open_checkpoint(tmp_path / "out").model
    for block, back in zip(model.blocks, read.blocks, strict=True):
        leaves = named_leaves(block, is_leaf=lambda x: isinstance(x, QTensor))
        for path, leaf in named_leaves(back.load()).items():
            wanted = leaves[path]
            wanted = dequantize(wanted) if isinstance(wanted, QTensor) else wanted
            np.testing.assert_array_equal(leaf, np.asarray(wanted.astype(dtype or "float32")))
    assert notes == [f"14 quantized weights are dequantized to {dtype or 'float32'}."]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == (dtype or "float32")


def test_a_head_of_its_own_is_written_where_the_config_ties_it(tmp_path):
    place = tiny.checkpoint("llama", KEY, tmp_path / "in")
    model = random_model("llama")
    head = Linear(np.asarray(model.embed.weight).T[:, ::-1])
    write(source_of(place, model=model.replace(lm_head=head)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    read = open_checkpoint(tmp_path / "out").model
    np.testing.assert_array_equal(read.lm_head.w, head.w)


def test_every_kind_of_transform_at_every_site_goes_back(tmp_path):
    model, tokens = random_model("llama"), tiny.tokens(KEY)

    def kron(seed, left, right):
        draw = lambda n, i: jnp.eye(n) + 0.2 * jax.random.normal(jax.random.key(seed + i), (n, n))  # noqa: E731
        return Kron(draw(left, 0), draw(right, 1))

    def transformed(block):
        block = insert_online(block, "attn_in", kron(0, 4, 8))
        block = insert_online(block, "attn_in", Diag(jnp.linspace(0.5, 2, 32)))
        block = insert_online(block, "attn_out", Hadamard(4, inner=8))
        block = insert_online(block, "ffn_in", Hadamard(32))
        block = insert_online(block, "ffn_mid", Hadamard(12))
        block = append_transform(block, "up_in", one := kron(3, 4, 8))
        up = absorb(block.replace(ffn=block.ffn.replace(gate=block.ffn.up)), "ffn_in", one).ffn.up
        return rotate_keys(block.replace(ffn=block.ffn.replace(up=up)), kron(5, 2, 4))

    changed = model.replace(blocks=tuple(map(transformed, model.blocks)))
    wanted = run(changed, tokens)
    assert_close(wanted, run(model, tokens), 1e-4)  # or the test is wrong
    place = tiny.checkpoint("llama", KEY, tmp_path / "in")
    notes = write(source_of(place, model=changed), tmp_path / "out")
    assert notes == ["Online transforms are multiplied back into the weights, in float32."]
    read = open_checkpoint(tmp_path / "out").model
    assert all(not load_block(block).sites for block in read.blocks)
    assert_close(run(stay(read), tokens), wanted, 1e-4)


def test_transforms_of_keys_that_queries_do_not_undo_are_refused(tmp_path):
    model, t = random_model("llama"), Kron(jnp.diag(jnp.array([1.0, 2.0])), jnp.eye(4))
    blocks = [append_transform(b, "k_cache", t) for b in model.blocks]
    place = tiny.checkpoint("llama", KEY, tmp_path / "in")
    alone = source_of(place, model=model.replace(blocks=tuple(blocks)))
    with pytest.raises(ValueError, match="block 0: the transforms of query and k_cache do not"):
        write(alone, tmp_path / "out")
    both = [append_transform(b, "query", inverse_transpose(t)) for b in blocks]
    write(source_of(place, model=model.replace(blocks=tuple(both))), tmp_path / "again")


@pytest.mark.parametrize(("family", "kept"), [("llama", (1, 2)), ("gemma3_text", (1, 2))])
def test_a_model_with_fewer_blocks_is_renumbered(family, kept, tmp_path):
    place = tiny.checkpoint(family, KEY, tmp_path / "in", num_hidden_layers=3)
    source = source_of(place)
    blocks = tuple(source.model.blocks[i] for i in kept)
    write(source_of(place, model=source.model.replace(blocks=blocks)), tmp_path / "out")
    read = open_checkpoint(tmp_path / "out")
    assert len(read.model.blocks) == read.hf_config["num_hidden_layers"] == 2
    for block, back in zip(blocks, read.model.blocks, strict=True):
        jax.tree.map(np.testing.assert_array_equal, block.load(), back.load())  # windows among it
    assert ("layer_types" in read.hf_config) == (family == "gemma3_text")


def token8(**fields):
    return ActQuantizer(QuantSpec(bits=8, granularity="token", dynamic=True, **fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.replace(sites={"ffn_mid": Site(token8())}), "block 1 quantizes ffn_mid"),
        (lambda b: b.replace(sites={"k_cache": Site(token8())}), "block 1 quantizes k_cache"),
        (
            lambda b: b.replace(sites={"v_cache": Site(transforms=(Hadamard(8),))}),
            "block 1 transforms v_cache",
        ),
        (lambda b: b.replace(gate=jnp.float32(0.5)), "blocks.1.gate is a tensor instead of absent"),
        (
            lambda b: b.replace(attn=b.attn.replace(window=3)),
            "blocks.1.attn.window is 3 instead of None",
        ),
        (
            lambda b: b.replace(ffn=b.ffn.replace(up=b.ffn.up.replace(w=b.ffn.up.w[:, :40]))),
            r"blocks.1.ffn.up.w has shape \(32, 40\) instead of \(32, 48\)",
        ),
        (lambda b: b.replace(attn_norm=None), "blocks.1.attn_norm is absent instead of a RMSNorm"),
        (
            lambda b: b.replace(attn=b.attn.replace(q=b.attn.q.replace(b=jnp.zeros(32)))),
            "blocks.1.attn.q.b is a tensor instead of absent",
        ),
    ],
)
def test_what_no_stock_class_computes_is_refused_with_its_place(change, message):
    model = random_model("llama")
    model = model.replace(blocks=(model.blocks[0], change(model.blocks[1])))
    with pytest.raises(ValueError, match=message):
        dense.check(model, tiny.hf_config("llama"))


def test_what_was_vouched_for_when_it_was_read_is_vouched_for_again():
    config = tiny.hf_config("llama") | {"secret_field": 3}
    assert stock(random_model("llama"), config).config == config


def test_shards_have_an_index_and_come_out_alike_every_time(tmp_path):
    place = tiny.checkpoint("qwen3", KEY, tmp_path / "in")
    for name in ("a", "b"):
        write(source_of(place), tmp_path / name, shard_size=20_000)
    files = sorted(p.name for p in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict(sorted(index["weight_map"].items()))
    tensors = tiny.hf_tensors("qwen3", KEY)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    for file in files:
        parts = TensorFile(tmp_path / "a" / file).specs
        held = sum(tensors[name].nbytes for name in parts)
        assert held <= 20_000 or len(parts) == 1  # the embedding is larger than a shard
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    read = open_checkpoint(tmp_path / "a").model
    jax.tree.map(np.testing.assert_array_equal, read.blocks[1].load(), random_block(1))


def random_block(index):
    return jax.tree.map(np.asarray, random_model("qwen3").blocks[index])


@dataclasses.dataclass(frozen=True)
class Watched:
    """A handle that counts, each time it is read, the blocks that are still in memory."""

    handle: object
    refs: list
    alive: list

    def load(self):
        self.alive.append(sum(ref() is not None for ref in self.refs))
        block = self.handle.load()
        self.refs.append(weakref.ref(block.attn.q.w))
        return block

    def struct(self):
        return self.handle.struct()


def test_a_block_is_read_once_and_gone_before_the_next(tmp_path):
    place = tiny.checkpoint("llama", KEY, tmp_path / "in", num_hidden_layers=3)
    source, refs, alive = source_of(place), [], []
    blocks = tuple(Watched(handle, refs, alive) for handle in source.model.blocks)
    write(dataclasses.replace(source, model=source.model.replace(blocks=blocks)), tmp_path / "out")
    assert alive == [0, 0, 0]


def test_a_tensor_comes_in_any_order_and_the_bytes_are_the_same(tmp_path):
    tensors = {"b": np.arange(6, dtype=np.int64), "a": np.ones((3, 5), np.int8), "c": np.ones(7)}
    write_tensors(tmp_path / "one", tensors, {"format": "pt"})
    specs = {name: TensorSpec(x.shape, x.dtype) for name, x in tensors.items()}
    for order in ("abc", "cba"):
        file = TensorWriter(tmp_path / order, specs, {"format": "pt"})
        for name in order:
            file.write(name, tensors[name])
        file.finish()
        assert (tmp_path / order).read_bytes() == (tmp_path / "one").read_bytes()


def test_a_tensor_that_is_not_what_was_announced_is_our_own_bug(tmp_path):
    entry = Entry(TensorSpec((2,), np.dtype(np.int8)), lambda part: part)
    with pytest.raises(AssertionError, match=r"x: float32 \(2,\)"):
        write_shards(tmp_path, [{"x": entry}], [np.ones(2, np.float32)])
    with pytest.raises(AssertionError, match="never written: x"):
        TensorWriter(tmp_path / "x", {"x": entry.spec}).finish()


def test_a_limit_that_holds_nothing_is_refused():
    with pytest.raises(ValueError, match="a shard of 0 bytes holds nothing"):
        shard_names({}, 0, "model")


def test_a_dtype_that_does_not_exist_is_refused(tmp_path):
    place = tiny.checkpoint("llama", KEY, tmp_path / "in")
    with pytest.raises(ValueError, match="dtype='int4' is not supported; use one of float32"):
        write(source_of(place), tmp_path / "out", dtype="int4")


@pytest.fixture
def export(tmp_path):
    """A directory with checksums."""
    out = tmp_path / "export"
    out.mkdir()
    write_tensors(out / "model.safetensors", {"a": np.arange(8.0), "b": np.array(2.5, np.float16)})
    (out / "config.json").write_text("{}")
    write_checksums(out)
    return out


def test_the_side_file_describes_every_file_and_tensor(export):
    known = read_sealed(export / CHECKSUMS)
    assert known["files"].keys() == {"model.safetensors", "config.json"}
    assert known["tensors"]["a"]["shape"] == [8] and known["tensors"]["b"]["dtype"] == "float16"
    assert verify_checksums(export) == 2


def test_a_flipped_bit_names_the_tensor(export):
    file = export / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-20] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"model.safetensors has changed in tensor 'a'"):
        verify_checksums(export)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "lacks config.json"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json has changed"),
        (lambda d: (d / "config.json").write_text("{} "), "3 bytes instead of 2"),
        (lambda d: (d / CHECKSUMS).unlink(), "is no export: it has no checksums.json"),
        (
            lambda d: (d / CHECKSUMS).write_text((d / CHECKSUMS).read_text().replace("8", "9")),
            "does not have the sha256 it was written with",
        ),
    ],
)
def test_damage_is_named(damage, message, export):
    damage(export)
    with pytest.raises(ValueError, match=message):
        verify_checksums(export)


def test_an_output_is_new_empty_or_an_export_that_may_go(export, tmp_path):
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "new")
    check_output(tmp_path / "empty")
    check_output(export, overwrite=True)
    with pytest.raises(ValueError, match=r"holds an export already; use overwrite=True"):
        check_output(export)
    (export / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes.txt, which no export put there"):
        check_output(export, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        check_output(export / "notes.txt", overwrite=True)


def assert_close(ours, theirs, tolerance=1e-5):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert np.abs(ours - theirs).max() <= tolerance * np.ptp(theirs)


def assert_same_tensors(path, tensors):
    file = TensorFile(path)
    assert file.specs.keys() == tensors.keys()
    for name, wanted in tensors.items():
        found = file.read(name)
        assert found.dtype == wanted.dtype and found.tobytes() == wanted.tobytes(), name
