"""The bytes of compressed-tensors, from ours.

Both formats lay b-bit codes into a little-endian bit stream along `in`, lowest bits first. Ours
starts at `[in, out]` with two's complement in bytes; theirs at `[out, in]` with codes offset by
2^(b−1), in int32 words whose rest is 0. Adding the offset to a two's complement code flips its top
bit and nothing else, so packed weights are transposed and XORed, never unpacked.

Source: compressed-tensors 0.20, format "pack-quantized"; since 0.18 codes of 3, 5, 6 and 7 bits
cross the borders of words as they do here.
"""

import numpy as np
from jaxtyping import Int8, Int32, UInt8

WORD = 32


def words(n: int, bits: int) -> int:
    """int32 words that `n` codes take."""
    return -(-n * bits // WORD)


def pack_weight(
    packed: UInt8[np.ndarray, "bytes out_ch"], bits: int, in_ch: int
) -> Int32[np.ndarray, "out_ch words"]:
    """`weight_packed` of the codes of a QTensor."""
    n_bytes, out_ch = packed.shape
    rows = np.zeros((out_ch, words(in_ch, bits) * WORD // 8), np.uint8)
    rows[:, :n_bytes] = packed.T
    rows ^= _top_bits(rows.shape[1], bits, in_ch)
    return rows.view("<i4")


def pack_zero_point(
    zero_point: Int8[np.ndarray, "groups out_ch"], bits: int
) -> Int32[np.ndarray, "words groups"]:
    """`weight_zero_point`: packed along `out_ch`, one column a group."""
    groups, out_ch = zero_point.shape
    codes = (zero_point.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    stream = np.zeros((groups, words(out_ch, bits) * WORD), np.uint8)
    stream[:, : out_ch * bits] = (codes[:, :, None] >> np.arange(bits, dtype=np.uint8) & 1).reshape(
        groups, -1
    )
    return np.packbits(stream, axis=-1, bitorder="little").view("<i4").T


def bytes_weight(packed: UInt8[np.ndarray, "in_ch out_ch"]) -> Int8[np.ndarray, "out_ch in_ch"]:
    """`weight` of format "int-quantized": 8-bit codes, one a byte."""
    return packed.view(np.int8).T


def _top_bits(n_bytes: int, bits: int, in_ch: int) -> UInt8[np.ndarray, " n_bytes"]:
    """A row with the top bit of each of its `in_ch` codes set."""
    stream = np.zeros(n_bytes * 8, np.uint8)
    stream[bits - 1 : in_ch * bits : bits] = 1
    return np.packbits(stream, bitorder="little")
