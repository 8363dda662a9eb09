"""Reading AWQ checkpoints of version "gemm": `qweight`, `qzeros` and `scales` of AutoAWQ.

    NAME.qweight  int32 [in, out/8]   unsigned 4-bit codes along `out`, the nibbles of a word being
                                      its columns 0, 2, 4, 6, 1, 3, 5, 7 from the lowest on
    NAME.qzeros   int32 [G, out/8]    unsigned zero points in the same order
    NAME.scales   float [G, out]

w = (code − zero)·scale; 8 is taken off code and zero, which makes both signed.

Source: AutoAWQ 0.2, `WQLinear_GEMM`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from jaxcomp.hub.bits import stream_bytes
from jaxcomp.hub.gptq_read import group_spec
from jaxcomp.hub.leaves import TensorSource, Wanted, aligned, rows_a_time, whole
from jaxcomp.hub.packed import DENSE, Form, Packed, PackedLinear
from jaxcomp.hub.packed_model import check_modules, module_shapes
from jaxcomp.models.decoder import Decoder
from jaxcomp.models.families.fields import Fields

WHERE = "config.json: quantization_config"
BITS, NIBBLES = 4, 8  # of a code; in a word
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each nibble of a word
HARMLESS = frozenset(
    """
    quant_method backend do_fuse fuse_max_seq_len modules_to_fuse exllama_config checkpoint_format
    format pack_dtype sym desc_act lm_head meta dataset tokenizer damp_percent true_sequential
    act_group_aware batch_size cache_block_outputs
    """.split()
)


def packed_part(
    config: Mapping[str, Any], template: Decoder, source: TensorSource, allow: tuple[str, ...] = ()
) -> Packed:
    """What a `quantization_config` makes of the model; see `ct_read.packed_part`.

    Raises:
      ValueError: a field that is wrong, missing or unknown; a layout that is not read; or config
        and files do not agree.
    """
    fields = Fields(config, WHERE)
    bits, version = fields.integer("bits"), str(fields.get("version", "gemm")).lower()
    if bits != BITS or version != "gemm" or not fields.flag("zero_point", True):
        raise ValueError(
            f"{WHERE}: {bits} bits, version {version!r}, zero_point={config.get('zero_point')} is "
            f"not read; there is {BITS} bits, version 'gemm' with zero points: {DENSE}"
        )
    spec = group_spec(fields, bits, symmetric=False)
    shapes, patterns = module_shapes(template), fields.get("modules_to_not_convert", [])
    fields.finish(HARMLESS, allow)
    quantized = {
        name: name != "lm_head" and not _left_out(name, patterns, f"{name}.qweight" in source.specs)
        for name in shapes
    }
    check_modules(quantized, source, "modules_to_not_convert of the quantization_config")
    linears = {
        name: PackedLinear(name, shape[1], shape[0], spec, GEMM)
        for name, shape in shapes.items()
        if quantized[name]
    }
    return Packed(linears)


def _left_out(name: str, patterns: list[str], packed: bool) -> bool:
    """Whether a module is dense; where libraries read a pattern in two ways, the files decide.

    AutoAWQ and vLLM look for it anywhere in the name; transformers takes it for an expression that
    matches whole words from the start, or for the end of the name.
    """
    anywhere = any(pattern in name for pattern in patterns)
    words = any(
        re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(pattern)
        for pattern in patterns
    )
    return anywhere if anywhere == words else not packed


def _tensors(linear: PackedLinear, source: TensorSource) -> dict[str, Wanted]:
    at, columns = linear.name, linear.out_ch // NIBBLES
    if linear.out_ch % NIBBLES:
        raise ValueError(
            f"module {at!r}: out_ch={linear.out_ch} is not a multiple of {NIBBLES}, as the format "
            f"has it; {DENSE}"
        )
    return {
        f"{at}.qweight": Wanted((linear.in_ch, columns), ("int32",)),
        f"{at}.qzeros": Wanted((linear.groups, columns), ("int32",)),
        f"{at}.scales": Wanted((linear.groups, linear.out_ch)),
    }


def _codes(linear: PackedLinear, source: TensorSource, rows: tuple[int, int]) -> np.ndarray:
    """`packed` of a QTensor: two input channels a byte, the first in its low nibble."""
    (start, stop), name = rows, f"{linear.name}.qweight"
    out = aligned((stream_bytes(linear.in_ch, BITS), stop - start), np.dtype(np.uint8))
    step = 2 * rows_a_time(source.specs[name].shape)
    for first in range(0, linear.in_ch, step):
        codes = unpack(source.rows(name, first, first + step))[:, start:stop] ^ 8
        half = out[first // 2 : first // 2 + (len(codes) + 1) // 2]
        half[:] = codes[0::2]
        half[: len(codes) // 2] |= codes[1::2] << 4
    return out


def unpack(words: Int32[np.ndarray, "rows words"]) -> UInt8[np.ndarray, "rows cols"]:
    """The unsigned codes, their columns in order."""
    each = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(*words.shape, 4)
    codes = np.empty((*words.shape, NIBBLES), np.uint8)
    codes[..., ORDER] = np.stack([each & 15, each >> 4], axis=-1).reshape(codes.shape)
    return codes.reshape(len(words), -1)


def _grid(linear: PackedLinear, source: TensorSource) -> tuple[np.ndarray, np.ndarray]:
    zero = unpack(whole(source, f"{linear.name}.qzeros")).astype(np.int8) - np.int8(8)
    return np.ascontiguousarray(whole(source, f"{linear.name}.scales"), np.float32), zero


GEMM = Form(_tensors, lambda linear, source: None, _codes, _grid)
