"""An embedding and a head in codes: through the model, into memory and onto disk."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGUFReader

from jaxcomp import artefact
from jaxcomp.core.quantize import QTensor, QuantSpec, dequantize
from jaxcomp.hub import compressed_tensors, dense, gguf_write
from jaxcomp.hub.read import open_checkpoint
from jaxcomp.hub.write import ExportSource
from jaxcomp.methods import RTN, QuaRot
from jaxcomp.models.decoder import empty_cache, extend, forward, load_block
from jaxcomp.models.head import open_head, token_scores
from jaxcomp.models.layers import embed_tokens, table_of
from jaxcomp.models.prepare import prepare
from jaxcomp.models.sizes import sizes
from pallas_kernels import use
from pallas_kernels.chips import CHIPS
from pallas_kernels.native import library
from pallas_kernels.prepare import prepare as prepare_weight
from pallas_kernels.weight import dequantize as dequantize_weight
from pallas_kernels.weight import take_columns
from tests import tiny
from tests.kernels import cases

KEY = jax.random.key(0)
TOKENS = tiny.tokens(jax.random.key(1), 2, 10)
ENDS = RTN(weight=None, ends=QuantSpec(8, group_size=16))
FAMILIES = ("llama", "mistral", "gemma3_text")  # tied; untied; tied with a scale


def rounded(family, step=ENDS):
    return step(tiny.model(family, KEY)).model


def in_floats(model):
    """The same model with arrays where it has codes."""
    w = lambda x: dequantize(x) if isinstance(x, QTensor) else x  # noqa: E731
    model = model.replace(embed=model.embed.replace(weight=table_of(model.embed)))
    return jax.tree.map(w, model, is_leaf=lambda x: isinstance(x, QTensor))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_of_codes_means_its_numbers(family):
    model = rounded(family)
    assert isinstance(model.embed.weight, QTensor) and model.embed.table_shape == (tiny.VOCAB, 32)
    plain = in_floats(model)
    np.testing.assert_array_equal(
        embed_tokens(model.embed, TOKENS, "float32"), embed_tokens(plain.embed, TOKENS, "float32")
    )
    a, b = jax.jit(forward)(model, TOKENS), jax.jit(forward)(plain, TOKENS)
    np.testing.assert_allclose(a, b, atol=1e-5 * np.ptp(b))
    x, targets = jnp.asarray(jax.random.normal(KEY, (2, 10, 32))), np.asarray(TOKENS)
    found, wanted = (token_scores(open_head(m), x, targets).nll for m in (model, plain))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prepared_model_reads_its_codes(family):
    model = rounded(family, RTN(QuantSpec(4, group_size=8), ends=QuantSpec(8)))
    prepared, expected = prepare(model), forward(model, TOKENS)
    assert (prepared.embed.weight is prepared.lm_head.w) == (model.lm_head is None)
    found, _ = extend(prepared, TOKENS, empty_cache(prepared, 2, 16), left_padded=True, fresh=True)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.ptp(expected))
    assert jax.tree.structure(prepare(prepared)) == jax.tree.structure(prepared)


@pytest.mark.parametrize("chip", [None, "cpu", "v6e", "h100"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_columns_are_read_from_every_layout(bits, chip):
    if chip == "cpu" and not library.available():
        pytest.skip("no native library")
    rng = np.random.default_rng(bits)
    w, _ = cases.weight(rng, 96, 70, bits, 32, symmetric=bits != 3)
    wanted = np.asarray(dequantize_weight(w)).T
    if chip is not None:
        w = prepare_weight(w, CHIPS[chip])
        assert w.layout != "canonical"
    ids = jnp.array([[0, 69, 3], [64, 64, 1]])
    np.testing.assert_array_equal(take_columns(w, ids), wanted[ids])


def test_rounding_is_that_of_one_range_a_token_and_reported():
    model = tiny.model("mistral", KEY)
    result = ENDS(model)
    assert [(row.block, row.linear) for row in result.rows[-2:]] == [
        (None, "embed"),
        (None, "head"),
    ]
    errors = [row.metrics["weight_error"] for row in result.rows[-2:]]
    assert all(0 < error < 1e-4 for error in errors)
    assert result.model.embed.weight.scale.shape == (2, tiny.VOCAB)
    step = np.asarray(result.model.embed.weight.scale).max()
    gap = np.abs(np.asarray(table_of(result.model.embed)) - np.asarray(model.embed.weight)).max()
    assert gap <= step / 2 * 1.001
    again = ENDS(result.model)
    assert again.rows[-1].metrics == {"skipped": "already quantized to 8 bits"}
    before, after = sizes(model), sizes(result.model)
    assert after["parameters"] == before["parameters"]
    assert after["embed_bytes"] == tiny.VOCAB * (32 + 2 * 4)


def test_an_artefact_keeps_the_codes(tmp_path):
    model = rounded("llama")
    artefact.save(model, tmp_path / "a")
    back = artefact.load(tmp_path / "a")
    np.testing.assert_array_equal(back.embed.weight.packed, model.embed.weight.packed)
    np.testing.assert_array_equal(forward(back, TOKENS), forward(model, TOKENS))


def source(tmp_path, family, step, **config):
    checkpoint = open_checkpoint(tiny.checkpoint(family, KEY, tmp_path / "in", **config))
    model = checkpoint.model
    model = step(model.replace(blocks=tuple(map(load_block, model.blocks)))).model
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "out").mkdir()
    return ExportSource(model, checkpoint.hf_config, tmp_path / "tokenizer", {})


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_dense_export_has_the_numbers(family, tmp_path):
    given = source(tmp_path, family, ENDS)
    dense.check(given.model, given.hf_config)
    notes = dense.write(given, tmp_path / "out")
    assert "embedding is dequantized to float32" in notes[0]
    read = open_checkpoint(tmp_path / "out").model
    np.testing.assert_array_equal(read.embed.weight, table_of(given.model.embed))
    if read.lm_head is not None:
        np.testing.assert_array_equal(read.lm_head.w, dequantize(given.model.lm_head.w))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_compressed_tensors_keeps_the_codes_of_a_head_of_its_own(family, tmp_path):
    given = source(tmp_path, family, RTN(QuantSpec(4, group_size=16), ends=QuantSpec(8)))
    compressed_tensors.check(given.model, given.hf_config)
    notes = compressed_tensors.write(given, tmp_path / "out")
    assert "embedding is dequantized" in notes[0]
    read = open_checkpoint(tmp_path / "out").model
    np.testing.assert_array_equal(read.embed.weight, table_of(given.model.embed))
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert ("lm_head" in ignored["ignore"]) == (family == "llama")
    if family == "mistral":
        np.testing.assert_array_equal(read.lm_head.w.codes, given.model.lm_head.w.codes)


def test_gguf_has_the_codes_of_the_table(tmp_path):
    step = RTN(QuantSpec(4, group_size=32), ends=QuantSpec(8, group_size=32))
    given = source(tmp_path, "llama", step, intermediate_size=64)
    gguf_write.check(given.model, given.hf_config)
    gguf_write.write(given, tmp_path / "out")
    stored = {t.name: t for t in GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert stored["token_embd.weight"].tensor_type.name == "Q8_0"
    read = open_checkpoint(tmp_path / "out" / "model.gguf").model
    table = np.asarray(table_of(given.model.embed))
    np.testing.assert_allclose(table_of(read.embed), table, atol=2e-3 * np.abs(table).max())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (QuantSpec(8, group_size=5), "ends: in_ch=32 is not a multiple of group_size=5"),
        (QuantSpec(8, granularity="tensor"), "ends has granularity='tensor'"),
        (QuantSpec(8, granularity="token", dynamic=True), "ends has granularity='token'"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        RTN(weight=None, ends=spec).check(tiny.model("llama", KEY))


def test_a_rotation_comes_before_the_rounding():
    with pytest.raises(ValueError, match="embed is already quantized to 8 bits"):
        QuaRot(head_mix="none").check(rounded("llama"))


def test_a_prepared_model_on_references_reads_the_same():
    model = rounded("llama")
    prepared = prepare(model)
    with use(reference=True):
        np.testing.assert_allclose(
            embed_tokens(prepared.embed, TOKENS, "float32"),
            embed_tokens(model.embed, TOKENS, "float32"),
            rtol=1e-6,
        )
