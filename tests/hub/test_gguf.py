"""A GGUF file gives the model of the Hugging Face directory it was made from, or is refused."""

import math
import struct

import jax
import numpy as np
import pytest
import tiny

from jaxcomp.core.tree import named_leaves
from jaxcomp.hub import open_checkpoint
from jaxcomp.hub.gguf import PLAIN, GGUFFile
from jaxcomp.hub.names import BLOCK, MODEL, to_gguf, to_hf
from jaxcomp.models.decoder import forward, load_block
from jaxcomp.models.rope import Rope, turned_channels

gguf = pytest.importorskip("gguf")

KEY = jax.random.key(0)
FAMILIES = ("llama", "qwen2", "qwen3", "olmo2")
ARCHITECTURES = {"gemma3_text": "gemma3"}  # where it is not the family's name
FIELDS = dict(intermediate_size=64)  # rows of whole 32-blocks
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def write(path, family="llama", kind="F32", extra=lambda writer: None, **overrides):
    """A file as llama.cpp's converter writes it: q and k of llama interleaved, norms in F32."""
    config = tiny.hf_config(family, **FIELDS, **overrides)
    architecture = ARCHITECTURES.get(family, family)
    writer = gguf.GGUFWriter(path, architecture)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or 10_000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    if window := config.get("sliding_window"):
        writer.add_sliding_window(window)
    if (scaling := config.get("rope_scaling") or {}).get("type") == "longrope":
        original = config["original_max_position_embeddings"]
        factor = math.log(config["max_position_embeddings"] / original) / math.log(original)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + factor))
        for side in ("long", "short"):
            divisors = np.asarray(scaling[f"{side}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{side}.weight", divisors)
    if share := config.get("partial_rotary_factor"):
        writer.add_rope_dimension_count(int(share * head_dim))
    extra(writer)
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, array in tiny.hf_tensors(family, KEY, **FIELDS, **overrides).items():
        if architecture == "gemma3" and name.endswith("norm.weight"):
            array = array + np.float32(1)
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            n = heads if "q_proj" in name else kv_heads
            halves = array.reshape(n, 2, head_dim // 2, *array.shape[1:])
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        stored = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        data = gguf.quants.quantize(array, stored)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def loaded(model):
    return named_leaves(model.replace(blocks=tuple(map(load_block, model.blocks))))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_gives_the_model_and_config_of_its_directory(family, tmp_path):
    here = open_checkpoint(write(tmp_path / "m.gguf", family))
    there = open_checkpoint(tiny.checkpoint(family, KEY, tmp_path / "hf", **FIELDS))
    a, b = loaded(here.model), loaded(there.model)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)
    structs = [[block.struct() for block in c.model.blocks] for c in (here, there)]
    assert structs[0] == structs[1]
    assert here.model.config.eos_token_ids == (2,)


def test_norms_of_gemma3_are_put_back_and_what_llama_cpp_knows_is_said(tmp_path):
    fields = dict(query_pre_attn_scalar=16, sliding_window_pattern=None, num_hidden_layers=6)
    here = open_checkpoint(write(tmp_path / "m.gguf", "gemma3_text", **fields)).model
    there = tiny.model("gemma3_text", KEY, **FIELDS, **fields)
    a, b = loaded(here), loaded(there)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], atol=2e-7, rtol=0, err_msg=path)
    for block, wanted in zip(here.blocks, there.blocks, strict=True):
        assert block.struct() == jax.eval_shape(lambda b: b, wanted)
    assert [b.struct().attn.window for b in here.blocks] == [8] * 5 + [None]
    assert here.config == there.config and here.embed.scale == there.embed.scale


@pytest.mark.parametrize(
    ("family", "fields", "told"),
    [  # transformers does not read LongRoPE, windows or a share of a head from phi3, nor the scale
        ("phi3", dict(rope_scaling=None, partial_rotary_factor=None), dict(pad_token_id=0)),
        (
            "gemma3_text",
            dict(sliding_window_pattern=None, num_hidden_layers=6),
            dict(query_pre_attn_scalar=16, pad_token_id=0),
        ),
    ],
)
def test_logits_of_a_file_are_those_of_transformers(family, fields, told, tmp_path):
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    write(tmp_path / "m.gguf", family, **fields)
    tokens = tiny.tokens(KEY)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, **told
    )
    with torch.no_grad():
        theirs = theirs.eval()(torch.tensor(np.asarray(tokens, np.int64))).logits.numpy()
    ours = forward(open_checkpoint(tmp_path / "m.gguf").model, tokens)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.ptp(theirs), rtol=0)


def test_gemma3_of_62_blocks_has_another_scale_and_one_without_windows_none(tmp_path):
    fields = dict(num_hidden_layers=62, head_dim=4)
    (tmp_path / "large").mkdir()
    large = open_checkpoint(write(tmp_path / "large" / "m.gguf", "gemma3_text", **fields)).model
    assert large.blocks[0].struct().attn.scale == (32 / 4) ** -0.5
    bare = open_checkpoint(
        write(tmp_path / "m.gguf", "gemma3_text", sliding_window=None, num_hidden_layers=1)
    ).model
    assert bare.blocks[0].struct().attn.window is None
    assert bare.blocks[0].struct().attn.rope == Rope(1e6)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_fused_tensors_and_longrope_of_phi3(kind, tmp_path):
    here = open_checkpoint(write(tmp_path / "m.gguf", "phi3", kind, sliding_window=9)).model
    there = tiny.model("phi3", KEY, **FIELDS, sliding_window=9)
    a, b = loaded(here), loaded(there)
    assert a.keys() == b.keys()
    for path in a:
        step = np.abs(b[path]).max() / 127 if kind == "Q8_0" and b[path].ndim == 2 else 0
        np.testing.assert_allclose(a[path], b[path], atol=step, rtol=0, err_msg=path)
    for block, wanted in zip(here.blocks, there.blocks, strict=True):
        attn, rope = block.struct().attn, wanted.attn.rope
        assert (attn.window, attn.rope.kind, attn.rope.original_context) == (9, "longrope", 12)
        assert (attn.rope.partial, attn.rope.theta) == (0.75, 1e4)
        for name in ("short_factors", "long_factors", "attention_factor"):
            np.testing.assert_allclose(getattr(attn.rope, name), getattr(rope, name), rtol=1e-7)
    fields = dict(rope_scaling=None, partial_rotary_factor=None)
    plain = open_checkpoint(write(tmp_path / "plain.gguf", "phi3", **fields)).model
    assert plain.blocks[0].struct().attn.rope == Rope(1e4)


def test_a_share_of_a_head_is_the_one_that_gives_the_channels_of_the_file(tmp_path):
    assert int(100 * (58 / 100)) == 57  # rounding, which the reader makes up for
    fields = dict(rope_scaling=None, partial_rotary_factor=0.585, head_dim=100)
    path = write(tmp_path / "m.gguf", "phi3", **fields)
    assert turned_channels(open_checkpoint(path).model.blocks[0].struct().attn.rope, 100) == 58


@pytest.mark.parametrize(
    ("family", "extra", "message"),
    [
        ("phi3", lambda w: None, "'rope_factors_short.weight' is missing; convert it again"),
        (
            "olmo2",
            lambda w: w.add_tensor("rope_factors_long.weight", np.ones(4, np.float32)),
            "1 unknown: rope_factors_long",
        ),
        ("olmo2", lambda w: w.add_sliding_window(8), "attention.sliding_window='8'"),
        (
            "olmo2",  # whose norms are behind the units
            lambda w: w.add_tensor("blk.0.ffn_norm.weight", np.ones(32, np.float32)),
            "1 unknown: blk.0.ffn_norm.weight",
        ),
        ("gemma3_text", lambda w: w.add_final_logit_softcapping(30.0), "softcapping='30.0'"),
    ],
)
def test_what_these_architectures_cannot_have_is_refused(family, extra, message, tmp_path):
    fields = {}
    if family == "phi3":
        fields = dict(rope_scaling=None)
        extra = lambda w: w.add_tensor("rope_factors_long.weight", np.ones(3, np.float32))  # noqa: E731
        message = "attn_factor is missing|" + message
    path = write(tmp_path / "m.gguf", family, extra=extra, **fields)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(path)


def test_biases_of_interleaved_heads_are_put_back(tmp_path):
    fields = dict(attention_bias=True, mlp_bias=True)
    model = open_checkpoint(write(tmp_path / "m.gguf", **fields)).model
    a, b = loaded(model), loaded(tiny.model("llama", KEY, **FIELDS, **fields))
    assert a.keys() == b.keys() and "blocks.0.attn.q.b" in a
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_quantized_rows_are_put_back_whole(kind, tmp_path):
    model = open_checkpoint(write(tmp_path / "m.gguf", kind=kind)).model
    q = model.blocks[0].load().attn.q.w
    stored = gguf.GGMLQuantizationType[kind]
    w = tiny.hf_tensors("llama", KEY, **FIELDS)["model.layers.0.self_attn.q_proj.weight"]
    wanted = gguf.quants.dequantize(gguf.quants.quantize(w, stored), stored)
    assert q.dtype == PLAIN.get(kind, np.float32)
    np.testing.assert_array_equal(q.astype(np.float32).T, wanted)


DECODED = [
    kind.name
    for kind in gguf.GGMLQuantizationType
    if kind in gguf.quants._type_traits and kind.name not in PLAIN
]


@pytest.mark.parametrize("kind", DECODED)
def test_every_type_the_package_decodes_is_read_by_rows(kind, tmp_path):
    stored = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (6, 2 * block_bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("t", raw, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "m.gguf")
    assert file.tensors["t"].shape == (6, 2 * block) and file.tensors["t"].type == kind
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(raw, stored)
        np.testing.assert_array_equal(file.rows("t", 0, 6), wanted)
        np.testing.assert_array_equal(file.rows("t", 2, 5), wanted[2:5])


@pytest.mark.parametrize("borders", [(1.0, 4.0), (0.5, 3.0)])
def test_llama3_scaling_is_recovered_from_its_divisors(borders, tmp_path):
    low, high = borders
    fields = dict(head_dim=64, max_position_embeddings=131_072)
    freq = 10_000.0 ** -(np.arange(0, 64, 2) / 64)
    smooth = np.clip((8192 * freq / (2 * math.pi) - low) / (high - low), 0, 1)
    divisors = (1 / (smooth + (1 - smooth) / 8.0)).astype(np.float32)
    path = write(
        tmp_path / "m.gguf", extra=lambda w: w.add_tensor("rope_freqs.weight", divisors), **fields
    )
    rope = open_checkpoint(path).model.blocks[0].struct().attn.rope
    assert (rope.kind, rope.factor, rope.original_context) == ("llama3", 8.0, 8192)
    assert (rope.low_freq_factor, rope.high_freq_factor) == pytest.approx(borders, rel=1e-4)


def test_divisors_of_another_origin_are_refused(tmp_path):
    divisors = np.linspace(1, 3, 4).astype(np.float32)
    path = write(tmp_path / "m.gguf", extra=lambda w: w.add_tensor("rope_freqs.weight", divisors))
    with pytest.raises(ValueError, match=r"'rope_freqs.weight' is no Llama 3 scaling"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("kind", "rope"),
    [("linear", ("linear", 4.0, 0)), ("yarn", ("yarn", 4.0, 16)), ("longrope", None)],
)
def test_rope_scalings_of_the_metadata(kind, rope, tmp_path):
    def extra(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)

    path = write(tmp_path / "m.gguf", extra=extra)
    if rope is None:
        with pytest.raises(ValueError, match=r"rope.scaling.type='longrope' is not supported"):
            open_checkpoint(path)
        return
    found = open_checkpoint(path).model.blocks[0].struct().attn.rope
    assert (found.kind, found.factor, found.original_context) == rope


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (lambda w: w.add_uint32("llama.attention.sliding_window", 8), "sliding_window='8'"),
        (lambda w: w.add_bool("llama.attention.causal", False), "attention.causal is false"),
        (lambda w: w.add_uint16("split.count", 3), "one of 3 parts; merge them"),
        (lambda w: w.add_uint32("llama.expert_count", 8), "expert_count=8: mixtures of experts"),
        (lambda w: w.add_uint32("llama.rope.dimension_count", 4), "dimension_count=4 differs"),
        (lambda w: w.add_uint32("llama.vocab_size", 7), "vocab_size=7 and tensor 'token_embd"),
        (
            lambda w: w.add_tensor("blk.0.odd.weight", np.ones(3, np.float32)),
            "1 unknown: blk.0.odd",
        ),
    ],
)
def test_what_the_model_does_not_have_is_refused(extra, message, tmp_path):
    path = write(tmp_path / "m.gguf", extra=extra)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(path)


def test_an_architecture_without_a_family_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"'gemma2' is not supported; there is llama, qwen2"):
        open_checkpoint(path)


def put(at, layout, value):
    """A change of the bytes at `at`."""

    def change(raw):
        size = struct.calcsize(layout)
        return raw[:at] + struct.pack(layout, value) + raw[at + size :]

    return change


def at_name(name, shift, layout, value):
    """A change at `shift` bytes after the string `name` in the head of the file."""
    return lambda raw: put(raw.index(name) + len(name) + shift, layout, value)(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"", "the magic needs 4 bytes from byte 0"),
        (lambda raw: b"GGML" + raw[4:], "starts with b'GGML'"),
        (put(4, "<I", 1), "version 1 is unknown; versions 2 and 3"),
        (put(4, ">I", 3), "it is big endian"),
        (put(8, "<Q", 2**40), f"a table of {2**40} tensors needs"),
        (put(16, "<Q", 2**40), f"metadata of {2**40} keys needs"),
        (put(24, "<Q", 2**40), "metadata key 0 .* is 1099511627776 bytes long"),
        (lambda raw: raw[:100], "needs .* bytes from byte .* it is cut or damaged"),
        (lambda raw: raw[:-3000], r"tensor '.*' \(F32, shape .*\) takes bytes .* the file ends at"),
        (
            at_name(b"llama.block_count", 0, "<I", 77),
            "'llama.block_count' has unknown value type 77",
        ),
        (at_name(b"general.architecture", 4, "<Q", 2**50), "metadata 'general.archit.* needs 11"),
        (at_name(b"llama.block_count", -5, "5s", b"\xff" * 5), "metadata key .* is not UTF-8"),
        (at_name(b"output_norm.weight", 0, "<I", 9), "'output_norm.weight' has 9 axes"),
        (
            at_name(b"output_norm.weight", 4, "<Q", 0),
            "'output_norm.weight' has an axis of length 0",
        ),
        (at_name(b"output_norm.weight", 4, "<Q", 2**60), "'output_norm.weight' .* takes bytes"),
        (at_name(b"output_norm.weight", 12, "<I", 999), "storage type 999, which the installed"),
        (at_name(b"output_norm.weight", 12, "<I", 12), "stored as Q4_K, whose blocks of 256"),
        (at_name(b"output_norm.weight", 12, "<I", 26), "stored as I32, which .* cannot dequantize"),
        (at_name(b"output_norm.weight", 16, "<Q", 3), "no multiple of the alignment 32"),
        (at_name(b"output_norm.weight", 16, "<Q", 32), "'output_norm.weight'.* overlap"),
    ],
)
def test_a_damaged_file_is_refused_before_its_data_is_touched(change, message, tmp_path):
    raw = write(tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(change(raw))
    with pytest.raises(ValueError, match=f"m.gguf: .*{message}"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_file_cut_anywhere_in_its_head_is_refused(tmp_path):
    raw = write(tmp_path / "m.gguf").read_bytes()
    for end in range(0, 1500, 7):
        (tmp_path / "cut.gguf").write_bytes(raw[:end])
        with pytest.raises(ValueError, match=r"cut or damaged"):
            GGUFFile(tmp_path / "cut.gguf")


def test_names_translate_both_ways():
    for name in MODEL:
        assert to_gguf(to_hf(f"{name}.weight")) == f"{name}.weight"
    for name in BLOCK:
        assert to_gguf(to_hf(f"blk.12.{name}.bias")) == f"blk.12.{name}.bias"
    assert (
        to_hf("blk.0.attn_rot_embd.weight") is None and to_gguf("model.layers.0.odd.bias") is None
    )
