"""The kernels for Hopper whose registers and instructions are worth a table, with their tiles."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.chips import CHIPS
from pallas_kernels.grouped_quant_matmul.mosaic_gpu import grouped_quant_matmul
from pallas_kernels.hadamard.mosaic_gpu import hadamard
from pallas_kernels.kron_matmul.mosaic_gpu import kron_quantize
from pallas_kernels.packing import packed_rows
from pallas_kernels.quant_decode_attention.mosaic_gpu import quant_decode_attention
from pallas_kernels.quant_matmul.mosaic_gpu import quant_matmul, tile_of
from pallas_kernels.quant_matmul.prepare_gpu import prepare
from pallas_kernels.quant_matmul_int import mosaic_gpu as integers
from pallas_kernels.shapes import MODELS
from pallas_kernels.tuning_hopper import attention
from pallas_kernels.weight import Weight, canonical_weight

S = jax.ShapeDtypeStruct


class Entry(NamedTuple):
    """One kernel at one size, to be compiled; see `tpu_matmul.Entry`."""

    kernel: str
    case: str
    function: Callable
    arguments: tuple


def entries(chip_name: str) -> Iterator[Entry]:
    """The kernels at sizes of Llama-3-8B."""
    chip = CHIPS[chip_name]
    k, n = MODELS["llama-3-8b"].products()["attn_out"]
    out = {"out_dtype": jnp.bfloat16, "chip": chip}
    settings = ((4, 128, True), (4, 128, False), (4, 32, True), (8, None, True), (8, 128, True))
    for m in (1, 16, 64, 256):
        for bits, group, symmetric in settings:
            w, what = _weight(chip_name, k, n, bits, group, symmetric)
            f = functools.partial(quant_matmul, **out)
            case = f"A16 {what}, {m} tokens, {_tile(tile_of(w, m))}"
            yield Entry("quant_matmul", case, f, (S((m, k), jnp.bfloat16), w))
    for m in (1, 16, 256):
        for bits, group, symmetric in ((8, None, True), (8, None, False), (4, 128, True)):
            w, what = _weight(chip_name, k, n, bits, group, symmetric, sums=not symmetric)
            zero = None if symmetric else S((m, 1), jnp.int8)
            f = functools.partial(integers.quant_matmul_int, **out)
            case = f"A8 {what}, {m} tokens, {_tile(integers.tile_of(w, w.codes.shape, m))}"
            arguments = (S((m, k), jnp.int8), S((m, 1), jnp.float32), zero, w)
            yield Entry("quant_matmul_int", case, f, arguments)
    w, what = _weight(chip_name, k, n, 4, 128, True, experts=(8,))
    f = functools.partial(grouped_quant_matmul, **out)
    arguments = (S((16, k), jnp.bfloat16), w, S((8,), jnp.int32))
    yield Entry("grouped_quant_matmul", f"A16 {what}, 8 experts, 16 tokens", f, arguments)
    for n1, n2 in ((64, 64), (112, 128)):
        for packed in (True, False):
            bits = 4 if packed else 8
            f = functools.partial(kron_quantize, clip=None, bits=bits, packed=packed, chip=chip)
            factors = [S((order, order), jnp.bfloat16) for order in (n1, n2)]
            arguments = (S((2048, n1 * n2), jnp.bfloat16), *factors)
            yield Entry("kron_quantize", f"{n1}×{n2} to int{bits}", f, arguments)
    f = functools.partial(hadamard, base=None, doublings=12, inner=1, chip=chip)
    yield Entry("kron_matmul", "Hadamard of order 4096", f, (S((2048, 4096), jnp.bfloat16),))
    for batch in (1, 64):
        for bits, zero in ((4, True), (8, False), (None, False)):
            yield _attention(chip_name, batch, 4096, bits, zero)


def _attention(chip_name: str, batch: int, slots: int, bits: int | None, zero: bool) -> Entry:
    """One query a sequence over a cache; `bits` None is one of floats."""
    model = MODELS["llama-3-8b"]
    heads, group, dim = model.n_kv_heads, model.group, model.head_dim
    shape, bounds = (batch, heads, slots), S((batch,), jnp.int32)
    rows, step, shift = S((*shape, dim), jnp.bfloat16), None, None
    if bits:
        rows, step = S((*shape, packed_rows(dim, bits)), jnp.uint8), S(shape, jnp.float32)
        shift = S(shape, jnp.int8) if zero else None
    f = functools.partial(
        quant_decode_attention,
        scale=dim**-0.5,
        k_bits=bits or 8,
        v_bits=bits or 8,
        chip=CHIPS[chip_name],
    )
    tile = attention(batch * heads, group, slots, dim, bits or 16, bits or 16)
    what = f"{bits}-bit codes{' asymmetric' * zero}" if bits else "bfloat16"
    case = (
        f"{what}, {heads} kv heads of {dim}, {batch} sequences of {slots} slots, "
        f"tile {tile.slots}, {tile.stages} stages, split {tile.split}"
    )
    q = S((batch, heads, group, dim), jnp.bfloat16)
    arguments = (q, rows, rows, bounds, bounds, step, shift, step, shift)
    return Entry("quant_decode_attention", case, f, arguments)


def _weight(
    chip_name: str,
    k: int,
    n: int,
    bits: int,
    group: int | None,
    symmetric: bool,
    experts: tuple[int, ...] = (),
    sums: bool = False,
) -> tuple[Weight, str]:
    """The shapes of a prepared weight, and its name."""
    grid = (*experts, k // (group or k), n)
    zero = None if symmetric else S(grid, jnp.int8)

    def make(packed, scale, zero):
        return prepare(canonical_weight(packed, scale, zero, bits, k), CHIPS[chip_name], sums)

    packed = S((*experts, k * bits // 8, n), jnp.uint8)
    w = jax.eval_shape(make, packed, S(grid, jnp.float32), zero)
    name = f"W{bits} {k}×{n} {f'g{group}' if group else 'channel'}"
    return w, name if symmetric else f"{name} asymmetric"


def _tile(tile: Any) -> str:
    return (
        f"tile {tile.out}×{tile.tokens}×{tile.k}·{tile.parts}, {tile.stages} stages, "
        f"split {tile.split}"
    )
