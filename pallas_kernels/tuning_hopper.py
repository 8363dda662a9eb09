"""Tiles of the kernels for Hopper: by rules, as nothing has been timed on one yet.

What the rules aim at, and `benchmarks/static` shows: no spills, two programs or more on each of the
132 multiprocessors where few tokens leave only bytes to wait for, and copies of at least three
steps under way.
"""

from typing import NamedTuple

PROCESSORS = 132
MAX_TOKENS = 1024  # beyond, to dequantize once and multiply in bfloat16 costs less
SHARED = 232_448 - 2_048  # bytes a program may have; barriers take some


class Matmul(NamedTuple):
    """How a program of a matrix product walks.

    Attributes:
      tokens, out: of its tile of the result.
      k: input channels of one copied tile, all of one group of the weight.
      parts: such tiles in one step.
      stages: steps under way.
      split: programs that share the input channels of a tile.
    """

    tokens: int
    out: int
    k: int
    parts: int
    stages: int
    split: int


def matmul(m: int, k: int, n: int, group: int, bits: int) -> Matmul:
    """The tile of a product of 16-bit floats with one weight.

    Args:
      m: tokens.
      k, n: input and output channels of the prepared weight, padding included.
      group: input channels that share a scale; `k` where all do.
      bits: of a code as it is stored, 4 or 8.

    Raises:
      NotImplementedError: more tokens than the kernel is for, or groups that no tile fits into.
    """
    if not 0 < m <= MAX_TOKENS:
        raise NotImplementedError(f"{m} tokens, outside 1..{MAX_TOKENS}")
    return _matmul(m, k, n, group, bits, 16, 32, 64)


def matmul_int(m: int, k: int, n: int, group: int, bits: int) -> Matmul:
    """The tile of a product of 8-bit codes, with the arguments of `matmul`.

    Raises:
      NotImplementedError: no tokens, or groups that no tile fits into.
    """
    if not m:
        raise NotImplementedError("no tokens")
    # The tensor core reads rows of at least 64 bytes where weights come from registers. A sum of
    # products that is scaled at each group takes twice the registers.
    return _matmul(m, k, n, group, bits, 8, 64, 128 if group == k else 64)


def _matmul(
    m: int, k: int, n: int, group: int, bits: int, x_bits: int, narrow: int, most: int
) -> Matmul:
    step_k = next((size for size in (128, 64, 32) if group % size == 0), 0)
    if step_k < narrow:
        raise NotImplementedError(f"groups of {group} input channels, no multiple of {narrow}")
    few = m <= 32
    tokens = next((rows for rows in (8, 16, 32, 64) if m <= rows and rows <= most), most)
    out = 64 if few or step_k == 32 else 128  # many small tiles in a step take more registers
    parts = next(p for p in (4, 2, 1) if step_k * p <= 128 and k % (step_k * p) == 0)
    steps = k // (step_k * parts)
    programs = -(-m // tokens) * (n // out)
    split = 1
    while few and programs * split < 2 * PROCESSORS and steps % (2 * split) == 0:
        if steps // (2 * split) < 4:
            break
        split *= 2
    step = parts * (step_k * (tokens * x_bits + out * bits) // 8 + 12 * out)
    stages = min(6 if few else 3, (SHARED - tokens * out * 4) // step, steps // split)
    return Matmul(tokens, out, step_k, parts, stages, split)


class Attention(NamedTuple):
    """How a program of an attention over a cache walks.

    Attributes:
      slots: of its tile of keys and values.
      stages: tiles under way.
      split: programs that share a sequence and kv head.
    """

    slots: int
    stages: int
    split: int


def attention(pairs: int, group: int, slots: int, dim: int, k_bits: int, v_bits: int) -> Attention:
    """The tile of one query a sequence over a cache.

    A multiprocessor has three programs or more, which cover each other's waits, with two or three
    tiles of each under way.

    Args:
      pairs: sequences times kv heads.
      group: queries of a pair.
      slots: of the cache.
      dim: channels of a head.
      k_bits, v_bits: of an entry as it is stored, 4, 8 or 16.

    Raises:
      NotImplementedError: more queries than there are registers for their sums.
    """
    size, queries = 64, -(-group // 8) * 8
    if queries * dim > 4096:
        raise NotImplementedError(f"{group} queries of {dim} channels for a kv head")
    step = size * dim * (k_bits + v_bits) // 8 + 2 * (4 * size + 128)
    held = queries * (2 * size + 6 * dim) + (2 * size * dim if v_bits < 16 else 0)
    stages = max(2, min(3, (SHARED // 3 - 3072 - held) // step))
    split = max(1, min(3 * PROCESSORS // pairs, -(-slots // size) // 2))
    return Attention(size, stages, split)
