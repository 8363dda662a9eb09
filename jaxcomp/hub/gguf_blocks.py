"""Weights as GGUF stores them: which storage type holds a grid, and its bytes.

    type   bytes of 32 neighbouring input channels         value
    Q4_0   f16 d, 16 of nibbles                            d·(n − 8),   n in 0..15
    Q4_1   f16 d, f16 m, 16 of nibbles                     d·n + m
    Q5_0   f16 d, 4 of fifth bits, 16 of nibbles           d·(n − 16),  n in 0..31
    Q8_0   f16 d, 32 of int8                               d·n

Byte j of the nibbles holds channel j below and channel j + 16 above. A quantized weight of ours
is (q − z)·s with s and z constant over a group, so where groups are whole blocks its codes are
moved and not rounded again. What is lost is the rounding of s to float16, and for Q4_1 that of
m = (−8 − z)·d, half a percent of a step; `loss` measures both on the bytes that were written.

Source: the block structs of ggml.
"""

from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float, Int8, Int16, UInt8

from jaxcomp.core.quantize import QTensor, dequantize

BLOCK = 32
FLOATS = {  # storage type → dtype
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
TYPES = {  # storage type → its number, elements of a block, bytes of a block
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "BF16": (30, 1, 2),
    "Q4_0": (2, BLOCK, 18),
    "Q4_1": (3, BLOCK, 20),
    "Q5_0": (6, BLOCK, 22),
    "Q8_0": (8, BLOCK, 34),
}


class Loss(NamedTuple):
    """What storing a tensor cost: sums over its elements."""

    error: float = 0.0
    norm: float = 0.0

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.error + other.error, self.norm + other.norm)

    @property
    def relative(self) -> float:
        """‖stored − weight‖ / ‖weight‖."""
        return float(np.sqrt(self.error / self.norm)) if self.norm else 0.0


def grid_type(w: QTensor) -> tuple[str | None, str]:
    """The smallest storage type that holds the codes of `w`, or None and why there is none.

    Args:
      w: arrays or structs; nothing is read.
    """
    group = w.in_ch // w.scale.shape[-2]
    if w.in_ch % BLOCK:
        return None, f"its rows of {w.in_ch} are no whole blocks of {BLOCK}"
    if group % BLOCK:
        return None, f"its groups of {group} are no whole blocks of {BLOCK}"
    if w.zero_point is not None and w.bits == 4:
        return "Q4_1", ""
    bits = w.bits + (w.zero_point is not None)  # q − z is one bit wider than q
    if bits > 8:
        return None, f"codes less their zero points take {bits} bits and the widest type has 8"
    return ("Q4_0" if bits <= 4 else "Q5_0" if bits == 5 else "Q8_0"), ""


def encode_grid(w: QTensor, kind: str) -> UInt8[np.ndarray, "out_ch bytes"]:
    """The bytes of a quantized weight in the type that `grid_type` gives; codes are kept.

    Args:
      w: host or device arrays, `[in_ch, out_ch]`.
      kind: storage type.

    Raises:
      ValueError: a scale beyond the range of f16.
    """
    codes = np.asarray(w.codes).T.astype(np.int16).reshape(w.shape[1], -1, BLOCK)

    def by_block(a: np.ndarray) -> np.ndarray:  # [groups or 1, out_ch or 1] → [out_ch, blocks]
        a = np.broadcast_to(np.asarray(a), (w.scale.shape[-2], w.shape[1])).T
        return np.repeat(a, codes.shape[1] // a.shape[1], axis=1)

    with np.errstate(over="ignore"):
        d = by_block(w.scale).astype(np.float16)
    if not np.isfinite(d).all():
        raise ValueError(
            f"a scale of {float(np.max(np.abs(w.scale))):g} is beyond the float16 of {kind}, whose "
            "largest number is 65504; the weights are far from any model's: check the artefact"
        )
    zero = np.zeros((), np.int16) if w.zero_point is None else by_block(w.zero_point)
    if kind == "Q4_1":
        least = -(2 ** (w.bits - 1))
        m = ((least - zero.astype(np.float32)) * d.astype(np.float32)).astype(np.float16)
        return _join(d, m, _nibbles(codes - least))
    n = codes - zero.astype(np.int16)[..., None]
    if kind == "Q4_0":
        return _join(d, _nibbles(n + 8))
    if kind == "Q5_0":
        fifth = np.packbits(((n + 16) >> 4).astype(np.uint8), axis=-1, bitorder="little")
        return _join(d, fifth, _nibbles((n + 16) & 15))
    return _join(d, n.astype(np.int8))


def encode_dense(w: Float[np.ndarray, "..."], kind: str) -> np.ndarray:
    """A dense tensor in a float type, or rounded to Q8_0; row by row as it lies.

    Raises:
      ValueError: a number beyond the range of float16.
    """
    if kind == "Q8_0":
        from gguf import GGMLQuantizationType, quants

        return quants.quantize(np.asarray(w, np.float32), GGMLQuantizationType.Q8_0)
    with np.errstate(over="ignore"):
        out = np.asarray(w).astype(FLOATS[kind])
    if kind == "F16" and not np.isfinite(out).all():
        raise ValueError(
            f"a weight of {float(np.max(np.abs(np.asarray(w, np.float32)))):g} is not finite in "
            "float16, whose largest number is 65504; use BF16 or F32 for dense weights"
        )
    return out


def decode(raw: np.ndarray, kind: str) -> Float[np.ndarray, "..."]:
    """float32 values of what an encoder gave."""
    if kind in FLOATS:
        return np.asarray(raw, np.float32)
    from gguf import GGMLQuantizationType, quants

    return quants.dequantize(raw, GGMLQuantizationType[kind])


def loss(raw: np.ndarray, kind: str, w: np.ndarray | QTensor) -> Loss:
    """How far the stored tensor is from the weight it stands for, `[out_ch, in_ch]` if dense."""
    wanted = np.asarray(dequantize(w)).T if isinstance(w, QTensor) else np.asarray(w, np.float32)
    wanted = wanted.astype(np.float64)
    error = decode(raw, kind) - wanted
    return Loss(float(np.sum(error * error)), float(np.sum(wanted * wanted)))


def take_columns(w: QTensor, columns: np.ndarray) -> QTensor:
    """Some output channels of a quantized weight, in the order of `columns`."""
    return jax.tree.map(lambda a: a if a.shape[-1] == 1 else np.asarray(a)[..., columns], w)


def _nibbles(n: Int16[np.ndarray, "out_ch blocks 32"]) -> UInt8[np.ndarray, "out_ch blocks 16"]:
    low, high = np.split(n.astype(np.uint8), 2, axis=-1)
    return low | high << 4


def _join(*parts: np.ndarray | Int8[np.ndarray, "..."]) -> UInt8[np.ndarray, "out_ch bytes"]:
    raw = [np.ascontiguousarray(p if p.ndim == 3 else p[..., None]).view(np.uint8) for p in parts]
    joined = np.concatenate(raw, axis=-1)
    return joined.reshape(len(joined), -1)
