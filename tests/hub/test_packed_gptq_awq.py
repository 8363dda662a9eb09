"""GPTQ and AWQ directories come in as the weights they are, or are refused with the reason."""

import shutil

import jax
import numpy as np
import pytest

from jaxcomp.core.quantize import QTensor, dequantize
from jaxcomp.core.tree import get_at
from jaxcomp.hub import open_checkpoint
from jaxcomp.models.anatomy import anatomy
from tests import packed, tiny

WIDE = dict(num_key_value_heads=4, intermediate_size=64)  # 3 bits fill words 32 channels at a time
AT = "model.layers.1.mlp.up_proj"


def gptq_config(bits=4, group=16, sym=True, **fields):
    """As AutoGPTQ writes it."""
    return (
        dict(
            quant_method="gptq",
            bits=bits,
            group_size=group or -1,
            sym=sym,
            desc_act=False,
            damp_percent=0.01,
            static_groups=False,
            true_sequential=True,
            model_name_or_path=None,
            checkpoint_format="gptq",
        )
        | fields
    )


def awq_config(group=16, **fields):
    """As AutoAWQ writes it."""
    return (
        dict(
            quant_method="awq",
            bits=4,
            group_size=group or -1,
            version="gemm",
            zero_point=True,
            modules_to_not_convert=None,
        )
        | fields
    )


def quantized(bits, group, sym, zero_from=1, family="llama", **overrides):
    return {
        name: packed.quantized(w, bits, group, sym, zero_from, seed)
        for seed, (name, w) in enumerate(packed.modules(family, **overrides).items())
    }


def gptq(place, bits=4, group=16, sym=True, version=1, overrides=None, **fields):
    """A directory and the codes in it."""
    overrides = overrides or {}
    found = quantized(bits, group, sym, 1 if version == 1 else 0, **overrides)
    tensors = {name: packed.gptq_tensors(name, q, version) for name, q in found.items()}
    config = gptq_config(bits, group, sym, **fields)
    return packed.directory(place, tensors, config, **overrides), found


def awq(place, group=16, **fields):
    found = quantized(4, group, False, 0)
    tensors = {name: packed.awq_tensors(name, q) for name, q in found.items()}
    return packed.directory(place, tensors, awq_config(group, **fields)), found


def assert_holds(place, found, symmetric):
    """Every block has the weights of `found`, and nothing but weights is quantized."""
    for i, handle in enumerate(open_checkpoint(place).model.blocks):
        block, struct = handle.load(), handle.struct()
        assert jax.tree.structure(block) == jax.tree.structure(struct) and not block.sites
        same = jax.tree.map(lambda x, s: (x.shape, x.dtype) == (s.shape, s.dtype), block, struct)
        assert all(jax.tree.leaves(same))
        for path in anatomy(block).linears:
            unit, part = path.split(".")
            module = {"attn": "self_attn", "ffn": "mlp"}[unit]
            wanted = found[f"model.layers.{i}.{module}.{part}_proj"]
            w = get_at(block, path).w
            assert w.bits == wanted.bits and (w.zero_point is None) == symmetric
            np.testing.assert_array_equal(dequantize(w).T, wanted.dense, err_msg=path)


# GPTQ.


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("bits", "group", "sym"), [(2, 16, False), (3, 32, False), (4, 8, True), (8, None, False)]
)
def test_gptq_of_both_versions_is_the_weight_it_stands_for(bits, group, sym, version, tmp_path):
    overrides = WIDE if bits == 3 else {}
    name = {1: "gptq", 2: "gptq_v2"}[version]
    place, found = gptq(tmp_path, bits, group, sym, version, overrides, checkpoint_format=name)
    assert_holds(place, found, sym)


def test_three_bits_in_autogptqs_own_words():
    """Its packer's check: the eleventh code of 32 lies in two words, and so does the 22nd."""
    codes = np.arange(32) % 8
    words = packed.stream(codes, 3).view(np.uint32)
    first = sum(int(codes[j]) << (3 * j) for j in range(10)) | int(codes[10] & 3) << 30
    second = int(codes[10]) >> 2 | sum(int(codes[11 + j]) << (3 * j + 1) for j in range(10))
    assert words[0] == first and words[1] == second | (int(codes[21]) & 1) << 31


def test_rows_of_a_fused_module_are_columns_of_its_words(tmp_path):
    found = quantized(4, 16, False, family="phi3")
    tensors = {name: packed.gptq_tensors(name, q) for name, q in found.items()}
    place = packed.directory(tmp_path, tensors, gptq_config(sym=False), "phi3")
    attn = open_checkpoint(place).model.blocks[1].load().attn
    dense = [np.asarray(dequantize(getattr(attn, name).w)).T for name in "qkv"]
    wanted = found["model.layers.1.self_attn.qkv_proj"].dense
    np.testing.assert_array_equal(np.concatenate(dense), wanted)


def test_an_order_of_channels_that_is_the_plain_one_is_accepted(tmp_path):
    place, found = gptq(tmp_path, desc_act=True, static_groups=True)
    assert_holds(place, found, True)
    packed.rewrite(place, lambda tensors: [tensors.pop(n) for n in list(tensors) if "g_idx" in n])
    assert_holds(place, found, True)


def test_groups_in_the_order_of_activations_are_refused_at_the_door(tmp_path):
    place, _ = gptq(tmp_path, desc_act=True)

    def shuffle(tensors):
        tensors[f"{AT}.g_idx"] = tensors[f"{AT}.g_idx"][::-1].copy()

    message = f"'{AT}.g_idx' puts input channel 0 into group 1 and not 0.*desc_act=False"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(packed.rewrite(place, shuffle))


def test_biases_of_zeros_that_no_module_has_are_overlooked(tmp_path):
    place, found = gptq(tmp_path)
    packed.rewrite(place, lambda t: t.update({f"{AT}.bias": np.zeros(48, np.float32)}))
    assert_holds(place, found, True)
    packed.rewrite(place, lambda t: t.update({f"{AT}.bias": np.full(48, 1e-3, np.float32)}))
    with pytest.raises(ValueError, match=f"1 unknown: {AT}.bias"):
        open_checkpoint(place)


def test_modules_that_the_config_leaves_out_are_dense(tmp_path):
    found = quantized(4, 16, True)
    chosen = {n: q for n, q in found.items() if n.endswith(("q_proj", "down_proj"))}
    config = gptq_config(modules_in_block_to_quantize=[["self_attn.q_proj"], ["mlp.down_proj"]])
    tensors = {n: packed.gptq_tensors(n, q) for n, q in chosen.items()}
    block = open_checkpoint(packed.directory(tmp_path, tensors, config)).model.blocks[0].load()
    packs = {path for path in anatomy(block).linears if isinstance(get_at(block, path).w, QTensor)}
    assert packs == {"attn.q", "ffn.down"}


def test_a_quantized_head_is_read_where_the_config_says_so(tmp_path):
    untied = dict(tie_word_embeddings=False)
    found = quantized(4, 16, True, **untied)
    head = tiny.hf_tensors("llama", packed.KEY, **untied)["lm_head.weight"]
    found["lm_head"] = packed.quantized(head, 4, 16)
    tensors = {n: packed.gptq_tensors(n, q) for n, q in found.items()}
    place = packed.directory(tmp_path, tensors, gptq_config(lm_head=True), **untied)
    model = open_checkpoint(place).model
    np.testing.assert_array_equal(dequantize(model.lm_head.w).T, found["lm_head"].dense)
    with pytest.raises(ValueError, match=r"'lm_head' is stored quantized .* it is dense"):
        open_checkpoint(packed.edit(place, lm_head=False))


# AWQ.


@pytest.mark.parametrize("group", [8, None])
def test_awq_is_the_weight_it_stands_for(group, tmp_path):
    place, found = awq(tmp_path, group)
    assert_holds(place, found, False)


def test_awqs_order_of_nibbles():
    words = packed.awq_words(np.arange(8)[None])
    assert words.view(np.uint32)[0, 0] == 0x75316420


@pytest.mark.parametrize("patterns", [["down_proj"], ["model.layers.1.mlp.down_proj", "o_proj"]])
def test_modules_that_awq_did_not_convert_are_dense(patterns, tmp_path):
    found = quantized(4, 16, False, 0)
    kept = {n: q for n, q in found.items() if not any(p in n for p in patterns)}
    tensors = {n: packed.awq_tensors(n, q) for n, q in kept.items()}
    config = awq_config(modules_to_not_convert=patterns)
    place = packed.directory(tmp_path, tensors, config)
    for i, handle in enumerate(open_checkpoint(place).model.blocks):
        down = get_at(handle.load(), "ffn.down").w
        assert isinstance(down, QTensor) == (f"model.layers.{i}.mlp.down_proj" in kept)
    with pytest.raises(ValueError, match="_proj' is stored dense, and by modules_to_not_conv"):
        open_checkpoint(packed.edit(place, modules_to_not_convert=[]))


def test_a_pattern_that_libraries_read_in_two_ways_is_decided_by_the_files(tmp_path):
    place, found = awq(tmp_path, modules_to_not_convert=["mlp.gate"])  # a router's, elsewhere
    assert_holds(place, found, False)


# Refusals.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One directory of each kind; never changed, only copied."""
    place = tmp_path_factory.mktemp("whole")
    gptq(place / "gptq")
    gptq(place / "asym", sym=False)
    awq(place / "awq")
    return place


def damaged(whole, tmp_path, kind):
    return shutil.copytree(whole / kind, tmp_path / "copy")


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_reading_in_small_pieces_changes_nothing(kind, whole, monkeypatch):
    handle = open_checkpoint(whole / kind).model.blocks[0]
    at_once = handle.load()
    monkeypatch.setattr("jaxcomp.hub.leaves.CHUNK", 40)
    jax.tree.map(np.testing.assert_array_equal, handle.load(), at_once)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("gptq", dict(bits=5), "bits=5, pack_dtype='int32' is not read; there is 2, 3, 4, 8"),
        ("gptq", dict(pack_dtype="int64"), "pack_dtype='int64' is not read"),
        ("gptq", dict(checkpoint_format="marlin"), "checkpoint_format='marlin' .* for one kernel"),
        ("gptq", dict(is_marlin_format=True), "laid out for one kernel"),
        ("gptq", dict(group_size=0), "group_size=0 must be a number above 0, or -1"),
        ("gptq", dict(group_size=5), "in_ch=32 is not a multiple of group_size=5"),
        (
            "gptq",
            dict(group_size=8),
            r"qzeros' has shape \[2, 4\] and the config makes it \[4, 4\]",
        ),
        ("gptq", dict(bits=3), "codes of 3 bits do not fill whole words of 32 bits"),
        ("gptq", dict(bits=None), "bits is missing"),
        ("gptq", dict(dynamic={"-:.*down.*": {}}), "dynamic=.* gives modules grids of their own"),
        ("gptq", dict(rotation="hadamard"), "1 field.* rotation='hadamard'"),
        ("gptq", dict(modules_in_block_to_quantize=["self_attn.q_proj"]), "it is dense"),
        ("gptq", dict(lm_head=True), "module 'lm_head' is stored dense"),
        (
            "awq",
            dict(bits=8),
            "8 bits, version 'gemm', zero_point=True is not read; there is 4 bits",
        ),
        ("awq", dict(version="gemv"), "version 'gemv'"),
        ("awq", dict(zero_point=False), "zero_point=False is not read"),
        ("awq", dict(secret=1), "1 field.* secret"),
        ("awq", dict(modules_to_not_convert=["down_proj"]), "down_proj' is stored quantized"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(kind, fields, message, whole, tmp_path):
    place = packed.edit(damaged(whole, tmp_path, kind), **fields)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(place)


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("gptq", "qzeros", None, f"1 missing: {AT}.qzeros"),
        ("gptq", "qweight", np.zeros((5, 48), np.int32), r"has shape \[5, 48\]"),
        ("gptq", "scales", np.ones((2, 48), np.int8), "scales' is stored as int8"),
        ("gptq", "extra", np.ones(3, np.float32), f"1 unknown: {AT}.extra"),
        ("awq", "qzeros", np.zeros((2, 5), np.int32), r"has shape \[2, 5\]"),
        ("awq", "scales", None, f"1 missing: {AT}.scales"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(kind, name, value, message, whole, tmp_path):
    def change(tensors):
        tensors.pop(f"{AT}.{name}", None)
        if value is not None:
            tensors[f"{AT}.{name}"] = value

    place = packed.rewrite(damaged(whole, tmp_path, kind), change)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(place)


@pytest.mark.parametrize(
    ("kind", "name", "at", "value", "message"),
    [
        ("gptq", "scales", (0, 0), np.nan, f"{AT}: 1 of 96 scales are 0, NaN or infinite"),
        ("awq", "scales", (1, 3), 0, f"{AT}: 1 of 96 scales are 0"),
        ("asym", "qzeros", (0, 0), 0x0000000F, "qzeros' holds 15, which version 1 .* gptq_v2"),
        ("gptq", "qzeros", (0, 0), 0x77777776, "zero points other than 8 and the config says sym"),
    ],
)
def test_values_that_mean_nothing_are_refused_with_their_block(
    kind, name, at, value, message, whole, tmp_path
):
    def change(tensors):
        tensors[f"{AT}.{name}"][at] = value

    model = open_checkpoint(packed.rewrite(damaged(whole, tmp_path, kind), change)).model
    model.blocks[0].load()
    with pytest.raises(ValueError, match=message):
        model.blocks[1].load()


def test_the_wrong_version_of_symmetric_zero_points_is_noticed(whole, tmp_path):
    place = packed.edit(damaged(whole, tmp_path, "gptq"), checkpoint_format="gptq_v2")
    with pytest.raises(ValueError, match=r"or checkpoint_format is: correct the config"):
        open_checkpoint(place).model.blocks[0].load()


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_packed_tensors_without_a_config_are_refused(kind, whole, tmp_path):
    place = packed.set_config(damaged(whole, tmp_path, kind), None)
    with pytest.raises(ValueError, match=r"qweight\), and by the missing quantization_config"):
        open_checkpoint(place)
