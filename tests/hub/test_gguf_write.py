"""A model written as GGUF is the model: to ggml's own package, to our reader, to transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gguf import GGMLQuantizationType, GGUFReader, quants

from jaxcomp.core.quantize import QTensor, QuantSpec, dequantize, quantize
from jaxcomp.core.site import ActQuantizer, Site
from jaxcomp.core.transforms import Hadamard
from jaxcomp.core.tree import get_at, named_leaves, replace_at
from jaxcomp.hub import gguf_write, open_checkpoint
from jaxcomp.hub.gguf_blocks import encode_dense, encode_grid, grid_type, loss, take_columns
from jaxcomp.hub.gguf_container import Entry, write_gguf
from jaxcomp.hub.gguf_notes import folded
from jaxcomp.hub.gguf_tokenizer import RULES, build_tokenizer
from jaxcomp.hub.gguf_vocab import PROBE, find_rule
from jaxcomp.hub.names import ARCHITECTURES
from jaxcomp.hub.tokenizer import load_tokenizer
from jaxcomp.hub.write import ExportSource
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import forward, load_block, map_blocks
from jaxcomp.models.generate import generate_tokens

KEY = jax.random.key(0)
FIELDS = dict(intermediate_size=64)  # rows of whole 32-blocks
ROPES = {
    "linear": dict(rope_type="linear", factor=4.0),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    "dynamic": dict(rope_type="dynamic", factor=2.0),
    "llama3": dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
}


def source(tmp_path, family="llama", change=lambda model: model, **overrides):
    """A tiny checkpoint, opened, with its model changed."""
    plain = dict(rope_scaling=None) if family == "phi3" else {}
    path = tiny.checkpoint(family, KEY, tmp_path / "hf", **FIELDS | plain | overrides)
    checkpoint = open_checkpoint(path)
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = change(checkpoint.model)
    return ExportSource(model, checkpoint.hf_config, tmp_path / "tokenizer", {})


def rounded(spec, blocks=(0, 1)):
    """Rounds every linear of some blocks to codes, with scales that float16 has."""

    def visit(index, block):
        for path in anatomy(block).linears if index in blocks else ():
            w = quantize(jnp.asarray(get_at(block, path).w), spec)
            block = replace_at(block, f"{path}.w", with_half_scales(w))
        return block

    return lambda model: map_blocks(model, visit)


def with_half_scales(w):
    return w.replace(scale=w.scale.astype(jnp.float16).astype(jnp.float32))


def dense(model):
    """The model with its codes as floats."""
    w = lambda x: dequantize(x) if isinstance(x, QTensor) else x  # noqa: E731
    model = model.replace(blocks=tuple(map(load_block, model.blocks)))
    return jax.tree.map(w, model, is_leaf=lambda x: isinstance(x, QTensor))


def leaves(model):
    return named_leaves(model.replace(blocks=tuple(map(load_block, model.blocks))))


def stored(path):
    """Name → (type, values) of every tensor, by ggml's own package."""
    found = {}
    for tensor in GGUFReader(path).tensors:
        values = quants.dequantize(np.array(tensor.data), tensor.tensor_type)
        found[tensor.name] = tensor.tensor_type.name, values
    return found


CASES = [(family, None) for family in ARCHITECTURES] + [("llama", rope) for rope in ROPES]
CASES += [("qwen2", "yarn"), ("qwen3", "llama3")]


@pytest.mark.parametrize(("family", "rope"), CASES)
def test_our_reader_finds_the_model_again(family, rope, tmp_path):
    scaled = dict(rope_parameters=ROPES[rope] | dict(rope_theta=500_000.0)) if rope else {}
    opened = source(tmp_path, family, rope_theta=None if rope else 10_000.0, **scaled)
    if rope == "llama3" and ARCHITECTURES[family].name != "llama":
        with pytest.raises(
            ValueError, match="no rotary embedding of kind 'llama3'; it has default"
        ):
            gguf_write.write(opened, tmp_path)
        return
    gguf_write.write(opened, tmp_path)
    again = open_checkpoint(tmp_path / "model.gguf")
    a, b = leaves(again.model), leaves(opened.model)
    assert a.keys() == b.keys()
    for path, x in a.items():
        assert x.dtype == b[path].dtype
        np.testing.assert_array_equal(x, b[path], err_msg=path)
    here, there = (m.model.blocks[0].struct().attn for m in (again, opened))
    wanted = there.rope if rope != "dynamic" else here.rope.__class__(theta=500_000.0)
    assert here.replace(window=None) == there.replace(window=None, rope=wanted)
    assert again.model.config.eos_token_ids == opened.model.config.eos_token_ids


def test_context_ends_where_the_architecture_would_leave_the_model(tmp_path):
    notes = gguf_write.write(source(tmp_path, "mistral"), tmp_path)
    assert open_checkpoint(tmp_path / "model.gguf").model.config.context_length == 8
    assert any("context ends at 8 tokens instead of 64" in note for note in notes)


GRIDS = [
    (bits, symmetric, group)
    for bits in (2, 3, 4, 5, 8)
    for symmetric in (True, False)
    for group in (None, 64)
    if symmetric or bits < 8
]
KINDS = {True: dict.fromkeys((2, 3, 4), "Q4_0") | {5: "Q5_0"}, False: {2: "Q4_0", 3: "Q4_0"}}
KINDS[False][4] = "Q4_1"


@pytest.mark.parametrize(("bits", "symmetric", "group"), GRIDS)
def test_a_grid_is_stored_without_rounding_it_again(bits, symmetric, group):
    spec = QuantSpec(bits, group_size=group, symmetric=symmetric)
    w = with_half_scales(quantize(jax.random.normal(KEY, (192, 20)) + 0.3, spec))
    kind, why = grid_type(w)
    assert kind == KINDS[symmetric].get(bits, "Q8_0") and not why
    values = quants.dequantize(encode_grid(w, kind), GGMLQuantizationType[kind])
    wanted = np.asarray(dequantize(w)).T
    if kind != "Q4_1":
        np.testing.assert_array_equal(values, wanted)
        return
    # m is at most 15 steps and float16 keeps 11 bits of it.
    step = np.repeat(np.asarray(w.scale).T, 192 // w.scale.shape[0], axis=1)
    assert np.max(np.abs(values - wanted) / step) < 16 * 2**-12 * 1.01


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_between_float16_numbers_cost_what_is_reported(bits):
    w = quantize(jax.random.normal(KEY, (64, 20)), QuantSpec(bits, group_size=32))
    kind, _ = grid_type(w)
    raw = encode_grid(w, kind)
    error = quants.dequantize(raw, GGMLQuantizationType[kind]) - np.asarray(dequantize(w)).T
    wanted = np.linalg.norm(error) / np.linalg.norm(dequantize(w))
    assert loss(raw, kind, w).relative == pytest.approx(wanted, rel=1e-4)
    assert 0 < wanted < 2**-11


def test_a_scale_that_float16_does_not_have_is_refused():
    w = quantize(1e6 * jax.random.normal(KEY, (32, 4)), QuantSpec(4))
    with pytest.raises(ValueError, match=r"a scale of .* is beyond the float16 of Q4_0"):
        encode_grid(w, "Q4_0")
    with pytest.raises(ValueError, match="a weight of 100000 is not finite in float16"):
        encode_dense(np.full((2, 32), 1e5, np.float32), "F16")


@pytest.mark.parametrize(
    ("shape", "spec", "message"),
    [
        ((48, 8), QuantSpec(4), "rows of 48 are no whole blocks of 32"),
        ((64, 8), QuantSpec(4, group_size=16), "groups of 16 are no whole blocks"),
        ((64, 8), QuantSpec(8, symmetric=False), "take 9 bits and the widest type has 8"),
    ],
)
def test_what_no_type_holds_is_told(shape, spec, message):
    kind, why = grid_type(quantize(jnp.ones(shape), spec))
    assert kind is None and message in why


def test_one_scale_for_a_whole_tensor_and_single_columns():
    w = quantize(jax.random.normal(KEY, (64, 6)), QuantSpec(8, granularity="tensor"))
    w = take_columns(with_half_scales(w), np.array([5, 0]))
    values = quants.dequantize(encode_grid(w, "Q8_0"), GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(values, np.asarray(dequantize(w)).T)


W4 = QuantSpec(4, group_size=32)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_codes_reach_the_file_and_come_back(family, tmp_path):
    """Rows of q and k are reordered whole, so the reader finds the dequantized model."""
    opened = source(tmp_path, family, rounded(W4, blocks=(0,)))
    notes = gguf_write.write(opened, tmp_path)
    found = stored(tmp_path / "model.gguf")
    assert {k for n, (k, _) in found.items() if n.startswith("blk.0") and "norm" not in n} <= {
        "Q4_0",
        "F32",  # biases
    }
    assert found["blk.1.attn_output.weight"][0] == found["output_norm.weight"][0] == "F32"
    a, b = leaves(open_checkpoint(tmp_path / "model.gguf").model), leaves(dense(opened.model))
    for path in b:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)
    assert any("blk.0.ffn_down.weight: codes kept, scales rounded" in note for note in notes)
    assert any("error up to 0.0e+00" in note for note in notes)


def test_tensors_that_no_type_holds_become_floats_and_are_named(tmp_path):
    opened = source(tmp_path, "qwen2", rounded(QuantSpec(4)), intermediate_size=48)
    notes = gguf_write.write(opened, tmp_path)
    found = stored(tmp_path / "model.gguf")
    assert found["blk.0.ffn_down.weight"][0] == "F16" and found["blk.0.ffn_up.weight"][0] == "Q4_0"
    told = next(note for note in notes if "rows of 48" in note)
    assert told.startswith(
        "blk.0-1.ffn_down.weight: written as F16, as its rows of 48 are no whole"
    )
    wanted = np.asarray(dequantize(load_block(opened.model.blocks[0]).ffn.down.w)).T
    np.testing.assert_allclose(found["blk.0.ffn_down.weight"][1], wanted, rtol=2**-11)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_dense_matrices_take_the_type_that_is_asked_for(kind, tmp_path):
    opened = source(tmp_path, "mistral", dtype="bfloat16")
    notes = gguf_write.write(opened, tmp_path, dense=kind)
    for name, (found, values) in stored(tmp_path / "model.gguf").items():
        assert found == (kind if values.ndim == 2 else "F32"), name
    again = open_checkpoint(tmp_path / "model.gguf").model
    told = [note for note in notes if f"written as {kind}" in note]
    assert bool(told) == (kind != "BF16")  # which is what they were
    got, wanted = (np.asarray(leaves(m)["lm_head.w"], np.float32) for m in (again, opened.model))
    np.testing.assert_allclose(got, wanted, atol=0.02 if kind == "Q8_0" else 1e-5)


def test_names_are_drawn_together():
    names = [f"blk.{i}.a.weight" for i in (0, 1, 2, 7)] + ["output.weight", "blk.3.b.weight"]
    assert folded(names) == ["blk.0-2,7.a.weight", "output.weight", "blk.3.b.weight"]


def test_written_and_read_again_nothing_changes(tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir(), second.mkdir()
    opened = source(tmp_path)
    gguf_write.write(opened, first, dense="Q8_0")
    again = open_checkpoint(first / "model.gguf")
    copy = ExportSource(again.model, again.hf_config, opened.tokenizer, {})
    gguf_write.write(copy, second)
    a, b = (leaves(open_checkpoint(d / "model.gguf").model) for d in (first, second))
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)
    gguf_write.write(copy, tmp_path)
    assert (tmp_path / "model.gguf").read_bytes() == (second / "model.gguf").read_bytes()


def test_blocks_are_read_one_after_another_and_once(tmp_path):
    opened, seen = source(tmp_path), []

    def each(blocks):
        for block in blocks:
            seen.append(len(seen))
            yield block

    written = ExportSource(opened.model, opened.hf_config, opened.tokenizer, {}, each=each)
    gguf_write.write(written, tmp_path)
    assert seen == [0, 1]


def with_site(name, site):
    return lambda model: map_blocks(
        model, lambda i, block: block.replace(sites={name: site} if i == 1 else {})
    )


ACT = ActQuantizer(QuantSpec(8, granularity="token", dynamic=True))


@pytest.mark.parametrize(
    ("family", "change", "overrides", "message"),
    [
        ("llama", with_site("attn_in", Site(ACT)), {}, "block 1 has a quantizer .* at attn_in"),
        (
            "llama",
            with_site("ffn_mid", Site(transforms=(Hadamard(64),))),
            {},
            r"block 1 has a transform \(Hadamard\) at ffn_mid",
        ),
        ("qwen3", None, dict(attention_bias=True), "block 0 has biases and qwen3 of llama.cpp"),
        ("llama", None, dict(hidden_act="gelu_pytorch_tanh"), "gelu_tanh and llama of llama.cpp"),
        (
            "llama",
            None,
            dict(rope_theta=None, rope_parameters=ROPES["yarn"] | dict(beta_fast=16.0)),
            "has beta_fast=16 and llama.cpp's, .*, 32",
        ),
        ("gemma3_text", None, {}, "gemma3_text is not written to GGUF here; there is llama, mis"),
    ],
)
def test_what_llama_cpp_would_not_compute_is_refused(family, change, overrides, message, tmp_path):
    opened = source(tmp_path, family, change or (lambda model: model), **overrides)
    with pytest.raises(ValueError, match=message):
        gguf_write.check(opened.model, opened.hf_config)


def test_a_head_of_its_own_is_written_though_the_config_ties_it(tmp_path):
    def untie(model):
        from jaxcomp.core.linear import Linear

        return model.replace(lm_head=Linear(2.0 * model.embed.weight.T))

    gguf_write.write(source(tmp_path, "llama", untie), tmp_path)
    found = stored(tmp_path / "model.gguf")
    np.testing.assert_array_equal(found["output.weight"][1], 2 * found["token_embd.weight"][1])


def test_an_unknown_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dense='Q9' is no storage type; there is stored, F32, F1"):
        gguf_write.write(source(tmp_path), tmp_path, dense="Q9")


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_known_by_what_it_does(name):
    from tokenizers import Tokenizer, models

    from jaxcomp.hub.gguf_tokenizer import IGNORE_MERGES

    backend = Tokenizer(models.BPE())
    RULES[name](backend)
    assert find_rule(backend, name in IGNORE_MERGES) == name


def test_the_tokenizer_comes_back_with_its_template_and_padding_rows(tmp_path):
    opened = source(tmp_path, vocab_size=400)
    tokenizer = load_tokenizer(opened.tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(opened.tokenizer)
    gguf_write.write(opened, tmp_path)
    again = build_tokenizer(tmp_path / "model.gguf")
    text = PROBE + "<tool> <|end|>x"
    assert again.encode(text) == load_tokenizer(opened.tokenizer).encode(text)
    assert again.chat_template == tokenizer.chat_template
    assert (again.bos_token, again.eos_token) == ("<|start|>", "<|end|>")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert len(fields["tokenizer.ggml.tokens"].data) == 400
    types = [int(fields["tokenizer.ggml.token_type"].parts[i][0]) for i in (-1, 0)]
    assert types == [5, 3] or fields["tokenizer.ggml.token_type"].contents()[-1] == 5


def test_a_tokenizer_that_gguf_cannot_name_is_refused(tmp_path):
    from tokenizers import pre_tokenizers

    opened = source(tmp_path)
    file = opened.tokenizer / "tokenizer.json"
    tokenizer = load_tokenizer(opened.tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save_pretrained(opened.tokenizer)
    with pytest.raises(ValueError, match=r"by a rule that none of smollm, gpt-2, .* is"):
        gguf_write.write(opened, tmp_path)
    state = json.loads(file.read_text())
    state["model"]["byte_fallback"] = True
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="the tokenizer is BPE of SentencePiece, and only byte"):
        gguf_write.write(opened, tmp_path)


def test_the_container_says_what_it_was_given(tmp_path):
    path = tmp_path / "t.gguf"
    metadata = {
        "general.architecture": "none",
        "a.number": np.uint32(7),
        "a.float": np.float32(0.25),
        "a.flag": True,
        "a.list": ["x", "€"],
        "a.ids": np.array([3, -1], np.int32),
    }
    data = np.arange(6, dtype=np.float32).reshape(2, 3)
    entries = [Entry("v", (2, 3), "F32"), Entry("w", (3,), "F16")]
    pieces = [("v", [data[:1], data[1:]]), ("w", [np.ones(3, np.float16)])]
    write_gguf(path, metadata, entries, pieces)
    reader = GGUFReader(path)
    assert {k: reader.fields[k].contents() for k in metadata} == metadata | {"a.ids": [3, -1]}
    np.testing.assert_array_equal(reader.tensors[0].data, data)
    np.testing.assert_array_equal(reader.tensors[1].data, np.ones(3))
    with pytest.raises(ValueError, match="longer than GGUF's 64 bytes"):
        write_gguf(tmp_path / "u.gguf", {}, [Entry("n" * 65, (1,), "F32")], [])


@pytest.mark.parametrize("family", sorted(set(ARCHITECTURES) - {"olmo2"}))  # no loader for it
def test_transformers_loads_it_and_computes_the_same(family, tmp_path):
    """At positions far beyond the first, where a wrong order of rows shows."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    # What its GGUF loader does not read: windows, and how much of a head turns.
    wide = {"mistral": dict(sliding_window=None), "phi3": dict(partial_rotary_factor=None)}
    opened = source(tmp_path, family, rounded(W4), **wide.get(family, {}))
    gguf_write.write(opened, tmp_path)
    fields = dict(head_dim=16) if family == "qwen3" else {}  # nor this
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, **fields
    ).eval()
    assert theirs.config.model_type == ARCHITECTURES[family].name
    tokens = np.asarray(tiny.tokens(jax.random.key(1), 2, 60))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    ours = np.asarray(forward(dense(opened.model), jnp.asarray(tokens)))
    assert np.abs(ours - wanted).max() < 1e-4 * np.ptp(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [None, QuantSpec(4, group_size=64)])
def test_a_real_model_generates_the_same_through_transformers(spec, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    checkpoint = open_checkpoint("demo:smollm2")
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = rounded(spec, range(30))(checkpoint.model) if spec else checkpoint.model
    gguf_write.write(
        ExportSource(model, checkpoint.hf_config, tmp_path / "tokenizer", {}), tmp_path
    )
    if spec is None:
        a, b = leaves(open_checkpoint(tmp_path / "model.gguf").model), leaves(model)
        for path in b:
            np.testing.assert_array_equal(a[path], b[path], err_msg=path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    theirs.generation_config.eos_token_id = None  # all 32 tokens are compared
    ids = tokenizer("The Atlantic Ocean is", return_tensors="pt").input_ids
    wanted = theirs.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :].tolist()
    found = generate_tokens(model, ids.numpy(), 32).tokens[0].tolist()
    assert found == wanted and len(found) == 32
