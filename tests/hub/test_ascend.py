"""Files of the Ascend layout, computed from as the layout says, give what the model gives.

`Runtime` knows the layout's description and nothing of this library.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from jaxcomp.core.quantize import QTensor, QuantSpec
from jaxcomp.core.site import ActQuantizer, Site
from jaxcomp.core.transforms import Hadamard, Kron, transform
from jaxcomp.hub import ascend, open_checkpoint
from jaxcomp.hub.ascend_factors import find_factors, runtime_pair
from jaxcomp.hub.write import ExportSource
from jaxcomp.methods import RTN
from jaxcomp.models import fold
from jaxcomp.models.decoder import forward, map_blocks

KEY = jax.random.key(0)
FIELDS = dict(intermediate_size=64)
A8, A4 = (QuantSpec(bits, granularity="token", dynamic=True) for bits in (8, 4))
W8, W4 = QuantSpec(8), QuantSpec(4)
KV8 = QuantSpec(8, granularity="head", symmetric=False, dynamic=True)


def source(tmp_path, family, *steps, **overrides):
    """A tiny checkpoint with functions of a model applied to it."""
    path = tiny.checkpoint(family, KEY, tmp_path / "hf", **FIELDS | overrides)
    checkpoint = open_checkpoint(path)
    model = checkpoint.model
    for step in steps:
        model = step(model)
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    return ExportSource(model, checkpoint.hf_config, tmp_path / "tokenizer", {})


def rounding(weight=None, act=None, **settings):
    return lambda model: RTN(weight, act=act, **settings)(model).model


def matrix(order, seed):
    """Far from orthogonal and well conditioned."""
    return np.eye(order) + 0.2 * np.random.default_rng(seed).standard_normal((order, order))


def flattened(model, head_mix=True, factors=None):
    """Random Kronecker transforms where FlatQuant puts them."""

    def visit(i, block):
        for j, (site, n) in enumerate((("attn_in", 32), ("ffn_in", 32), ("ffn_mid", 64))):
            left, right = factors or runtime_pair(n)
            block = fold.insert_online(block, site, kron(left, right, seed=10 * i + j))
        heads = block.attn.n_heads
        return fold.insert_online(block, "attn_out", kron(heads, None, 9)) if head_mix else block

    return map_blocks(model, visit)


def kron(left, right, seed=0):
    sides = (
        None if n is None else jnp.asarray(matrix(n, seed), jnp.float32) for n in (left, right)
    )
    return Kron(*sides)


def clipped(low, high):
    """Clip factors at every quantizer of an activation."""

    def visit(i, block):
        clip = jnp.array([low, high], jnp.float32)
        new = lambda s: s.replace(quantizer=s.quantizer.replace(clip=clip))  # noqa: E731
        return block.replace(
            sites={k: new(s) if s.quantizer else s for k, s in block.sites.items()}
        )

    return lambda model: map_blocks(model, visit)


class Runtime:
    """What the description of the layout says a linear computes, in numpy."""

    def __init__(self, path):
        self.types = json.loads((path / "quant_model_description.json").read_text())
        self.tensors = {}
        for file in path.glob("quant_model_weights*.safetensors"):
            self.tensors |= load_file(file)

    def linear(self, module, x):
        kind = self.types[f"{module}.weight"]
        w, bias = self.tensors[f"{module}.weight"], self.tensors.get(f"{module}.bias", 0.0)
        if kind == "FLOAT":
            return x @ w.T + bias
        assert w.dtype == np.int8
        scale, offset = (self.tensors[f"{module}.weight_{n}"] for n in ("scale", "offset"))
        assert scale.shape == offset.shape == (len(w), 1) and not offset.any()
        if kind == "W8A16":
            return x @ ((w.astype(np.float32) - offset) * scale).T + bias
        top, codes = {"W8A8_DYNAMIC": (127, 8), "W4A4_FLATQUANT_DYNAMIC": (7, 4)}[kind]
        ratio = 1.0
        if kind == "W4A4_FLATQUANT_DYNAMIC":
            assert np.abs(w).max() <= 8
            left, right = (self.tensors[f"{module}.{side}_trans"] for side in ("left", "right"))
            tokens = x.reshape(-1, len(left), len(right))
            x = (left.T @ (tokens @ right)).reshape(x.shape)
            ratio = self.tensors[f"{module}.clip_ratio"].item()
        step = np.abs(x).max(-1, keepdims=True) * np.float32(ratio) / top
        q = np.clip(np.round(x / step), -(2 ** (codes - 1)), top).astype(np.int32)
        return (q @ w.T.astype(np.int32)) * step * scale.T + bias


def run(path, tokens):
    """Logits of transformers' class with every linear computed by `Runtime`."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    runtime = Runtime(path)
    config = transformers.AutoConfig.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    class Layout(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return torch.from_numpy(runtime.linear(self.module, x.numpy()).astype(np.float32))

    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    for name in linears:
        if name != "lm_head":
            model.set_submodule(name, Layout(name))
    dense = {n: torch.from_numpy(x) for n, x in runtime.tensors.items() if n in model.state_dict()}
    missing = model.load_state_dict(dense, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"} and bool(missing) == config.tie_word_embeddings
    model.tie_weights()
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.numpy()


CASES = {
    "W8A16": (rounding(W8),),
    "W8A8_DYNAMIC": (rounding(W8, A8),),
    "W4A4_FLATQUANT_DYNAMIC": (flattened, rounding(W4, A4), clipped(0.9, 0.9)),
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", CASES)
def test_the_layout_computes_what_the_model_computes(family, kind, tmp_path):
    opened = source(tmp_path, family, *CASES[kind])
    ascend.check(opened.model, opened.hf_config)
    notes = ascend.write(opened, tmp_path)
    types = json.loads((tmp_path / "quant_model_description.json").read_text())
    assert types["model_quant_type"] == kind and types["version"] == "1.0.0"
    assert types["model.layers.1.mlp.down_proj.weight_scale"] == kind
    assert types["lm_head.weight"] == types["model.norm.weight"] == "FLOAT"
    assert f"14 {kind}" in notes[0]
    tokens = tiny.tokens(jax.random.key(1))
    wanted, found = np.asarray(forward(opened.model, tokens)), run(tmp_path, tokens)
    error = np.abs(found - wanted) / np.ptp(wanted)
    # A code on the border of two falls to either side, and then to the tokens behind it.
    limit = 1e-5 if kind == "W8A16" else 2e-2
    assert error.max() < limit and np.median(error) < 1e-5


def test_every_tensor_is_described_and_parts_have_an_index(tmp_path):
    opened = source(tmp_path, "llama", flattened, rounding(W4, A4))
    ascend.write(opened, tmp_path, shard_size=20_000, dtype="bfloat16")
    index = json.loads((tmp_path / "quant_model_weights.safetensors.index.json").read_text())
    described = json.loads((tmp_path / "quant_model_description.json").read_text())
    assert set(index["weight_map"]) == {k for k in described if "." in k} - {"lm_head.weight"}
    files = set(index["weight_map"].values())
    assert len(files) > 2 and all((tmp_path / file).exists() for file in files)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and "quantization_config" not in config
    assert (tmp_path / "tokenizer.json").exists()
    tensors = {}
    for file in files:
        tensors |= load_file(tmp_path / file)
    at = "model.layers.0.self_attn.q_proj"
    assert tensors[f"{at}.left_trans"].dtype.name == "bfloat16"
    assert tensors[f"{at}.weight_scale"].dtype == tensors[f"{at}.clip_ratio"].dtype == np.float32
    for other in ("k_proj", "v_proj"):  # one matrix to the runtime
        for side in ("left_trans", "right_trans", "clip_ratio"):
            a, b = (tensors[f"model.layers.0.self_attn.{p}.{side}"] for p in ("q_proj", other))
            np.testing.assert_array_equal(a, b)


def test_narrow_codes_before_eight_bits_are_kept_in_eight(tmp_path):
    opened = source(tmp_path, "llama", rounding(W4, A8))
    notes = ascend.write(opened, tmp_path)
    assert any(note.startswith("14 weights of fewer than 8 bits are stored in 8") for note in notes)
    tokens = tiny.tokens(jax.random.key(1))
    wanted, found = np.asarray(forward(opened.model, tokens)), run(tmp_path, tokens)
    assert np.median(np.abs(found - wanted)) < 1e-5 * np.ptp(wanted)


def test_a_site_left_in_floats_takes_its_transform_back(tmp_path):
    from jaxcomp.core.scheme import Override

    keep = (Override(sites=("attn_out",), weight_bits=16, act_bits=16),)
    opened = source(tmp_path, "llama", flattened, rounding(W4, A4, overrides=keep))
    ascend.write(opened, tmp_path)
    runtime = Runtime(tmp_path)
    assert runtime.types["model.layers.0.self_attn.o_proj.weight"] == "FLOAT"
    plain = source(tmp_path, "llama").model.blocks[0].load().attn.o.w.T
    stored = runtime.tensors["model.layers.0.self_attn.o_proj.weight"]
    np.testing.assert_allclose(stored, plain, atol=1e-5)


def test_factors_that_differ_are_refused_or_averaged(tmp_path):
    opened = source(tmp_path, "llama", rounding(W4, A4), clipped(0.8, 0.9))
    with pytest.raises(ValueError, match=r"clipped by 0.8000 and the greatest by 0.9000, and the"):
        ascend.write(opened, tmp_path)
    with pytest.raises(ValueError, match="clip_ratio='max' is unknown; use exact or mean"):
        ascend.write(opened, tmp_path, clip_ratio="max")
    notes = ascend.write(opened, tmp_path, clip_ratio="mean")
    assert any("up to 0.0500 away" in note for note in notes)
    ratio = Runtime(tmp_path).tensors["model.layers.1.mlp.down_proj.clip_ratio"]
    np.testing.assert_allclose(ratio, [0.85], rtol=1e-6)


def with_sites(**sites):
    return lambda model: map_blocks(
        model, lambda i, b: b.replace(sites={**b.sites, **(sites if i == 1 else {})})
    )


REFUSED = [
    ((), "no weight is quantized; the runtime loads the hf directory"),
    ((rounding(W8, A8, kv=KV8),), r"block 0, k_cache is quantized .*\(kv=None\)"),
    ((rounding(QuantSpec(8, symmetric=False)),), "block 0, attn_in: attn.q is asymmetric"),
    ((rounding(QuantSpec(4, group_size=16)),), "attn.q is in groups, and the runtime has one sc"),
    ((flattened, rounding(W4)), "is transformed and not quantized, and only 4-bit inputs have a"),
    ((flattened, rounding(W8, A8)), "the 8-bit input of attn.q has a transform, for which the"),
    ((rounding(W8, A8), clipped(0.9, 0.9)), "the 8-bit input of attn.q has clip factors, for w"),
    ((rounding(W8, A4),), "attn.q has 8 bits and its input 4; the runtime has 4 and 4, or up"),
    ((rounding(None, A8),), "input of attn.q is quantized and its weight is not"),
    (
        (lambda m: flattened(m, factors=None, head_mix=False), rounding(W4, A4)),
        None,  # what has a place passes
    ),
    (
        (with_sites(q_in=Site(ActQuantizer(A4))), rounding(W4)),
        r"attn.q has a quantizer of its own, .*shared_quantizer=True",
    ),
    (
        (
            rounding(W4, A4),
            with_sites(attn_in=Site(ActQuantizer(A4), (kron(2, 16),))),
        ),
        r"block 1, attn_in: its transform \(Kron\) is no left ⊗ right of the orders 4 and 8.*"
        r"FlatQuant\(factors=\(\('attn_in', \(4, 8\)\),\)\)",
    ),
]


@pytest.mark.parametrize(("steps", "message"), REFUSED)
def test_what_the_runtime_has_no_place_for_is_refused(steps, message, tmp_path):
    opened = source(tmp_path, "qwen2", *steps)
    if message is None:
        ascend.check(opened.model, opened.hf_config)
        return
    with pytest.raises(ValueError, match=message):
        ascend.check(opened.model, opened.hf_config)


def test_heads_that_do_not_divide_the_left_factor_are_refused_with_ways_out(tmp_path):
    heads = dict(num_attention_heads=8, num_key_value_heads=2, head_dim=4)
    fields = dict(heads, hidden_size=32)
    opened = source(tmp_path, "llama", flattened, rounding(W4, A4), **fields)
    message = r"the mix of heads fits where their number \(8\) divides 4; leave the site in floats"
    with pytest.raises(ValueError, match=message):
        ascend.check(opened.model, opened.hf_config)


PAIRS = {4096: (64, 64), 14336: (112, 128), 576: (24, 24), 1536: (32, 48), 32: (4, 8), 64: (8, 8)}


@pytest.mark.parametrize("n", PAIRS)
def test_the_runtime_s_pair_of_known_widths(n):
    assert runtime_pair(n) == PAIRS[n]


def test_widths_that_the_kernel_does_not_take_are_refused():
    with pytest.raises(ValueError, match="36 channels are no multiple of 8"):
        runtime_pair(36)
    with pytest.raises(ValueError, match="13696 channels are viewed as 64·214 by the runtime"):
        runtime_pair(13696)


FOUND = [
    (64, (), True),
    (64, (Kron(None, matrix(8, 0).astype(np.float32)),), True),
    (64, (kron(4, None),), True),
    (64, (kron(None, 4), kron(2, None)), True),
    (64, (kron(16, None),), False),
    (64, (kron(None, 32),), False),
    (32, (kron(2, 16),), False),
    (64, (Hadamard(64),), True),
    (192, (Hadamard(12),), False),
    (192, (Hadamard(192),), True),
    (1536, (Hadamard(1536),), False),  # 12·128 does not part at 32·48
    (64, (Hadamard(4, 16),), True),
]


@pytest.mark.parametrize(("n", "transforms", "exists"), FOUND)
def test_factors_are_found_where_there_are_any(n, transforms, exists):
    found = find_factors(transforms, n)
    structs = jax.eval_shape(lambda: transforms)
    assert (find_factors(structs, n) is None) == (found is None)
    assert (found is not None) == exists
    if exists:
        x = jax.random.normal(KEY, (5, n))
        wanted = x
        for t in transforms:
            wanted = transform(t, wanted)
        np.testing.assert_allclose(transform(found, x), wanted, atol=2e-5)


def test_the_factors_of_a_fit_are_written_bit_for_bit(tmp_path):
    opened = source(tmp_path, "llama", flattened, rounding(W4, A4))
    ascend.write(opened, tmp_path)
    block, tensors = opened.model.blocks[1], Runtime(tmp_path).tensors
    fitted = block.sites["ffn_mid"].transforms[0]
    at = "model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(tensors[f"{at}.left_trans"], fitted.left)
    np.testing.assert_array_equal(tensors[f"{at}.right_trans"], fitted.right)
    assert isinstance(block.ffn.down.w, QTensor)
    np.testing.assert_array_equal(tensors[f"{at}.weight"], np.asarray(block.ffn.down.w.codes).T)
