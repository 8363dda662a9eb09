"""compressed-tensors directories, ours and the library's, come in as the weights they are."""

import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.quantize import QTensor, QuantSpec, dequantize
from jaxcomp.core.site import ActQuantizer, Site
from jaxcomp.core.tensorfile import TensorFile
from jaxcomp.core.tree import get_at
from jaxcomp.hub import compressed_tensors, open_checkpoint
from jaxcomp.hub.ct_read import WORDS
from jaxcomp.hub.leaves import read_leaf
from jaxcomp.hub.packed import PackedLinear, PackedWeight
from jaxcomp.hub.write import ExportSource
from tests import packed, tiny

NAMES = {  # module → path in a block
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o",
    "mlp.gate_proj": "ffn.gate",
    "mlp.up_proj": "ffn.up",
    "mlp.down_proj": "ffn.down",
}
LAYER = "model.layers.0."
TOKEN8 = dict(num_bits=8, strategy="token", dynamic=True)


def linear(block, module):
    return get_at(block, NAMES[module]).w


def block_of(place, index=0):
    return open_checkpoint(place).model.blocks[index].load()


def pack_all(place, bits, group, symmetric, words=packed.stream, **fields):
    """A llama whose modules are all on one grid; returns the place and the codes."""
    found = {
        name: packed.quantized(w, bits, group, symmetric) for name, w in packed.modules().items()
    }
    weights = dict(num_bits=bits, symmetric=symmetric, group_size=group, strategy="group")
    if group is None:
        weights["strategy"] = "channel"
    config = packed.ct_config({"g": dict(targets=["Linear"], weights=weights)}, **fields)
    tensors = {n: packed.ct_tensors(n, q, symmetric, words) for n, q in found.items()}
    return packed.directory(place, tensors, config), found


def change_config(place, change):
    """Applies `change` to the quantization_config of a directory, in place."""
    config = packed.config_of(place)
    change(config)
    return packed.set_config(place, config)


# Values.


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 8), (3, 16), (4, None), (6, 8), (8, None)])
def test_packed_words_are_the_weights_they_stand_for(bits, group, symmetric, tmp_path):
    place, wanted = pack_all(tmp_path, bits, group, symmetric)
    block = block_of(place)
    for module in NAMES:
        q = linear(block, module)
        assert q.bits == bits and (q.zero_point is None) == symmetric
        np.testing.assert_array_equal(dequantize(q).T, wanted[LAYER + module].dense)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_words_with_idle_bits_are_told_by_their_width(bits, tmp_path):
    old, wanted = pack_all(tmp_path / "old", bits, 8, False, packed.gapped)
    new, _ = pack_all(tmp_path / "new", bits, 8, False)
    a, b = block_of(old), block_of(new)
    for module in NAMES:
        jax.tree.map(np.testing.assert_array_equal, linear(a, module), linear(b, module))
        np.testing.assert_array_equal(dequantize(linear(a, module)).T, wanted[LAYER + module].dense)


def test_where_both_packings_are_as_wide_the_version_decides(tmp_path):
    small = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, head_dim=8)
    weights = dict(num_bits=3, strategy="channel")  # 16 codes: two words, gaps or not
    for words, version in ((packed.gapped, "0.17.1"), (packed.stream, "0.18.0")):
        found = {n: packed.quantized(w, 3) for n, w in packed.modules(**small).items()}
        tensors = {n: packed.ct_tensors(n, q, True, words) for n, q in found.items()}
        config = packed.ct_config({"g": dict(targets=["Linear"], weights=weights)}, version=version)
        place = packed.directory(tmp_path / version, tensors, config, **small)
        for module in NAMES:
            q = linear(block_of(place), module)
            np.testing.assert_array_equal(dequantize(q).T, found[LAYER + module].dense)
    change_config(place, lambda c: c.pop("version"))
    with pytest.raises(ValueError, match="16 × 16 codes of 3 bits, for which both packings"):
        open_checkpoint(place)


def test_scales_in_half_precision_are_held_exactly(tmp_path):
    place, wanted = pack_all(tmp_path, 4, 16, True)

    def halve(tensors):
        for name in (n for n in tensors if n.endswith("_scale")):
            tensors[name] = np.asarray(jnp.asarray(tensors[name], jnp.bfloat16))

    q = linear(block_of(packed.rewrite(place, halve)), "mlp.up_proj")
    scale = jnp.asarray(wanted[LAYER + "mlp.up_proj"].scale, jnp.bfloat16)
    np.testing.assert_array_equal(q.scale, scale.astype(np.float32).T)


def int_tensors(name, q, symmetric=True):
    half = 2 ** (q.bits - 1)
    tensors = {
        f"{name}.weight": (q.codes - half).astype(np.int8),
        f"{name}.weight_scale": q.scale,
    }
    if not symmetric:
        tensors[f"{name}.weight_zero_point"] = (q.zero - half).astype(np.int8)
    return tensors


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(8, None, True), (4, 8, False)])
def test_codes_in_bytes_become_packed_codes(bits, group, symmetric, tmp_path):
    found = {n: packed.quantized(w, bits, group, symmetric) for n, w in packed.modules().items()}
    weights = dict(num_bits=bits, group_size=group or -1, symmetric=symmetric)
    group = dict(targets=["Linear"], weights=weights, input_activations=TOKEN8)
    config = packed.ct_config({"g": group}, format="int-quantized")
    tensors = {n: int_tensors(n, q, symmetric) for n, q in found.items()}
    block = block_of(packed.directory(tmp_path, tensors, config))
    for module in NAMES:
        q = linear(block, module)
        assert len(q.packed) == -(-q.in_ch * bits // 8)
        np.testing.assert_array_equal(dequantize(q).T, found[LAYER + module].dense)
    spec = QuantSpec(8, granularity="token", dynamic=True)
    sites = ("attn_in", "attn_out", "ffn_in", "ffn_mid")
    assert block.sites == {site: Site(ActQuantizer(spec)) for site in sites}


def test_the_leaves_of_a_fused_module_are_its_rows(tmp_path):
    found = {
        n: packed.quantized(w, 3, 8, symmetric=False) for n, w in packed.modules("phi3").items()
    }
    weights = dict(num_bits=3, symmetric=False, group_size=8)
    config = packed.ct_config({"g": dict(targets=["Linear"], weights=weights)})
    tensors = {n: packed.ct_tensors(n, q, False) for n, q in found.items()}
    block = block_of(packed.directory(tmp_path, tensors, config, "phi3"))
    for module, parts in {"self_attn.qkv_proj": "qkv", "mlp.gate_up_proj": ("gate", "up")}.items():
        unit = block.attn if "attn" in module else block.ffn
        dense = [np.asarray(dequantize(getattr(unit, part).w).T) for part in parts]
        np.testing.assert_array_equal(np.concatenate(dense), found[LAYER + module].dense)


# Which module is on which grid.


def test_groups_are_matched_by_name_then_expression_then_class(tmp_path):
    bits = {"self_attn.q_proj": 2, "mlp.down_proj": 3, "mlp.gate_proj": 3}
    dense = "self_attn.o_proj"
    groups = {
        "everything": dict(targets=["Linear"], weights=dict(num_bits=4, group_size=8)),
        "some": dict(
            targets=[r"re:.*\.mlp\.(down|gate)_proj$", r"re:.*q_proj"],
            weights=dict(num_bits=3, group_size=8),
        ),
        "one": dict(
            targets=[f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)],
            weights=dict(num_bits=2, group_size=8),
        ),
    }
    tensors, found = {}, {}
    for name, w in packed.modules().items():
        module = name.split(".", 3)[3]
        if module != dense:
            found[name] = packed.quantized(w, bits.get(module, 4), 8)
            tensors[name] = packed.ct_tensors(name, found[name], True)
    config = packed.ct_config(groups, ("lm_head", r"re:.*\.o_proj"))
    block = block_of(packed.directory(tmp_path, tensors, config))
    assert not isinstance(linear(block, dense), QTensor)
    for module in set(NAMES) - {dense}:
        q = linear(block, module)
        assert q.bits == bits.get(module, 4)
        np.testing.assert_array_equal(dequantize(q).T, found[LAYER + module].dense)


def test_a_quantized_head_is_read_where_it_is_not_tied(tmp_path):
    untied = dict(tie_word_embeddings=False)
    weights = packed.modules(**untied)
    weights["lm_head"] = tiny.hf_tensors("llama", packed.KEY, **untied)["lm_head.weight"]
    found = {n: packed.quantized(w, 4, 16) for n, w in weights.items()}
    group = dict(targets=["Linear"], weights=dict(num_bits=4, group_size=16))
    config = packed.ct_config({"g": group}, ignore=())
    tensors = {n: packed.ct_tensors(n, q, True) for n, q in found.items()}
    model = open_checkpoint(packed.directory(tmp_path, tensors, config, **untied)).model
    assert isinstance(model.lm_head.w.packed, jax.Array)
    np.testing.assert_array_equal(dequantize(model.lm_head.w).T, found["lm_head"].dense)


# Activations and caches.


def static_inputs(place, scales):
    """W8A8 with static inputs; `scales` gives one for every module of a block."""
    found = {n: packed.quantized(w, 8) for n, w in packed.modules().items()}
    act = dict(num_bits=8, strategy="tensor", symmetric=False)
    group = dict(targets=["Linear"], weights=dict(num_bits=8, group_size=-1), input_activations=act)
    tensors = {n: int_tensors(n, q) for n, q in found.items()}
    for name, mine in tensors.items():
        module = name.split(".", 3)[3]
        mine[f"{name}.input_scale"] = np.array([scales(module)], np.float32)
        mine[f"{name}.input_zero_point"] = np.array([-3], np.int8)
    config = packed.ct_config({"g": group}, format="int-quantized")
    return packed.directory(place, tensors, config)


def test_linears_share_a_static_quantizer_only_where_their_scales_are_equal(tmp_path):
    spec = QuantSpec(8, granularity="tensor", symmetric=False)
    same = static_inputs(tmp_path / "same", lambda module: 0.5 if "mlp" in module else 0.25)
    block = block_of(same)
    assert set(block.sites) == {"attn_in", "attn_out", "ffn_in", "ffn_mid"}
    quantizer = block.sites["ffn_in"].quantizer
    assert quantizer.spec == spec and quantizer.scale.shape == () == quantizer.zero_point.shape
    assert (quantizer.scale, quantizer.zero_point) == (np.float32(0.5), np.int8(-3))
    own = static_inputs(tmp_path / "own", lambda module: 0.1 + len(module) / 64)
    block = block_of(own)
    assert set(block.sites) == {"attn_in", "attn_out", "gate_in", "up_in", "ffn_mid"}
    wanted = np.float32(0.1 + len("mlp.up_proj") / 64)
    assert block.sites["up_in"].quantizer.scale == wanted


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_static_grids_of_the_cache_are_read(strategy, tmp_path):
    place, _ = pack_all(tmp_path, 4, 8, True, kv_cache_scheme=dict(num_bits=8, strategy=strategy))
    shape = (1,) if strategy == "tensor" else (2, 1, 1)

    def add(tensors):
        for i in (0, 1):
            for which in "kv":
                name = f"model.layers.{i}.self_attn.{which}_scale"
                values = 0.1 * (1 + np.arange(np.prod(shape))) + (which == "v")
                tensors[name] = values.astype(np.float32).reshape(shape)

    handle = open_checkpoint(packed.rewrite(place, add)).model.blocks[1]
    quantizer = handle.load().sites["v_cache"].quantizer
    if strategy == "tensor":
        assert quantizer.spec == QuantSpec(8, granularity="tensor")
        assert quantizer.scale == np.float32(1.1)
    else:
        assert quantizer.spec == QuantSpec(8, granularity="channel")
        each = np.array([1.1, 1.2], np.float32)[:, None]
        np.testing.assert_array_equal(quantizer.scale, np.broadcast_to(each, (2, 8)))
    assert set(handle.struct().sites) == {"k_cache", "v_cache"}


# Laziness.


def test_nothing_of_a_block_is_read_before_it_is_asked_for(tmp_path, monkeypatch):
    place, _ = pack_all(tmp_path, 3, 8, False)
    reads, rows = [], TensorFile.rows
    monkeypatch.setattr(
        TensorFile, "rows", lambda self, *at: reads.append(at[0]) or rows(self, *at)
    )
    model = open_checkpoint(place).model
    small = ("weight_shape", "embed_tokens.weight", "model.norm.weight")
    assert all(name.endswith(small) for name in reads)
    reads.clear()
    struct = model.blocks[1].struct()
    assert reads == []
    block = model.blocks[1].load()
    assert {name.split(".")[2] for name in reads} == {"1"}
    assert jax.tree.structure(block) == jax.tree.structure(struct)
    same = jax.tree.map(lambda x, s: (x.shape, x.dtype) == (s.shape, s.dtype), block, struct)
    assert all(jax.tree.leaves(same))
    assert all(x.flags.c_contiguous and isinstance(x, np.ndarray) for x in jax.tree.leaves(block))


class Stored:
    """A source whose tensors are in memory."""

    where, files = "memory", ()

    def __init__(self, tensors):
        self.tensors = tensors
        self.specs = {n: np.lib.stride_tricks.as_strided(x) for n, x in tensors.items()}

    def rows(self, name, start, stop):
        return self.tensors[name][start:stop]


@pytest.mark.parametrize("chunk", [2**20, 2**14])
def test_codes_are_laid_anew_without_a_copy_in_floats(chunk, monkeypatch):
    monkeypatch.setattr("jaxcomp.hub.leaves.CHUNK", chunk)
    rng = np.random.default_rng(0)
    out_ch, in_ch = 1024, 2048
    words = rng.integers(-(2**31), 2**31, (out_ch, in_ch // 8), np.int64).astype(np.int32)
    source = Stored({"m.weight_packed": words, "m.weight_scale": np.ones((out_ch, 1), np.float32)})
    leaf = PackedWeight(PackedLinear("m", in_ch, out_ch, QuantSpec(4), WORDS), (0, out_ch))
    tracemalloc.start()
    q = read_leaf(leaf, source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert q.packed.nbytes == words.nbytes
    np.testing.assert_array_equal(q.packed.T, words.view(np.uint8) ^ 0x88)
    limit = 2.2 if chunk == 2**20 else 1.2  # a chunk is all of it, or a sixteenth
    assert peak < limit * words.nbytes


# There and back.


def export(checkpoint, place, family="llama", **options):
    tokenizer = place / "tokenizer"
    tokenizer.mkdir(parents=True)
    (place / "out").mkdir()
    source = ExportSource(checkpoint.model, checkpoint.hf_config, tokenizer, {})
    compressed_tensors.write(source, place / "out", **options)
    return place / "out"


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 8, True), (3, 16, False), (8, None, True)]
)
def test_what_was_read_is_written_again_bit_for_bit(bits, group, symmetric, tmp_path):
    place, _ = pack_all(tmp_path / "in", bits, group, symmetric)
    out = export(open_checkpoint(place), tmp_path)
    before, after = packed.tensors_of(place), packed.tensors_of(out)
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert x.dtype == after[name].dtype
        np.testing.assert_array_equal(x, after[name], err_msg=name)
    again = export(open_checkpoint(out), tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == (out / file).read_bytes()


def test_static_inputs_are_written_again(tmp_path):
    place = static_inputs(tmp_path / "in", lambda module: 0.25)
    before, after = (
        packed.tensors_of(place),
        packed.tensors_of(export(open_checkpoint(place), tmp_path)),
    )
    assert before.keys() == after.keys()
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_gaps_are_closed_when_they_are_written_again(tmp_path):
    old, _ = pack_all(tmp_path / "old", 3, 8, False, packed.gapped, version="0.10.2")
    new, _ = pack_all(tmp_path / "new", 3, 8, False)
    jax.tree.map(
        np.testing.assert_array_equal,
        packed.tensors_of(export(open_checkpoint(old), tmp_path)),
        packed.tensors_of(new),
    )


# Refusals.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """W4 in groups of 8, symmetric and asymmetric; never changed, only copied."""
    place = tmp_path_factory.mktemp("whole")
    pack_all(place / "sym", 4, 8, True)
    pack_all(place / "asym", 4, 8, False)
    return place


def damaged(whole, tmp_path, kind="sym"):
    return shutil.copytree(whole / kind, tmp_path / "copy")


def args(**fields):
    """A change of the arguments of the weights."""
    return lambda config: config["config_groups"]["g"]["weights"].update(fields)


def group(**fields):
    return lambda config: config["config_groups"]["g"].update(fields)


def top(**fields):
    return lambda config: config.update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("quantization_status"), "quantization_status is 'missing' and only"),
        (top(quantization_status="frozen"), "quantization_status is 'frozen' and only"),
        (
            top(ignore=[]),
            "module 'lm_head' is stored dense, and by targets and ignore .* quantized",
        ),
        (
            top(ignore=["lm_head", "re:.*down_proj"]),
            r"module 'model.layers.0.mlp.down_proj' is stored quantized .* it is dense",
        ),
        (group(targets=["re:.*self_attn.*"]), "'model.layers.0.mlp.down_proj' is stored quantized"),
        (group(targets=["re:(", "Linear"]), r"targets has 're:\(', which is no regular expression"),
        (group(targets="Linear"), "targets='Linear' must be a list of strings"),
        (group(format="float-quantized"), "format 'float-quantized', which is not read; there is"),
        (group(format="nvfp4-pack-quantized"), "'nvfp4-pack-quantized', which is not read"),
        (
            group(format="mxfp4-pack-quantized"),
            "'mxfp4-pack-quantized', which is not read.*dequanti",
        ),
        (group(format="marlin-24"), "format 'marlin-24', which is not read"),
        (top(format="mixed-precision"), "format 'mixed-precision', which is not read"),
        (top(format="int-quantized"), "weight_packed' is there, and group g is of format int-q"),
        (group(weights=None), "group g has no weights"),
        (group(output_activations=TOKEN8), "1 field.* output_activations=.*vouch"),
        (args(type="float"), "weights: type 'float' with 4 bits is not read; there is int"),
        (args(num_bits=1), "type 'int' with 1 bits is not read"),
        (args(strategy="block", group_size=None, block_structure=[8, 8]), "of strategy 'block'"),
        (args(dynamic=True), "weights is dynamic, which no QTensor holds"),
        (args(dynamic="local"), "dynamic='local' is not read"),
        (args(actorder="group"), "actorder='group' gives every input channel a group"),
        (args(actorder=True), "actorder=True gives every input channel"),
        (args(rounding="odd"), "1 field.* rounding='odd'.*allow_config"),
        (args(group_size=None), "strategy='group' does not go with group_size=None"),
        (args(group_size=0), "group_size=0 must be above 0, or -1"),
        (
            args(group_size=5),
            "module 'model.layers.0.*': in_ch=32 is not a multiple of group_size=5",
        ),
        (
            args(group_size=16),
            r"weight_scale' has shape \[32, 4\] and the config makes it \[32, 2\]",
        ),
        (args(num_bits=8), r"weight_packed' has shape \[32, 4\] and the config makes it \[32, 8\]"),
        (args(symmetric=False), "missing: .*weight_zero_point"),
        (
            top(sparsity_config=dict(format="sparse-24-bitmask")),
            "sparsity_config has format 'sparse-24-bitmask'.*are not read.*dequantize",
        ),
        (
            top(transform_config=dict(config_groups=dict(R1=dict(type="hadamard")))),
            "transform_config has R1, and transforms are not read .*; start from",
        ),
        (
            top(kv_cache_scheme=dict(num_bits=8, type="float", strategy="tensor")),
            "kv_cache_scheme: type 'float'",
        ),
        (
            top(kv_cache_scheme=dict(num_bits=8, strategy="token", dynamic=True)),
            "kv_cache_scheme is dynamic of strategy 'token', which no cache here has",
        ),
        (top(kv_cache_scheme=dict(num_bits=8)), "missing: model.layers.0.self_attn.k_scale"),
        (top(config_groups={"W4A16": ["Linear"]}), "W4A16 is a preset"),
        (top(config_groups={}), "config_groups is empty"),
        (top(secret=3), "1 field.* secret='3'"),
        (
            group(input_activations=dict(num_bits=8, type="float", strategy="token", dynamic=True)),
            "input_activations: type 'float'",
        ),
        (
            group(input_activations=dict(num_bits=8, group_size=8, dynamic=True)),
            "input_activations is dynamic of strategy 'group', which no site has",
        ),
        (
            top(quant_method="bitsandbytes"),
            "quant_method='bitsandbytes' is not read; there is comp",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, message, whole, tmp_path):
    place = change_config(damaged(whole, tmp_path), change)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(place)


@pytest.mark.parametrize(
    "change",
    [
        args(actorder="weight"),
        args(actorder="static", observer="mse", observer_kwargs=dict(grid=20), zp_dtype=None),
        args(actorder=None, scale_dtype=None, block_structure=None),
        args(strategy=None),
        top(sparsity_config=dict(format="dense"), transform_config={}, kv_cache_scheme=None),
        top(version="0.6.0", global_compression_ratio=1.7),
        group(format="pack-quantized", output_activations=None),
        top(ignore=["lm_head", "re:.*visual.*"]),
    ],
)
def test_what_changes_nothing_is_accepted(change, whole, tmp_path):
    changed = block_of(change_config(damaged(whole, tmp_path), change))
    jax.tree.map(np.testing.assert_array_equal, changed, block_of(whole / "sym"))


AT = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{AT}.weight_shape"), f"1 missing: {AT}.weight_shape"),
        (
            lambda t: t.update({f"{AT}.weight_shape": np.array([32, 48])}),
            rf"'{AT}.weight_shape' is \[32, 48\] and the config makes it \[48, 32\]",
        ),
        (
            lambda t: t.update({f"{AT}.weight_zero_point": np.zeros((6, 4), np.int32)}),
            f"'{AT}.weight_zero_point' is there, and group g is symmetric",
        ),
        (
            lambda t: t.update({f"{AT}.weight_g_idx": np.zeros(32, np.int32)}),
            f"1 unknown: {AT}.weight_g_idx",
        ),
        (
            lambda t: t.update({f"{AT}.weight_packed": t[f"{AT}.weight_packed"].astype(np.int64)}),
            f"'{AT}.weight_packed' is stored as int64 and a weight must be one of int32",
        ),
        (
            lambda t: t.update({f"{AT}.weight": np.zeros((48, 32), np.float32)}),
            f"'{AT}.weight' is there, and group g is of format pack-quantized",
        ),
        (
            lambda t: t.update({"model.norm.weight_packed": np.zeros((2, 2), np.int32)}),
            "'model.norm' is stored quantized .* no linear module of the model",
        ),
        (lambda t: t.pop("model.norm.weight"), "1 missing: model.norm.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message, whole, tmp_path):
    place = packed.rewrite(damaged(whole, tmp_path), change)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(place)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf])
def test_a_scale_that_is_no_step_is_refused_when_the_block_is_read(bad, whole, tmp_path):
    def change(tensors):
        tensors[f"{AT}.weight_scale"][3, 1] = bad

    model = open_checkpoint(packed.rewrite(damaged(whole, tmp_path), change)).model
    model.blocks[0].load()
    with pytest.raises(ValueError, match=f"{AT}: 1 of 192 scales are 0, NaN or infinite"):
        model.blocks[1].load()


def test_codes_in_bytes_that_have_more_bits_than_said_are_refused(tmp_path):
    found = {n: packed.quantized(w, 8) for n, w in packed.modules().items()}
    group = dict(targets=["Linear"], weights=dict(num_bits=4, group_size=-1))
    config = packed.ct_config({"g": group}, format="int-quantized")
    place = packed.directory(tmp_path, {n: int_tensors(n, q) for n, q in found.items()}, config)
    with pytest.raises(ValueError, match=r"q_proj.weight' holds codes from -1.* 4 bits end at -8"):
        block_of(place)


def test_packed_tensors_without_a_config_are_refused(whole, tmp_path):
    place = packed.set_config(damaged(whole, tmp_path), None)
    with pytest.raises(ValueError, match=r"stored quantized .* missing quantization_config"):
        open_checkpoint(place)


def test_an_asymmetric_grid_needs_its_zero_points(whole, tmp_path):
    place = damaged(whole, tmp_path, "asym")
    packed.rewrite(place, lambda tensors: tensors.pop(f"{AT}.weight_zero_point"))
    with pytest.raises(ValueError, match=f"1 missing: {AT}.weight_zero_point"):
        open_checkpoint(place)


def test_a_head_that_reads_a_quantized_state_is_refused(tmp_path):
    untied = dict(tie_word_embeddings=False)
    weights = packed.modules(**untied)
    weights["lm_head"] = tiny.hf_tensors("llama", packed.KEY, **untied)["lm_head.weight"]
    group = dict(
        targets=["Linear"], weights=dict(num_bits=8, group_size=-1), input_activations=TOKEN8
    )
    config = packed.ct_config({"g": group}, ignore=(), format="int-quantized")
    tensors = {n: int_tensors(n, packed.quantized(w, 8)) for n, w in weights.items()}
    place = packed.directory(tmp_path, tensors, config, **untied)
    with pytest.raises(ValueError, match=r"quantizes the input of lm_head .* is no site"):
        open_checkpoint(place)
