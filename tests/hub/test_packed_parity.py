"""Packed directories that the libraries wrote, or read: the same scheme, weights and logits."""

import numpy as np
import pytest

from jaxcomp.core.quantize import QTensor, dequantize
from jaxcomp.core.tree import get_at
from jaxcomp.hub import open_checkpoint
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import forward
from tests import packed, tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
library = pytest.importorskip("compressed_tensors")

KEY = packed.KEY
TOLERANCE = 1e-5  # of the range of the logits
TOKEN8 = dict(num_bits=8, strategy="token", dynamic=True)
STATIC8 = dict(num_bits=8, strategy="tensor", symmetric=False)
INPUT_RANGES = {"q": (-2.0, 1.5), "k": (-2.0, 1.5), "v": (-2.0, 1.5)}  # of the others (-3, 4)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny.checkpoint("llama", KEY, tmp_path_factory.mktemp("dense"))


def library_directory(dense, place, groups, ignore=("lm_head",)):
    """A tiny transformers model that the library quantized, compressed and saved.

    Returns:
      the directory, and the scheme that the library gave each module.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )

    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    config = QuantizationConfig(config_groups=groups, ignore=list(ignore))
    apply_quantization_config(model, config, show_progress=False)
    schemes = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            schemes[name] = getattr(module, "quantization_scheme", None)
            if schemes[name] is not None:
                calibrate(name, module)
                module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(place)
    compressor.update_config(str(place))
    tiny.tokenizer().save_pretrained(place)
    return place, schemes


def calibrate(name, module):
    """Fills in the library's own scales for plain ranges."""
    from compressed_tensors.quantization.utils import calculate_qparams

    weights, inputs = (
        module.quantization_scheme.weights,
        module.quantization_scheme.input_activations,
    )
    w = module.weight.data
    if weights.strategy == "tensor":
        grouped = w.reshape(1, -1)
    else:
        grouped = w.reshape(len(w), -1, weights.group_size or w.shape[1])
    grid = calculate_qparams(grouped.amin(-1), grouped.amax(-1), weights)
    module.weight_scale.data, module.weight_zero_point.data = grid
    if inputs is not None and not inputs.dynamic:
        low, high = INPUT_RANGES.get(name[-6], (-3.0, 4.0))
        grid = calculate_qparams(torch.tensor([low]), torch.tensor([high]), inputs)
        module.input_scale.data, module.input_zero_point.data = grid


def group(bits, inputs=None, targets=("Linear",), **weights):
    weights = (
        dict(num_bits=bits, strategy="group" if "group_size" in weights else "channel") | weights
    )
    return dict(targets=list(targets), weights=weights, input_activations=inputs)


def reference(place, tokens, dequantize=False):
    how = {}
    if dequantize:
        how["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(place, dtype=torch.float32, **how).eval()
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens, np.int64))).logits.numpy()


def assert_close(ours, theirs, tolerance=TOLERANCE):
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.ptp(theirs)


def libraries_weight(place, module, scheme):
    """The weight of a module as the library's decompressor gives it, `[out, in]`."""
    from compressed_tensors.compressors import BaseCompressor

    tensors = packed.tensors_of(place)
    state = {
        name.removeprefix(f"{module}."): torch.from_numpy(x)
        for name, x in tensors.items()
        if name.startswith(f"{module}.")
    }
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return compressor.decompress(state, scheme)["weight"].numpy()


def module_of(index, path):
    unit, part = path.split(".")
    return f"model.layers.{index}.{dict(attn='self_attn', ffn='mlp')[unit]}.{part}_proj"


def test_many_groups_are_given_out_as_the_library_does_and_hold_its_weights(dense, tmp_path):
    groups = {
        "a": group(4, group_size=16),
        "b": group(3, targets=["re:.*down_proj", "re:model.layers.1.mlp.*"], symmetric=False),
        "c": group(8, targets=["model.layers.1.mlp.up_proj", "re:.*q_proj$"], inputs=TOKEN8),
        "d": group(2, targets=["re:.*k_proj"], strategy="tensor"),
        "e": group(5, targets=["re:.*layers.0.*v_proj"], strategy="tensor", symmetric=False),
        "f": group(4, targets=["re:.*layers.1.*v_proj"], inputs=TOKEN8, symmetric=False),
        "g": group(6, targets=["re:.*layers.0.*o_proj"], group_size=8, symmetric=False),
    }
    ignore = ["lm_head", "model.layers.1.self_attn.o_proj", "re:.*layers.0.mlp.gate"]
    place, schemes = library_directory(dense, tmp_path, groups, ignore)
    assert sum(scheme is None for scheme in schemes.values()) == 3
    kinds = set()
    for i, handle in enumerate(open_checkpoint(place).model.blocks):
        block = handle.load()
        for path in anatomy(block).linears:
            module, w = module_of(i, path), get_at(block, path).w
            scheme = schemes[module]
            assert isinstance(w, QTensor) == (scheme is not None), module
            if scheme is None:
                continue
            kinds.add((scheme.format, scheme.weights.strategy, scheme.weights.symmetric))
            assert w.bits == scheme.weights.num_bits
            assert (w.zero_point is None) == scheme.weights.symmetric
            wanted = libraries_weight(place, module, scheme)
            np.testing.assert_array_equal(dequantize(w).T, wanted, err_msg=module)
    assert len(kinds) >= 6


@pytest.mark.parametrize(
    ("groups", "dequantized"),
    [
        ({"a": group(4, group_size=16)}, False),
        ({"a": group(3, symmetric=False)}, True),
        ({"a": group(8, STATIC8)}, False),
        ({"a": group(4, targets=["re:.*mlp.*"]), "b": group(8, STATIC8, ["re:.*attn.*"])}, False),
    ],
)
def test_logits_are_those_of_transformers_on_the_same_directory(
    groups, dequantized, dense, tmp_path
):
    place, _ = library_directory(dense, tmp_path, groups)
    tokens = tiny.tokens(KEY)
    ours = forward(open_checkpoint(place).model, tokens)
    assert_close(ours, reference(place, tokens, dequantized))


@pytest.mark.parametrize("bits", [8, 4])
def test_dynamic_inputs_are_rounded_token_by_token(bits, dense, tmp_path):
    inputs = dict(num_bits=bits, strategy="token", dynamic=True)
    place, _ = library_directory(dense, tmp_path, {"a": group(bits, inputs)})
    limit = 2 ** (bits - 1) - 1

    def rounded(module, args):
        scale = args[0].abs().amax(-1, keepdim=True) / limit
        return (torch.round(args[0] / scale) * scale,)

    how = dict(quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(place, dtype=torch.float32, **how).eval()
    for name, module in model.named_modules():
        if name.endswith("proj"):
            module.register_forward_pre_hook(rounded)
    tokens = tiny.tokens(KEY)
    with torch.no_grad():
        theirs = model(torch.tensor(np.asarray(tokens, np.int64))).logits.numpy()
    assert_close(forward(open_checkpoint(place).model, tokens), theirs)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_logits_are_those_of_transformers_on_the_dequantized_weights(method, tmp_path):
    found = {
        name: packed.quantized(w, 4, 16, symmetric=False, zero_from=1, seed=seed)
        for seed, (name, w) in enumerate(packed.modules("qwen2").items())
    }
    write = dict(gptq=packed.gptq_tensors, awq=packed.awq_tensors)[method]
    config = dict(quant_method=method, bits=4, group_size=16)
    config |= dict(sym=False, desc_act=False) if method == "gptq" else dict(version="gemm")
    tensors = {name: write(name, q) for name, q in found.items()}
    place = packed.directory(tmp_path / "packed", tensors, config, "qwen2")
    weights = {name: {f"{name}.weight": q.dense} for name, q in found.items()}
    plain = packed.directory(tmp_path / "plain", weights, None, "qwen2")
    tokens = tiny.tokens(KEY)
    ours = forward(open_checkpoint(place).model, tokens)
    assert_close(ours, reference(plain, tokens))
