"""Kronecker products and attention on TPUs at sizes of real models, with the tuned tiles."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.chips import CHIPS
from pallas_kernels.kron_matmul.tpu import kron_matmul, kron_quantize
from pallas_kernels.quant_decode_attention.tpu import LANES, quant_decode_attention
from pallas_kernels.shapes import MODELS
from pallas_kernels.tuning import tile_for

S = jax.ShapeDtypeStruct
TOKENS, SLOTS, BATCH = 2048, 4096, 16


class Entry(NamedTuple):
    """One kernel at one size; the fields are those of `tpu_matmul.Entry`."""

    kernel: str
    case: str
    function: Callable
    arguments: tuple
    tile: Any
    step_bytes: int
    step_operations: int
    unit: str = "bf16"


def entries(chip_name: str) -> Iterator[Entry]:
    """The kernels of one chip."""
    for n1, n2 in ((32, 128), (64, 64), (64, 128), (112, 128), (28, 128)):
        yield kron(chip_name, n1, n2, 4)
    yield kron(chip_name, 32, 128, 8)
    yield kron(chip_name, 32, 128, 0)
    yield kron(chip_name, 112, 128, 0)
    yield kron(chip_name, 32, 128, 4, tokens=1)
    for bits in (4, 8, 0):
        yield attention(chip_name, bits)


def kron(chip_name: str, n1: int, n2: int, bits: int, tokens: int = TOKENS) -> Entry:
    """`kron_quantize` of bfloat16 rows to codes, packed where they have 4 bits; 0 for floats."""
    n, chip = n1 * n2, CHIPS[chip_name]
    tile = tile_for("kron_matmul", chip, n1=n1, channels=n, tokens=tokens)
    f = functools.partial(kron_matmul, chip=chip)
    if bits:
        f = functools.partial(kron_quantize, clip=None, bits=bits, packed=bits == 4, chip=chip)
    factors = [S((order, order), jnp.float32) for order in (n1, n2)]
    moved = tile.rows * n * (2 + (bits / 8 or 2))
    return Entry(
        "kron_quantize" if bits else "kron_matmul",
        f"{n1}·{n2}, {f'{bits}-bit codes' if bits else 'bfloat16'}, {tokens} tokens",
        f,
        (S((tokens, n), jnp.bfloat16), *factors),
        tile,
        int(moved),
        2 * tile.rows * n * (n1 + n2),
    )


def attention(chip_name: str, bits: int) -> Entry:
    """Decoding of Llama-3-8B over a full cache, with zero points where it holds codes.

    Bytes are those that TPUs move: rows of less than 128 lanes are stored in 128.
    """
    shape, chip = MODELS["llama-3-8b"], CHIPS[chip_name]
    heads, dim = shape.n_kv_heads, shape.head_dim
    width, size = (dim * bits // 8, 1) if bits else (dim, 2)
    rows = S((BATCH, heads, SLOTS, width), jnp.uint8 if bits else jnp.bfloat16)
    grid = [S(rows.shape[:3], d) if bits else None for d in (jnp.float32, jnp.int8)]
    bounds = S((BATCH,), jnp.int32)
    tile = tile_for("quant_decode_attention", chip, slots=SLOTS, bytes_of_slot=heads * width * size)
    f = functools.partial(
        quant_decode_attention, scale=0.1, k_bits=bits or 8, v_bits=bits or 8, chip=chip
    )
    q = S((BATCH, heads, shape.group, dim), jnp.bfloat16)
    return Entry(
        "quant_decode_attention",
        f"{f'{bits}-bit codes' if bits else 'bfloat16'}, {heads} kv heads of {dim}",
        f,
        (q, rows, rows, bounds, bounds, *grid, *grid),
        tile,
        2 * tile * heads * (-(-width // LANES) * LANES * size + (5 if bits else 0)),
        4 * tile * heads * shape.group * dim,
    )
