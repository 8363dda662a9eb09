"""compressed-tensors: our bytes against the library's, our logits against transformers'."""

import copy
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.linear import Linear
from jaxcomp.core.quantize import QTensor, QuantSpec, dequantize
from jaxcomp.core.site import ActQuantizer, Site
from jaxcomp.core.tensorfile import TensorFile
from jaxcomp.core.transforms import Diag, Hadamard, Kron
from jaxcomp.core.tree import get_at, replace_at
from jaxcomp.hub import compressed_tensors
from jaxcomp.hub.compressed_tensors import weight_layout
from jaxcomp.hub.ct_config import (
    ModuleScheme,
    check_matches,
    match_modules,
    patterns,
    quantization_config,
)
from jaxcomp.hub.ct_pack import pack_weight
from jaxcomp.hub.ct_scheme import plan
from jaxcomp.hub.stock import stock
from jaxcomp.hub.write import ExportSource
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import forward
from jaxcomp.models.families import FAMILIES
from jaxcomp.models.fold import append_transform, rotate_keys
from pallas_kernels.packing import pack
from tests import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
library = pytest.importorskip("compressed_tensors")

KEY = jax.random.key(0)
TOLERANCE = 1e-5  # of the range of the logits
run = jax.jit(forward)  # one compilation a family


def token(bits, symmetric=True):
    return QuantSpec(bits=bits, granularity="token", symmetric=symmetric, dynamic=True)


def random_weight(rng, in_ch, out_ch, bits, group=None, symmetric=True, scales=None):
    """A QTensor of random codes, packed by numpy alone."""
    groups, half = in_ch // (group or in_ch), 2 ** (bits - 1)
    codes = rng.integers(-half, half, (in_ch, out_ch))
    stream = (codes.T[:, :, None] >> np.arange(bits) & 1).astype(np.uint8).reshape(out_ch, -1)
    packed = np.packbits(stream, axis=1, bitorder="little").T
    scale = rng.uniform(0.5, 1.5, scales or (groups, out_ch)) / half / np.sqrt(in_ch)
    zero = None if symmetric else rng.integers(-half // 2, half // 2, scale.shape).astype(np.int8)
    return QTensor(packed, scale.astype(np.float32), zero, bits, in_ch)


def plain(w):
    """The float32 weight that a QTensor stands for, by numpy alone."""
    rows, groups = w.packed.T, w.scale.shape[0]
    bits = np.unpackbits(rows, axis=1, count=w.in_ch * w.bits, bitorder="little")
    codes = (bits.reshape(len(rows), w.in_ch, w.bits) << np.arange(w.bits)).sum(-1).T
    codes = np.where(codes >= 2 ** (w.bits - 1), codes - 2**w.bits, codes)
    q = codes.reshape(groups, -1, len(rows)).astype(np.float32)
    q = q if w.zero_point is None else q - w.zero_point[:, None]
    return (q * w.scale[:, None]).reshape(w.in_ch, len(rows))


@functools.cache
def random_model(family="llama"):
    return tiny.model(family, KEY)


@functools.cache
def packed_model(family="llama", bits=4, group=16, symmetric=True, act=None):
    """A tiny model with random codes for weights, and a quantizer at the inputs of linears."""
    return with_grids(
        family, lambda path, index: dict(bits=bits, group=group, symmetric=symmetric), act
    )


def with_grids(family, grid, act=None):
    """A tiny model whose linears are on the grids that `grid(path, block)` gives, if any."""
    rng, blocks = np.random.default_rng(0), []
    for index, block in enumerate(random_model(family).blocks):
        for path in anatomy(block).linears:
            if (fields := grid(path, index)) is not None:
                w = random_weight(rng, *get_at(block, path).w.shape, **fields)
                block = replace_at(block, f"{path}.w", w)
        site = Site(None if act is None else ActQuantizer(act))
        blocks.append(block.replace(sites=dict.fromkeys(anatomy(block).sites, site)))
    return random_model(family).replace(blocks=tuple(blocks))


def ours(model, tokens):
    """Our logits, from dequantized weights."""
    is_weight = lambda x: isinstance(x, QTensor)  # noqa: E731
    dense = jax.tree.map(lambda x: plain(x) if is_weight(x) else x, model, is_leaf=is_weight)
    return np.asarray(run(dense, tokens))


def write(model, place, family="llama", **options):
    """The export of a tiny model as a directory, with the notes."""
    (place / "tokenizer").mkdir(parents=True)
    out = place / "out"
    out.mkdir()
    source = ExportSource(model, tiny.hf_config(family), place / "tokenizer", {})
    return out, compressed_tensors.write(source, out, **options)


def load(out, dequantize=False):
    """The export in transformers, on its way of choice."""
    how = dict(dequantize=True) if dequantize else {}
    how = {"quantization_config": transformers.CompressedTensorsConfig(**how)} if how else {}
    cls = transformers.AutoModelForCausalLM
    return cls.from_pretrained(out, dtype=torch.float32, **how).eval()


def logits(model, tokens, **options):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens, np.int64)), **options).logits.numpy()


def assert_close(ours, theirs):
    ours = np.asarray(ours)
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.ptp(theirs)


def assert_close_but_for_flips(ours, theirs):
    """For quantized inputs: an entry on the border of two codes may fall to either side.

    The flip is seen in what that token and the later ones of its sequence compute.
    """
    error = np.abs(np.asarray(ours) - theirs).max(axis=-1) / np.ptp(theirs)
    assert np.mean(error <= TOLERANCE) >= 0.5 and error.max() <= 0.1


# Bytes.


def scheme_of(w, act=None):
    groups = w.scale.shape[-2]
    size = None if groups == 1 else w.in_ch // groups
    return ModuleScheme(w.bits, size, w.zero_point is None, act)


def decompressed(w, scheme):
    """The weight as the library's own decompressor gives it, `[out_ch, in_ch]`."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(quantization_config({"m": scheme}))
    group = config.config_groups["group_0"]
    layout = weight_layout("m", w, scheme, np.dtype(np.float32), lambda part: part)
    for name, entry in layout.items():
        assert entry.make(w).shape == entry.spec.shape, name
    state = {n.removeprefix("m."): torch.tensor(e.make(w)) for n, e in layout.items()}
    return BaseCompressor.get_value_from_registry(scheme.format).decompress(state, group)["weight"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_librarys_decompressor_gives_our_weight_to_the_bit(bits, symmetric):
    rng = np.random.default_rng(bits)
    for (in_ch, out_ch), group in {(64, 24): 16, (33, 7): None, (40, 13): 8}.items():
        w = random_weight(rng, in_ch, out_ch, bits, group, symmetric)
        np.testing.assert_array_equal(decompressed(w, scheme_of(w)).numpy(), plain(w).T)


def test_the_weight_of_these_tests_is_what_this_library_multiplies_by():
    w = random_weight(np.random.default_rng(0), 40, 13, 3, 8, symmetric=False)
    np.testing.assert_array_equal(plain(w), dequantize(w))


def test_codes_of_eight_bits_for_integer_products_are_bytes():
    w = random_weight(np.random.default_rng(0), 48, 20, 8)
    scheme = scheme_of(w, token(8))
    assert scheme.format == "int-quantized" and scheme_of(w).format == "pack-quantized"
    np.testing.assert_array_equal(decompressed(w, scheme).numpy(), plain(w).T)


def test_one_scale_for_a_weight_is_written_for_every_channel():
    w = random_weight(np.random.default_rng(0), 32, 6, 4, scales=(1, 1))
    np.testing.assert_array_equal(decompressed(w, scheme_of(w)).numpy(), plain(w).T)


@pytest.mark.parametrize(
    ("codes", "bits", "words"),
    [
        (np.arange(-8, 0), 4, [0x76543210]),
        (np.tile(np.arange(-4, 4), 4), 3, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    ],
)
def test_words_hold_offset_codes_lowest_bits_first(codes, bits, words):
    """Known words of the format, computed by its own packer."""
    packed = np.asarray(pack(codes.astype(np.int8)[:, None], bits))
    assert pack_weight(packed, bits, len(codes)).view(np.uint32).tolist() == [words]


# Logits. "packed" loads what is there and decompresses, "dequantized" loads a dense model.

SCHEMES = {
    "W8 per channel": (dict(bits=8, group=None), ("packed", "dequantized")),
    "W3 in groups": (dict(bits=3, group=8), ("packed", "dequantized")),
    "W4 in groups, asymmetric": (dict(symmetric=False), ("dequantized",)),
    "W8A8, asymmetric inputs": (dict(bits=8, group=None, act=token(8, False)), ("packed",)),
    "W4A4, asymmetric inputs": (dict(group=None, act=token(4, False)), ("packed",)),
}


def several_grids():
    """4 bits, 8 before the residual stream, and a dense linear."""

    def grid(path, index):
        if path == "attn.o" and index == 0:
            return None
        return dict(bits=8 if path == "ffn.down" else 4, group=16)

    return with_grids("llama", grid)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_our_logits_in_transformers(family, tmp_path):
    model, tokens = packed_model(family), tiny.tokens(KEY)
    out, notes = write(model, tmp_path, family)
    wanted = ours(model, tokens)
    assert_close(wanted, logits(packed := load(out), tokens))
    assert_close(wanted, logits(load(out, dequantize=True), tokens))
    assert notes == []
    config = json.loads((out / "config.json").read_text())
    linears = [n for n, m in packed.named_modules() if isinstance(m, torch.nn.Linear)]
    theirs = {n for n in linears if hasattr(packed.get_submodule(n), "quantization_scheme")}
    matched = match_modules(config["quantization_config"], linears)
    assert (
        {name for name, group in matched.items() if group} == theirs == set(linears) - {"lm_head"}
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_has_our_logits_in_transformers(name, tmp_path):
    fields, ways = SCHEMES[name]
    model, tokens = packed_model(**fields), tiny.tokens(KEY)
    out, _ = write(model, tmp_path)
    close = assert_close_but_for_flips if "act" in fields else assert_close
    for way in ways:
        close(ours(model, tokens), logits(load(out, way == "dequantized"), tokens))


def test_several_grids_have_our_logits_in_transformers(tmp_path):
    model, tokens = several_grids(), tiny.tokens(KEY)
    out, notes = write(model, tmp_path)
    assert_close(ours(model, tokens), logits(load(out), tokens))
    wrong = logits(load(out, dequantize=True), tokens)  # as the note says of transformers 5.24
    assert np.abs(ours(model, tokens) - wrong).max() > 0.1 * np.ptp(wrong)
    assert "Several grids" in notes[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_inputs_have_our_logits_but_for_the_scale_of_a_range(bits, tmp_path, monkeypatch):
    """The format leaves it open: the library divides by (2^b − 1)/2, which a note says."""
    from compressed_tensors.quantization.utils import helpers

    model, tokens = packed_model(bits=bits, group=None, act=token(bits)), tiny.tokens(KEY)
    out, notes = write(model, tmp_path)
    theirs, half, qmax = helpers.calculate_qparams, (2**bits - 1) / 2, 2 ** (bits - 1) - 1

    def with_our_scale(*args, **options):
        scale, zero_point = theirs(*args, **options)
        return scale * half / qmax, zero_point

    far = logits(load(out), tokens)
    monkeypatch.setattr(helpers, "calculate_qparams", with_our_scale)
    assert_close_but_for_flips(ours(model, tokens), near := logits(load(out), tokens))
    changed = np.abs(far - near).max(axis=-1)
    assert np.mean(changed <= TOLERANCE * np.ptp(near)) < 0.1
    assert f"divides the largest magnitude by {half}, this library by {qmax}" in notes[0]


def static(scale, zero_point=None):
    spec = QuantSpec(bits=8, granularity="tensor", symmetric=zero_point is None)
    z = None if zero_point is None else jnp.int8(zero_point)
    return Site(ActQuantizer(spec, jnp.float32(scale), z))


@pytest.mark.parametrize("zero_point", [None, -3])
def test_static_grids_of_inputs_are_written(zero_point, tmp_path):
    model, tokens = packed_model(bits=8, group=None), tiny.tokens(KEY)
    grids = {"attn_in": 0.02, "attn_out": 0.01, "ffn_in": 0.03, "ffn_mid": 0.02}
    sites = {name: static(scale, zero_point) for name, scale in grids.items()}
    model = model.replace(blocks=tuple(b.replace(sites=sites) for b in model.blocks))
    out, _ = write(model, tmp_path)
    file = TensorFile(out / "model.safetensors")
    assert file.read("model.layers.1.mlp.down_proj.input_scale") == np.float32(0.02)
    assert_close_but_for_flips(ours(model, tokens), logits(load(out), tokens))


@pytest.mark.parametrize("zero_point", [None, 5])
def test_static_grids_of_keys_and_values_are_written(zero_point, tmp_path):
    """The cache of transformers is given the grid: its versions differ in finding attention."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    tokens = tiny.tokens(KEY)
    sites = [
        {"k_cache": static(0.03 + i / 100, zero_point), "v_cache": static(0.02, zero_point)}
        for i in range(2)
    ]
    model = packed_model()
    model = model.replace(
        blocks=tuple(b.replace(sites=s) for b, s in zip(model.blocks, sites, strict=True))
    )
    out, notes = write(model, tmp_path)
    file = TensorFile(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    args = QuantizationConfig.model_validate(config).kv_cache_scheme

    class GridCache(transformers.DynamicCache):
        def update(self, keys, values, layer, *rest, **options):
            def on_grid(x, kind):
                at = f"model.layers.{layer}.self_attn.{kind}"
                scale = torch.tensor(file.read(f"{at}_scale"))
                zero = f"{at}_zero_point"
                zero = torch.tensor(file.read(zero)) if zero in file.specs else None
                return fake_quantize(x, scale, zero, args)

            return super().update(on_grid(keys, "k"), on_grid(values, "v"), layer, *rest, **options)

    theirs = logits(load(out), tokens, past_key_values=GridCache())
    assert_close_but_for_flips(ours(model, tokens), theirs)
    without = np.abs(theirs - logits(load(out), tokens)).max(axis=-1)
    assert np.mean(without <= TOLERANCE * np.ptp(theirs)) < 0.1  # the grid is felt
    assert any("k_scale" in note for note in notes)


def test_a_rotation_at_run_time_is_written_and_is_the_librarys(tmp_path):
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    def rotated(block):
        block = append_transform(block, "ffn_mid", Hadamard(48))
        return rotate_keys(block, Hadamard(8))  # which cancels in the scores and is left out

    model, tokens = packed_model(act=token(4, False)), tiny.tokens(KEY)
    head = Linear(random_model().embed.weight.T[:, ::-1])
    model = model.replace(blocks=tuple(map(rotated, model.blocks)), lm_head=head)
    out, notes = write(model, tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False  # a rotated head is one of its own
    groups = config["quantization_config"]["transform_config"]
    theirs = load(out)
    apply_transform_config(theirs, TransformConfig.model_validate(groups))
    name = "model.layers.0.mlp.down_proj.hadamard_48_input.weight"  # of all, as it is shared
    matrix = TensorFile(out / "model.safetensors").read(name).astype(np.float32)
    hooked = [p for n, p in theirs.named_parameters() if n.endswith("hadamard_48_input.weight")]
    assert len(hooked) >= 1
    for parameter in hooked:
        parameter.data.copy_(torch.tensor(matrix))
    assert_close_but_for_flips(ours(model, tokens), logits(theirs, tokens))
    assert any("transformers does not and is wrong" in note for note in notes)


def test_scales_and_dense_tensors_take_the_dtype_that_is_asked_for(tmp_path):
    out, _ = write(packed_model(), tmp_path, dtype="bfloat16")
    specs = TensorFile(out / "model.safetensors").specs
    at = "model.layers.0.mlp.up_proj"
    assert specs[f"{at}.weight_scale"].dtype == specs["model.norm.weight"].dtype == "bfloat16"
    assert specs[f"{at}.weight_packed"].dtype == np.int32 and len(specs[f"{at}.weight_shape"]) == 2
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


# The config and what readers make of it.


def planned(model):
    schemes = plan(model, stock(model, tiny.hf_config("llama")).template).schemes
    return schemes, quantization_config(schemes)


def test_the_config_says_all_that_readers_stumble_over():
    schemes, config = planned(several_grids())
    check_matches(config, schemes)
    assert config["quantization_status"] == "compressed" and config["version"]
    assert config["ignore"] == ["lm_head", "model.layers.0.self_attn.o_proj"]
    assert {group["format"] for group in config["config_groups"].values()} == {config["format"]}
    assert config["config_groups"]["group_1"]["targets"] == [
        r"re:^model\.layers\.(0|1)\.mlp\.down_proj$"
    ]
    mixed = {"a": scheme(8, act=token(8)), "b": scheme(4)}
    assert quantization_config(mixed)["format"] == "mixed-precision"


def scheme(bits, act=None):
    return ModuleScheme(bits, None, True, act)


def drop_head(config):
    config["ignore"].remove("lm_head")


def ignore_packed(config):
    config["ignore"].append("model.layers.1.mlp.up_proj")


def ignore_by_expression(config):
    config["ignore"].append("re:.*gate")


def target_too_little(config):
    config["config_groups"]["group_0"]["targets"] = [r"re:model\.layers\.0\."]


def other_bits(config):
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 8


def no_format(config):
    del config["config_groups"]["group_0"]["format"]


def earlier_target(config):
    group = copy.deepcopy(config["config_groups"]["group_0"])
    group["weights"]["num_bits"], group["targets"] = 3, ["re:.*down_proj"]
    config["config_groups"]["late"] = group  # a name wins over the class, wherever it stands


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_head, "module 'lm_head' is dense and .* make it quantized"),
        (ignore_packed, "'model.layers.1.mlp.up_proj' is quantized .* make it dense"),
        (ignore_by_expression, "'model.layers.0.mlp.gate_proj' is quantized .* make it dense"),
        (target_too_little, "'model.layers.1.self_attn.q_proj' is quantized .* make it dense"),
        (
            other_bits,
            "'model.layers.0.self_attn.q_proj' is quantized .*4 bits.* puts it in group_0",
        ),
        (no_format, "'model.layers.0.self_attn.q_proj' .* None"),
        (earlier_target, "'model.layers.0.mlp.down_proj' .* puts it in late"),
    ],
)
def test_a_config_that_readers_would_take_wrongly_is_found(change, message):
    schemes, config = planned(packed_model())
    check_matches(config, schemes)
    change(config)
    with pytest.raises(ValueError, match=message):
        check_matches(config, schemes)


def test_expressions_match_their_modules_and_no_others():
    names = [f"model.layers.{i}.mlp.up_proj" for i in (1, 10)] + ["lm_head"]
    targets = patterns(names)
    config = {"config_groups": {"g": {"targets": targets}}, "ignore": []}
    others = ["model.layers.0.mlp.up_proj", "model.layers.11.mlp.up_proj", "lm_head_norm"]
    others += ["model.layers.1.mlp.up_proj_norm", "model.layers.101.mlp.up_proj"]
    found = match_modules(config, names + others)
    assert [name for name, group in found.items() if group] == names and len(targets) == 2


# Refusals.


def with_sites(**sites):
    return lambda block: block.replace(sites=block.sites | sites)


KV4 = QuantSpec(bits=4, granularity="head", symmetric=False, dynamic=True)
CHANNEL = QuantSpec(bits=8, granularity="channel")
KRON = Kron(jnp.eye(4), jnp.eye(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_sites(attn_in=Site(ActQuantizer(token(8), clip=jnp.ones(2)))),
            "block 1: the range at attn_in is clipped by factors",
        ),
        (
            with_sites(ffn_in=Site(ActQuantizer(QuantSpec(8, granularity="tensor", dynamic=True)))),
            "block 1: ffn_in is on the grid int8 per-tensor sym, dynamic",
        ),
        (
            with_sites(attn_in=Site(ActQuantizer(token(8))), q_in=Site(ActQuantizer(token(8)))),
            "block 1: attn.q reads what attn_in and then q_in quantize",
        ),
        (with_sites(k_in=Site(ActQuantizer(token(8)))), "the linears behind attn_in differ"),
        (
            with_sites(k_cache=Site(ActQuantizer(KV4)), v_cache=Site(ActQuantizer(KV4))),
            "block 1: the cache is on the grid int4 per-head asym, dynamic; the format has static",
        ),
        (
            with_sites(k_cache=Site(ActQuantizer(CHANNEL)), v_cache=Site(ActQuantizer(CHANNEL))),
            "block 1: the cache is on the grid int8 per-channel sym, static",
        ),
        (with_sites(k_cache=static(0.1)), r"keys and values are on different grids \(k_cache int8"),
        (with_sites(query=static(0.1)), "block 1: query is quantized"),
        (with_sites(k_cache=static(0.1), v_cache=static(0.1)), "the caches of the blocks are on"),
        (
            with_sites(k_cache=static(0.1).replace(transforms=(Hadamard(8),)), v_cache=static(0.1)),
            "block 1: keys are transformed before they are quantized",
        ),
        (lambda b: append_transform(b, "v_cache", Hadamard(8)), "v_cache has a transform"),
        (lambda b: append_transform(b, "ffn_in", KRON), "ffn_in is multiplied by Kron at run time"),
        (
            lambda b: append_transform(
                append_transform(b, "ffn_in", Diag(jnp.ones(32))), "ffn_in", Hadamard(32)
            ),
            "multiplied by Diag and Hadamard at run time",
        ),
        (
            lambda b: append_transform(b, "attn_out", Hadamard(4, inner=8)),
            r"attn_out mixes heads \(inner=8\).*head_mix='none'",
        ),
        (lambda b: append_transform(b, "up_in", Hadamard(32)), "up_in has a transform of its own"),
        (
            lambda b: b.replace(attn=b.attn.replace(k=random_model().blocks[1].attn.k)),
            r"behind attn_in differ \(attn.q 4 bits.*attn.k dense.*give them one grid",
        ),
        (
            lambda b: b.replace(ffn=b.ffn.replace(down=random_model().blocks[1].ffn.down)).replace(
                sites={"ffn_mid": Site(ActQuantizer(token(8)))}
            ),
            "ffn.down reads a quantized activation and its weight is dense",
        ),
    ],
)
def test_what_the_format_has_no_word_for_is_refused_with_its_place(change, message):
    model = packed_model()
    model = model.replace(blocks=(model.blocks[0], change(model.blocks[1])))
    with pytest.raises(ValueError, match=message):
        compressed_tensors.check(model, tiny.hf_config("llama"))


def test_a_model_without_quantized_weights_is_refused():
    with pytest.raises(ValueError, match="no weight is quantized, so there is nothing to pack"):
        compressed_tensors.check(random_model(), tiny.hf_config("llama"))


def test_parts_of_one_stored_tensor_are_on_one_grid():
    model = packed_model("phi3")
    block = model.blocks[1]
    other = packed_model("phi3", bits=8).blocks[1].attn.v
    block = block.replace(attn=block.attn.replace(v=other))
    with pytest.raises(
        ValueError, match=r"block 1: attn\.q\.w, attn\.k\.w, attn\.v\.w are stored as"
    ):
        compressed_tensors.check(
            model.replace(blocks=(model.blocks[0], block)), tiny.hf_config("phi3")
        )
