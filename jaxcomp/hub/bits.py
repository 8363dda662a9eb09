"""Codes as a little-endian bit stream along the last axis, on the host.

Code `i` of `bits` bits takes bits `i*bits .. (i+1)*bits - 1`, lowest first. Formats of packed
weights differ in the axis, in what they add to a code and in the words they cut the stream into;
the stream is the same in all of them, and in a `QTensor`.
"""

import numpy as np
from jaxtyping import UInt8


def stream_bytes(n: int, bits: int) -> int:
    """Bytes that `n` codes take."""
    return -(-n * bits // 8)


def pack_bits(codes: UInt8[np.ndarray, "*rows n"], bits: int) -> UInt8[np.ndarray, "*rows bytes"]:
    """The stream of codes below 2^bits; the last byte is filled with zero bits."""
    planes = codes[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(planes.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack_bits(
    stream: UInt8[np.ndarray, "*rows bytes"], bits: int, n: int
) -> UInt8[np.ndarray, "*rows n"]:
    """The first `n` codes of a stream."""
    planes = np.unpackbits(stream, axis=-1, count=n * bits, bitorder="little")
    planes = planes.reshape(*stream.shape[:-1], n, bits)
    return np.packbits(planes, axis=-1, bitorder="little")[..., 0]


def top_bits(n_bytes: int, bits: int, n: int) -> UInt8[np.ndarray, " n_bytes"]:
    """A stream of `n_bytes` with the top bit of each of its `n` codes set and no other.

    A code c in −2^(b−1) … 2^(b−1)−1 in two's complement and c + 2^(b−1) differ in the top bit
    alone, so an exclusive or with this goes from the one to the other.
    """
    stream = np.zeros(n_bytes * 8, np.uint8)
    stream[bits - 1 : n * bits : bits] = 1
    return np.packbits(stream, bitorder="little")
