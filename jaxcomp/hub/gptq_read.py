"""Reading GPTQ checkpoints: `qweight`, `qzeros`, `scales` and `g_idx` of AutoGPTQ and GPTQModel.

    NAME.qweight  int32 [in·b/32, out]   unsigned codes, a bit stream along `in`
    NAME.qzeros   int32 [G, out·b/32]    unsigned zero points, a bit stream along `out`
    NAME.scales   float [G, out]
    NAME.g_idx    int32 [in]             the group of every input channel

w = (code − zero)·scale. Version 1 stores zero − 1, "gptq_v2" the zero itself. Both are unsigned and
ours are signed, so 2^(b−1) is taken off both, which flips the top bit of a code.

Source: AutoGPTQ 0.7 and GPTQModel; the layout of 3 bits is theirs too, one stream over three words.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxcomp.core.quantize import QuantSpec
from jaxcomp.hub.bits import stream_bytes, top_bits, unpack_bits
from jaxcomp.hub.leaves import TensorSource, Wanted, aligned, rows_a_time, whole
from jaxcomp.hub.packed import DENSE, Form, Packed, PackedLinear
from jaxcomp.hub.packed_model import check_modules, module_shapes
from jaxcomp.models.decoder import Decoder
from jaxcomp.models.families.fields import Fields
from jaxcomp.models.families.template import stored_tensors

WHERE = "config.json: quantization_config"
BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}  # checkpoint_format → what `qzeros` holds
WORD = 32
# How a checkpoint was made, and with which kernel its makers ran it.
HARMLESS = frozenset(
    """
    quant_method damp_percent damp_auto_increment static_groups true_sequential model_name_or_path
    model_file_base_name dataset tokenizer batch_size pad_token_id cache_block_outputs
    block_name_to_quantize module_name_preceding_first_block max_input_length model_seqlen
    use_cuda_fp16 use_exllama disable_exllama exllama_config backend meta act_group_aware mse
    desc_act
    """.split()
)


def packed_part(
    config: Mapping[str, Any], template: Decoder, source: TensorSource, allow: tuple[str, ...] = ()
) -> Packed:
    """What a `quantization_config` makes of the model; see `ct_read.packed_part`.

    Raises:
      ValueError: a field that is wrong, missing or unknown; a scheme or an order of channels that
        no QTensor holds; or config and files do not agree.
    """
    fields = Fields(config, WHERE)
    spec, version = _spec(fields), _version(fields)
    shapes = module_shapes(template)
    quantized = _quantized(fields, shapes)
    fields.finish(HARMLESS, allow)
    check_modules(quantized, source, "lm_head and modules_in_block_to_quantize")
    form = Form(_tensors, _check_order, _codes, functools.partial(_grid, version=version))
    linears = {
        name: PackedLinear(name, shape[1], shape[0], spec, form)
        for name, shape in shapes.items()
        if quantized[name]
    }
    return Packed(linears, unused=_zero_biases(linears, template, source))


def group_spec(fields: Fields, bits: int, symmetric: bool) -> QuantSpec:
    """The grid of weights in groups of `group_size`, where −1 is a whole channel."""
    size = fields.get("group_size")
    if type(size) is not int or (size < 1 and size != -1):
        raise ValueError(
            f"{fields.where}: group_size={size!r} must be a number above 0, or -1 for a channel"
        )
    return QuantSpec(bits, group_size=None if size == -1 else size, symmetric=symmetric)


def _spec(fields: Fields) -> QuantSpec:
    bits = fields.integer("bits")
    words = fields.get("pack_dtype", "int32")
    if bits not in BITS or words != "int32":
        raise ValueError(
            f"{fields.where}: bits={bits}, pack_dtype={words!r} is not read; there is "
            f"{', '.join(map(str, BITS))} bits in int32: {DENSE}"
        )
    return group_spec(fields, bits, fields.flag("sym", True))


def _version(fields: Fields) -> int:
    """Of the format, 1 or 2."""
    format = str(fields.get("checkpoint_format", fields.get("format", "gptq"))).lower()
    if format not in VERSIONS or fields.flag("is_marlin_format"):
        raise ValueError(
            f"{fields.where}: checkpoint_format={format!r} (or is_marlin_format) is laid out for "
            f"one kernel and not read; there is {' and '.join(VERSIONS)}: {DENSE}"
        )
    return VERSIONS[format]


def _quantized(fields: Fields, modules: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each module is quantized: all in the blocks, or those chosen; the head if it says."""
    if rules := fields.get("dynamic", None):
        raise ValueError(
            f"{fields.where}: dynamic={str(rules)[:80]} gives modules grids of their own, which is "
            f"not read; {DENSE}"
        )
    chosen, head = fields.get("modules_in_block_to_quantize", None), fields.flag("lm_head")
    names = None if chosen is None else _flat(chosen)

    def here(name: str) -> bool:
        return names is None or any(name.endswith(f".{part}") for part in names)

    return {name: head if name == "lm_head" else here(name) for name in modules}


def _flat(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else [part for x in names for part in _flat(x)]


def _tensors(linear: PackedLinear, source: TensorSource) -> dict[str, Wanted]:
    at, bits = linear.name, linear.spec.bits
    for name, n in (("in_ch", linear.in_ch), ("out_ch", linear.out_ch)):
        if n * bits % WORD:
            raise ValueError(
                f"module {at!r}: {name}={n} codes of {bits} bits do not fill whole words of "
                f"{WORD} bits, as the format has it; {DENSE}"
            )
    tensors = {
        f"{at}.qweight": Wanted((linear.in_ch * bits // WORD, linear.out_ch), ("int32",)),
        f"{at}.qzeros": Wanted((linear.groups, linear.out_ch * bits // WORD), ("int32",)),
        f"{at}.scales": Wanted((linear.groups, linear.out_ch)),
    }
    order = f"{at}.g_idx"  # not every writer has it
    return tensors | ({order: Wanted((linear.in_ch,), ("int32",))} if order in source.specs else {})


def _check_order(linear: PackedLinear, source: TensorSource) -> None:
    """Refuses groups that are not runs of neighbouring input channels."""
    name = f"{linear.name}.g_idx"
    if name not in source.specs:
        return
    found = whole(source, name)
    wanted = np.arange(linear.in_ch) // (linear.in_ch // linear.groups)
    if not np.array_equal(found, wanted):
        at = int(np.argmax(found != wanted))
        raise ValueError(
            f"{source.where}: {name!r} puts input channel {at} into group {found[at]} and not "
            f"{wanted[at]}: the groups were formed in the order of activations (desc_act), and a "
            "QTensor has groups of neighbouring channels. Quantize again with desc_act=False or "
            f"static_groups=True, or {DENSE}"
        )


def _codes(linear: PackedLinear, source: TensorSource, rows: tuple[int, int]) -> np.ndarray:
    """`packed` of a QTensor: the words are the same stream, as four rows of bytes each."""
    (start, stop), name, bits = rows, f"{linear.name}.qweight", linear.spec.bits
    n_bytes = stream_bytes(linear.in_ch, bits)
    out = aligned((n_bytes, stop - start), np.dtype(np.uint8))
    step = rows_a_time(source.specs[name].shape)
    for first in range(0, n_bytes // 4, step):
        words = np.ascontiguousarray(source.rows(name, first, first + step)[:, start:stop], "<i4")
        each = words.view(np.uint8).reshape(*words.shape, 4).transpose(0, 2, 1)
        out[4 * first : 4 * (first + len(words))] = each.reshape(-1, stop - start)
    out ^= top_bits(n_bytes, bits, linear.in_ch)[:, None]
    return out


def _grid(
    linear: PackedLinear, source: TensorSource, version: int
) -> tuple[np.ndarray, np.ndarray | None]:
    bits, name = linear.spec.bits, f"{linear.name}.qzeros"
    words = np.ascontiguousarray(whole(source, name), "<i4")
    stored = unpack_bits(words.view(np.uint8), bits, linear.out_ch)
    if version == 1 and (stored == 2**bits - 1).any():
        raise ValueError(
            f"{source.where}: {name!r} holds {2**bits - 1}, which version 1 of the format makes of "
            "the zero point 0 and which its writers let spill into its neighbours, so nobody can "
            f"tell what was meant; save it with GPTQModel as gptq_v2, or {DENSE}"
        )
    zero = (stored.astype(np.int16) + (version == 1) - 2 ** (bits - 1)).astype(np.int8)
    scale = np.ascontiguousarray(whole(source, f"{linear.name}.scales"), np.float32)
    if not linear.spec.symmetric:
        return scale, zero
    if zero.any():
        raise ValueError(
            f"{source.where}: {name!r} has zero points other than {2 ** (bits - 1)} and the config "
            "says sym; one of them is wrong, or checkpoint_format is: correct the config"
        )
    return scale, None


def _zero_biases(
    linears: Mapping[str, PackedLinear], template: Decoder, source: TensorSource
) -> tuple[str, ...]:
    """Biases that the model does not have and that are 0: older writers gave one to all modules."""
    known = stored_tensors(template)
    found = [f"{name}.bias" for name in linears if f"{name}.bias" in source.specs]
    return tuple(b for b in found if b not in known and not whole(source, b).any())
