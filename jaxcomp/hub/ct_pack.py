"""The bytes of compressed-tensors, from ours and back.

Both formats lay b-bit codes into a little-endian bit stream along `in`, lowest bits first. Ours
starts at `[in, out]` with two's complement in bytes; theirs at `[out, in]` with codes offset by
2^(b−1), in int32 words whose rest is 0. Adding the offset to a two's complement code flips its top
bit and nothing else, so packed weights are transposed and XORed, never unpacked.

Source: compressed-tensors 0.20, format "pack-quantized"; since 0.18 codes of 3, 5, 6 and 7 bits
cross the borders of words as they do here. Before, a word held ⌊32/b⌋ codes and its top bits were
idle: "gapped" below, which is read and not written.
"""

import numpy as np
from jaxtyping import Int8, Int32, UInt8

from jaxcomp.hub.bits import pack_bits, stream_bytes, top_bits, unpack_bits

WORD = 32


def words(n: int, bits: int, gapped: bool = False) -> int:
    """int32 words that `n` codes take."""
    return -(-n // (WORD // bits)) if gapped else -(-n * bits // WORD)


def pack_weight(
    packed: UInt8[np.ndarray, "bytes out_ch"], bits: int, in_ch: int
) -> Int32[np.ndarray, "out_ch words"]:
    """`weight_packed` of the codes of a QTensor."""
    n_bytes, out_ch = packed.shape
    rows = np.zeros((out_ch, words(in_ch, bits) * WORD // 8), np.uint8)
    rows[:, :n_bytes] = packed.T
    rows ^= top_bits(rows.shape[1], bits, in_ch)
    return rows.view("<i4")


def unpack_weight(
    stored: Int32[np.ndarray, "out_ch words"], bits: int, in_ch: int, gapped: bool = False
) -> UInt8[np.ndarray, "out_ch bytes"]:
    """The codes of a QTensor from rows of `weight_packed`; transposed, they are its `packed`."""
    n_bytes = stream_bytes(in_ch, bits)
    rows = pack_bits(_without_gaps(stored, bits, in_ch), bits) if gapped else _as_bytes(stored)
    return rows[:, :n_bytes] ^ top_bits(n_bytes, bits, in_ch)


def pack_zero_point(
    zero_point: Int8[np.ndarray, "groups out_ch"], bits: int
) -> Int32[np.ndarray, "words groups"]:
    """`weight_zero_point`: packed along `out_ch`, one column a group."""
    groups, out_ch = zero_point.shape
    stream = pack_bits((zero_point.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8), bits)
    rows = np.zeros((groups, words(out_ch, bits) * WORD // 8), np.uint8)
    rows[:, : stream.shape[1]] = stream
    return rows.view("<i4").T


def unpack_zero_point(
    stored: Int32[np.ndarray, "words groups"], bits: int, out_ch: int, gapped: bool = False
) -> Int8[np.ndarray, "groups out_ch"]:
    """The inverse of `pack_zero_point`."""
    columns = np.ascontiguousarray(stored.T)
    if gapped:
        codes = _without_gaps(columns, bits, out_ch)
    else:
        codes = unpack_bits(_as_bytes(columns), bits, out_ch)
    return (codes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)


def bytes_weight(packed: UInt8[np.ndarray, "in_ch out_ch"]) -> Int8[np.ndarray, "out_ch in_ch"]:
    """`weight` of format "int-quantized": 8-bit codes, one a byte."""
    return packed.view(np.int8).T


def unpack_bytes(
    stored: Int8[np.ndarray, "out_ch in_ch"], bits: int
) -> UInt8[np.ndarray, "out_ch bytes"]:
    """The codes of a QTensor from rows of such a `weight`, which may have less than 8 bits.

    Raises:
      ValueError: a code is outside the range of its bits.
    """
    limit = 2 ** (bits - 1)
    low, high = int(stored.min(initial=0)), int(stored.max(initial=0))
    if low < -limit or high >= limit:
        raise ValueError(
            f"holds codes from {low} to {high}, and {bits} bits end at {-limit} and {limit - 1}"
        )
    codes = stored.view(np.uint8)
    return codes if bits == 8 else pack_bits(codes & np.uint8(2**bits - 1), bits)


def _as_bytes(stored: Int32[np.ndarray, "rows words"]) -> UInt8[np.ndarray, "rows bytes"]:
    return np.ascontiguousarray(stored, "<i4").view(np.uint8)


def _without_gaps(
    stored: Int32[np.ndarray, "rows words"], bits: int, n: int
) -> UInt8[np.ndarray, "rows n"]:
    """The `n` codes of each row, as they are stored, where words have idle top bits."""
    shifts = np.arange(WORD // bits, dtype=np.uint32) * np.uint32(bits)
    codes = stored.view(np.uint32)[:, :, None] >> shifts & np.uint32(2**bits - 1)
    return codes.astype(np.uint8).reshape(len(stored), -1)[:, :n]
