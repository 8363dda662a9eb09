"""Reading compressed-tensors: `weight_packed` and its companions as the weights they are.

Packed codes are transposed and XORed, codes of less than 8 bits that lie in bytes are packed; no
weight is ever a float. Which of the two packings a file has is seen from the width of its tensors,
and where both would be as wide, from the version of the library that wrote it.

Source: compressed-tensors 0.20, its compressors "pack-quantized" and "int-quantized".
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxcomp.hub import ct_pack
from jaxcomp.hub.bits import stream_bytes
from jaxcomp.hub.ct_config import match_modules
from jaxcomp.hub.ct_parse import ParsedConfig, parse_config
from jaxcomp.hub.leaves import TensorSource, Wanted, aligned, rows_a_time, whole
from jaxcomp.hub.packed import DENSE, Form, Packed, PackedLinear
from jaxcomp.hub.packed_model import check_modules, module_shapes
from jaxcomp.models.decoder import Decoder

WITHOUT_GAPS = (0, 18)  # versions from here on pack codes of 3, 5, 6 and 7 bits without gaps
UINT8 = np.dtype(np.uint8)


def packed_part(
    config: Mapping[str, Any], template: Decoder, source: TensorSource, allow: tuple[str, ...] = ()
) -> Packed:
    """What a `quantization_config` makes of the model, checked against the files.

    Args:
      config: the `quantization_config`.
      template: of the dense model.
      source: the tensors; a few small ones are read.
      allow: unknown fields that the caller vouches change nothing.

    Raises:
      ValueError: see `ct_parse.parse_config`; or config and files do not agree.
    """
    scheme = parse_config(config, allow)
    shapes = module_shapes(template)
    groups = match_modules(config, shapes)
    said_by = "targets and ignore of the quantization_config"
    check_modules({n: g is not None for n, g in groups.items()}, source, said_by)
    linears = {
        name: _linear(name, shapes[name], scheme, group, source)
        for name, group in groups.items()
        if group is not None
    }
    odd = {n: x for n, x in linears.items() if x.form is WORDS and ct_pack.WORD % x.spec.bits}
    linears |= _of_their_generation(odd, source, scheme.version)
    return Packed(linears, scheme.kv_cache)


def _linear(
    name: str, shape: tuple[int, int], scheme: ParsedConfig, group: str, source: TensorSource
) -> PackedLinear:
    format, spec, act = scheme.groups[group]
    in_words = format == "pack-quantized"
    other = f"{name}.{'weight' if in_words else 'weight_packed'}"
    if other in source.specs:
        raise ValueError(
            f"{source.where}: {other!r} is there, and group {group} is of format {format}, which "
            "has no such tensor; write the format that the files have into the group"
        )
    if spec.symmetric and (zero := f"{name}.weight_zero_point") in source.specs:
        raise ValueError(
            f"{source.where}: {zero!r} is there, and group {group} is symmetric; one of them is "
            f"wrong: correct the config, or {DENSE}"
        )
    if act is not None and name == "lm_head":
        raise ValueError(
            f"{source.where}: group {group} quantizes the input of lm_head ({act}), and the final "
            f"hidden state is no site; {DENSE}"
        )
    return PackedLinear(name, shape[1], shape[0], spec, WORDS if in_words else BYTES, act)


def _of_their_generation(
    linears: dict[str, PackedLinear], source: TensorSource, version: tuple[int, int] | None
) -> dict[str, PackedLinear]:
    """The modules with the packing that their tensors have; one library wrote them all.

    Raises:
      ValueError: nothing tells which of two it is.
    """
    gapped = {name: dataclasses.replace(linear, form=GAPPED) for name, linear in linears.items()}
    fits = {
        name: [x for x in (linear, gapped[name]) if _has_shapes(x, source)]
        for name, linear in linears.items()
    }
    told = {fit[0].form is GAPPED for fit in fits.values() if len(fit) == 1}
    if len(told) != 1 and version is not None:
        told = {version < WITHOUT_GAPS}
    found = {}
    for name, linear in linears.items():
        if len(fits[name]) < 2:
            found[name] = (
                fits[name][0] if fits[name] else linear
            )  # whose shapes are refused by name
        elif len(told) == 1 or _in_one_word(linear):
            found[name] = gapped[name] if told == {True} else linear
        else:
            raise ValueError(
                f"{source.where}: module {name!r} has {linear.in_ch} × {linear.out_ch} codes of "
                f"{linear.spec.bits} bits, for which both packings of the format are as wide, and "
                "the quantization_config has no version of compressed-tensors that would tell; "
                "write it in"
            )
    return found


def _in_one_word(linear: PackedLinear) -> bool:
    """Whether no stream of it is longer than what both packings hold alike."""
    longest = linear.in_ch if linear.spec.symmetric else max(linear.in_ch, linear.out_ch)
    return longest <= ct_pack.WORD // linear.spec.bits


def _has_shapes(linear: PackedLinear, source: TensorSource) -> bool:
    wanted = linear.form.tensors(linear, source)
    return all(source.specs[n].shape == w.shape for n, w in wanted.items() if n in source.specs)


def _word_tensors(
    linear: PackedLinear, source: TensorSource, gapped: bool = False
) -> dict[str, Wanted]:
    at, bits, out_ch = linear.name, linear.spec.bits, linear.out_ch
    columns = ct_pack.words(linear.in_ch, bits, gapped)
    tensors = {
        f"{at}.weight_packed": Wanted((out_ch, columns), ("int32",)),
        f"{at}.weight_shape": Wanted((2,), ("int64", "int32")),
        f"{at}.weight_scale": Wanted(_grid_shape(linear)),
    }
    if linear.spec.symmetric:
        return tensors
    if linear.spec.granularity == "tensor":  # one number is not packed
        return tensors | {f"{at}.weight_zero_point": Wanted((1,), ("int8",))}
    shape = (ct_pack.words(out_ch, bits, gapped), linear.groups)
    return tensors | {f"{at}.weight_zero_point": Wanted(shape, ("int32",))}


def _byte_tensors(linear: PackedLinear, source: TensorSource) -> dict[str, Wanted]:
    at, shape = linear.name, _grid_shape(linear)
    tensors = {
        f"{at}.weight": Wanted((linear.out_ch, linear.in_ch), ("int8",)),
        f"{at}.weight_scale": Wanted(shape),
    }
    if linear.spec.symmetric:
        return tensors
    return tensors | {f"{at}.weight_zero_point": Wanted(shape, ("int8",))}


def _grid_shape(linear: PackedLinear) -> tuple[int, ...]:
    return (1,) if linear.spec.granularity == "tensor" else (linear.out_ch, linear.groups)


def _check_weight_shape(linear: PackedLinear, source: TensorSource) -> None:
    name, wanted = f"{linear.name}.weight_shape", [linear.out_ch, linear.in_ch]
    if (found := whole(source, name).tolist()) != wanted:
        raise ValueError(
            f"{source.where}: {name!r} is {found} and the config makes it {wanted}; correct the "
            "config or download the weights again"
        )


def _word_codes(
    linear: PackedLinear, source: TensorSource, rows: tuple[int, int], gapped: bool = False
) -> np.ndarray:
    unpack = functools.partial(
        ct_pack.unpack_weight, bits=linear.spec.bits, in_ch=linear.in_ch, gapped=gapped
    )
    return _transposed(linear, source, rows, "weight_packed", unpack)


def _byte_codes(linear: PackedLinear, source: TensorSource, rows: tuple[int, int]) -> np.ndarray:
    def unpack(stored: np.ndarray) -> np.ndarray:
        try:
            return ct_pack.unpack_bytes(stored, linear.spec.bits)
        except ValueError as error:
            raise ValueError(f"{source.where}: '{linear.name}.weight' {error}") from None

    return _transposed(linear, source, rows, "weight", unpack)


def _transposed(
    linear: PackedLinear,
    source: TensorSource,
    rows: tuple[int, int],
    kind: str,
    unpack: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """`packed` of a QTensor, from rows of a stored tensor a chunk at a time."""
    (start, stop), name = rows, f"{linear.name}.{kind}"
    out = aligned((stream_bytes(linear.in_ch, linear.spec.bits), stop - start), UINT8)
    step = rows_a_time(source.specs[name].shape)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        out.T[first - start : last - start] = unpack(source.rows(name, first, last))
    return out


def _word_grid(
    linear: PackedLinear, source: TensorSource, gapped: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    scale, zero = _byte_grid(linear, source)
    if zero is not None and linear.spec.granularity != "tensor":
        zero = ct_pack.unpack_zero_point(zero.T, linear.spec.bits, linear.out_ch, gapped)
    return scale, zero


def _byte_grid(linear: PackedLinear, source: TensorSource) -> tuple[np.ndarray, np.ndarray | None]:
    def read(kind: str) -> np.ndarray:
        stored = whole(source, f"{linear.name}.{kind}")
        return stored.reshape(1, 1) if stored.ndim == 1 else stored.T

    scale = np.ascontiguousarray(read("weight_scale"), np.float32)
    return scale, None if linear.spec.symmetric else read("weight_zero_point")


WORDS = Form(_word_tensors, _check_weight_shape, _word_codes, _word_grid)
GAPPED = Form(
    functools.partial(_word_tensors, gapped=True),
    _check_weight_shape,
    functools.partial(_word_codes, gapped=True),
    functools.partial(_word_grid, gapped=True),
)
BYTES = Form(_byte_tensors, lambda linear, source: None, _byte_codes, _byte_grid)
