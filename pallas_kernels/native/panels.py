"""Quantized weights in the layout of `native.cpp`, and back.

A panel is 64 output channels; a word of 32 bits holds the codes of 8 (4 bits) or 4 (8 bits)
neighbouring input channels of one of them. Codes of 2 and 3 bits are kept in 4, of 5 to 7 in 8.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int8, UInt32

from pallas_kernels.weight import Weight, codes_of, grid_of

PANEL = 64


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
    return _prepare(w, sums)


@jax.jit(static_argnames="sums")
def _prepare(w: Weight, sums: bool) -> Weight:
    codes, (scale, zero) = codes_of(w), grid_of(w)
    scale = jnp.broadcast_to(scale, (w.groups, w.out_ch)).astype(jnp.float32)
    if zero is not None:
        zero = jnp.broadcast_to(zero, scale.shape).astype(jnp.int32)
    more = -w.in_ch % (32 // stored_bits(w.bits))
    if more:  # with the code of 0.0 in the padding, zero points need no care
        fill = jnp.zeros((1, w.out_ch), jnp.int8) if zero is None else zero.astype(jnp.int8)
        codes = jnp.concatenate([codes, jnp.broadcast_to(fill, (more, w.out_ch))])
    total = None
    if sums:
        grouped = codes.reshape(w.groups, -1, w.out_ch)
        total = jnp.sum(grouped, axis=1, dtype=jnp.int32)
    columns = [(0, 0), (0, -w.out_ch % PANEL)]
    pad = lambda a: None if a is None else jnp.pad(a, columns)  # noqa: E731
    return w.replace(
        codes=to_panels(pad(codes), w.bits),
        scale=pad(scale),
        zero_point=pad(zero),
        sums=pad(total),
        layout="native",
    )


def to_panels(
    codes: Int8[Array, "in_ch out_ch"], bits: int
) -> UInt32[Array, "panels words channels"]:
    """Codes, whole words and panels of them, as words."""
    stored = stored_bits(bits)
    per_word, offset = 32 // stored, 2 ** (stored - 1)
    in_ch, out_ch = codes.shape
    unsigned = (codes.astype(jnp.int32) + offset).astype(jnp.uint32)
    split = unsigned.reshape(in_ch // per_word, per_word, out_ch // PANEL, PANEL)
    words = jnp.zeros(split.shape[:1] + split.shape[2:], jnp.uint32)
    for i in range(per_word):
        words |= split[:, i] << (stored * i)
    return words.swapaxes(0, 1)


def codes_of_panels(w: Weight) -> Int8[Array, "in_ch out_ch"]:
    """The inverse of `prepare`, for the codes."""
    stored = stored_bits(w.bits)
    per_word, mask, offset = 32 // stored, 2**stored - 1, 2 ** (stored - 1)
    panels, words, _ = w.codes.shape
    split = [(w.codes >> (stored * i)) & mask for i in range(per_word)]
    codes = jnp.stack(split, axis=2).astype(jnp.int32) - offset  # [panels, words, per_word, 64]
    codes = codes.reshape(panels, words * per_word, PANEL).swapaxes(0, 1)
    return codes.reshape(words * per_word, -1)[: w.in_ch, : w.out_ch].astype(jnp.int8)
