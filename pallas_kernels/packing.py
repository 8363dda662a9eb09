"""Codes as bytes: a little-endian bit stream along one axis.

Weights are packed along the reduction axis (`pack`), rows of a cache along their last axis
(`pack_rows`), so that a new row never rewrites a byte of another.

Code `i` (two's complement, `bits` wide) occupies bits `i*bits .. (i+1)*bits - 1` of its column's
stream, lowest bits first. With 4 bits a byte therefore holds row 2i in its low nibble and row 2i+1
in the high one: rows (-8, 7) give 0x78. Odd widths cross byte borders; the last byte is filled
with zero bits. The form is the same on disk and in memory.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int8, UInt8


def packed_rows(rows: int, bits: int) -> int:
    """Bytes that `rows` codes of `bits` take in one column."""
    return -(-rows * bits // 8)


def pack(
    codes: Int8[Array, "*batch in_ch out_ch"], bits: int
) -> UInt8[Array, "*batch bytes out_ch"]:
    """Packs signed codes in −2^(bits−1) … 2^(bits−1)−1 along axis −2.

    `unpack(pack(codes, bits), bits, in_ch)` is `codes` for every `bits` in 1..8 and every `in_ch`.
    """
    *batch, rows, cols = codes.shape
    if bits == 8:
        return jax.lax.bitcast_convert_type(codes.astype(jnp.int8), jnp.uint8)
    period = math.lcm(bits, 8) // bits  # codes after which the stream is at a byte border again
    n_bytes = period * bits // 8
    pad = -rows % period
    unsigned = jnp.pad(codes, [(0, 0)] * len(batch) + [(0, pad), (0, 0)]).astype(jnp.uint8)
    unsigned = (unsigned & (2**bits - 1)).reshape(*batch, (rows + pad) // period, period, cols)
    out = []
    for b in range(n_bytes):
        byte = jnp.zeros_like(unsigned[..., 0, :])
        for i in range(period):
            shift = i * bits - b * 8  # where code i starts, seen from byte b
            if 0 <= shift < 8:
                byte |= unsigned[..., i, :] << shift
            elif -bits < shift < 0:
                byte |= unsigned[..., i, :] >> -shift
        out.append(byte)
    packed = jnp.stack(out, axis=-2).reshape(*batch, -1, cols)
    return packed[..., : packed_rows(rows, bits), :]


def unpack(
    packed: UInt8[Array, "*batch bytes out_ch"], bits: int, in_ch: int
) -> Int8[Array, "*batch in_ch out_ch"]:
    """The signed codes of a packed array; the inverse of `pack`."""
    *batch, stored, cols = packed.shape
    if bits == 8:
        return jax.lax.bitcast_convert_type(packed, jnp.int8)
    period = math.lcm(bits, 8) // bits
    n_bytes = period * bits // 8
    pad = -stored % n_bytes
    stream = jnp.pad(packed, [(0, 0)] * len(batch) + [(0, pad), (0, 0)])
    stream = stream.reshape(*batch, (stored + pad) // n_bytes, n_bytes, cols)
    out = []
    for i in range(period):
        first, shift = divmod(i * bits, 8)
        word = stream[..., first, :] >> shift
        if shift + bits > 8:  # the high part begins the next byte
            word |= stream[..., first + 1, :] << (8 - shift)
        top = word << (8 - bits)  # the sign bit of the code becomes the sign bit of the byte
        out.append(jax.lax.bitcast_convert_type(top, jnp.int8) >> (8 - bits))
    codes = jnp.stack(out, axis=-2).reshape(*batch, -1, cols)
    return codes[..., :in_ch, :]


def pack_rows(codes: Int8[Array, "*rows channels"], bits: int) -> UInt8[Array, "*rows bytes"]:
    """`pack` along the last axis: every row is a bit stream of its own, in whole bytes."""
    return pack(codes[..., None], bits)[..., 0]


def unpack_rows(
    packed: UInt8[Array, "*rows bytes"], bits: int, channels: int
) -> Int8[Array, "*rows channels"]:
    """The inverse of `pack_rows`."""
    return unpack(packed[..., None], bits, channels)[..., 0]
