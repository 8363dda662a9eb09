"""Weights in the layout of `native.cpp`, and back.

A panel is 64 output channels; a word of 32 bits holds the codes of 8 (4 bits) or 4 (8 bits)
neighbouring input channels of one of them. Codes of 2 and 3 bits are kept in 4, of 5 to 7 in 8.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, UInt8, UInt32

from pallas_kernels.weight import Weight, codes_of, grid_of

PANEL = 64


def dense_panels(w: Float[np.ndarray, "in_ch out_ch"]) -> Float[np.ndarray, "panels in_ch 64"]:
    """A dense weight in panels; the last one is filled up with zeros."""
    in_ch, out_ch = w.shape
    panels = np.zeros((-(-out_ch // PANEL), in_ch, PANEL), w.dtype)
    for i, panel in enumerate(panels):
        part = w[:, i * PANEL : (i + 1) * PANEL]
        panel[:, : part.shape[1]] = part
    return panels


def stored_bits(bits: int) -> int:
    """Bits that a code takes in a panel."""
    return 4 if bits <= 4 else 8


def prepare(w: Weight, sums: bool = False) -> Weight:
    """The weight in panels; `sums` where activations have zero points.

    Raises:
      NotImplementedError: experts, or several groups that are no whole words.
    """
    if w.layout == "native":
        return w
    if len(w.shape) != 2:
        raise NotImplementedError(f"a weight with experts, {w.shape}")
    per_word = 32 // stored_bits(w.bits)
    if w.groups > 1 and w.group_size % per_word:
        raise NotImplementedError(
            f"groups of {w.group_size} input channels, no multiple of {per_word}"
        )
    scale, zero = (None if a is None else np.asarray(a) for a in grid_of(w))
    scale = np.broadcast_to(scale, (w.groups, w.out_ch)).astype(np.float32)
    zero = None if zero is None else np.broadcast_to(zero, scale.shape)
    columns, more = [(0, 0), (0, -w.out_ch % PANEL)], -w.in_ch % per_word
    pad = lambda a, dtype: None if a is None else jnp.asarray(np.pad(a, columns), dtype)  # noqa: E731
    total = None
    if sums or more or w.bits not in (4, 8) or w.layout != "canonical":
        codes = np.asarray(codes_of(w))
        if more:  # with the code of 0.0 in the padding, zero points need no care
            fill = np.zeros((1, w.out_ch), np.int8) if zero is None else zero
            codes = np.concatenate([codes, np.repeat(fill, more, axis=0)])
        if sums:
            grouped = codes.reshape(w.groups, -1, w.out_ch)
            total = np.sum(grouped, axis=1, dtype=np.int32)
        stored = to_bytes(codes, w.bits)
    else:
        stored = np.asarray(w.codes)
    return w.replace(
        codes=jnp.asarray(to_panels(np.pad(stored, columns), w.bits)),
        scale=pad(scale, jnp.float32),
        zero_point=pad(zero, jnp.int32),
        sums=pad(total, jnp.int32),
        layout="native",
    )


def to_bytes(codes: Int8[np.ndarray, "in_ch out_ch"], bits: int) -> UInt8[np.ndarray, "_ out_ch"]:
    """Codes in the bytes of a panel: one in each, or two where they take 4 bits."""
    if stored_bits(bits) == 8:
        return codes.view(np.uint8)
    nibbles = codes.view(np.uint8) & 15
    return nibbles[::2] | nibbles[1::2] << 4


def to_panels(
    stored: UInt8[np.ndarray, "_ out_ch"], bits: int
) -> UInt32[np.ndarray, "panels words 64"]:
    """Bytes, whole words and panels of them, as words of codes with their offset."""
    offset = 0x88 if stored_bits(bits) == 4 else 0x80  # adding it to a code is to flip its sign bit
    split = (stored ^ np.uint8(offset)).reshape(-1, 4, stored.shape[1] // PANEL, PANEL)
    return np.ascontiguousarray(split.transpose(2, 0, 3, 1)).view("<u4")[..., 0]


def codes_of_panels(w: Weight) -> Int8[Array, "in_ch out_ch"]:
    """The inverse of `prepare`, for the codes."""
    words = w.codes.swapaxes(0, 1).reshape(w.codes.shape[1], -1)
    return _codes_of_words(words, w.bits)[: w.in_ch, : w.out_ch]


def columns_of_panels(w: Weight, ids: Int[Array, " ids"]) -> Int8[Array, "in_ch ids"]:
    """The codes of some output channels."""
    return _codes_of_words(w.codes[ids // PANEL, :, ids % PANEL].T, w.bits)[: w.in_ch]


def _codes_of_words(
    words: UInt32[Array, "words columns"], bits: int
) -> Int8[Array, "rows columns"]:
    stored = stored_bits(bits)
    per_word, mask, offset = 32 // stored, 2**stored - 1, 2 ** (stored - 1)
    split = [(words >> (stored * i)) & mask for i in range(per_word)]
    codes = jnp.stack(split, axis=1).astype(jnp.int32) - offset  # [words, per_word, columns]
    return codes.reshape(-1, words.shape[1]).astype(jnp.int8)
