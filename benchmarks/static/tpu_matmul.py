"""The matrix products for TPUs whose static schedules are worth a table, with the tuned tiles."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.chips import CHIPS
from pallas_kernels.grouped_quant_matmul.tpu import grouped_quant_matmul
from pallas_kernels.quant_matmul.prepare import prepare
from pallas_kernels.quant_matmul.tpu import padded_shape, quant_matmul, sizes_of
from pallas_kernels.quant_matmul_int.tpu import quant_matmul_int
from pallas_kernels.shapes import MODELS
from pallas_kernels.tuning import MatmulTile, tile_for
from pallas_kernels.weight import Weight, canonical_weight

S = jax.ShapeDtypeStruct


class Entry(NamedTuple):
    """One kernel at one size, to be compiled for a chip.

    Attributes:
      kernel: how its name begins in what the compiler reports; XLA's own kernels stand beside it.
      case: what it multiplies, for the reader.
      function, arguments: of `pallas_kernels.aot.compile_for`.
      tile: of a step of the grid.
      step_bytes: what a step copies from the chip's memory.
      step_operations: of the matrix unit in a step, two for a product and its sum.
      unit: field of `Chip` with the operations a second of such products.
    """

    kernel: str
    case: str
    function: Callable
    arguments: tuple
    tile: MatmulTile
    step_bytes: int
    step_operations: int
    unit: str


def entries(chip_name: str) -> Iterator[Entry]:
    """The kernels of one chip, at sizes of Llama-3-8B and the awkward one of Qwen2.5-7B."""
    llama, qwen = (MODELS[name].products() for name in ("llama-3-8b", "qwen2.5-7b"))
    for m in (8, 16, 64, 512):
        yield floats(chip_name, m, *llama["attn_out"])
    yield floats(chip_name, 8, *llama["attn_out"], symmetric=False)
    yield floats(chip_name, 8, *llama["attn_out"], group=32)
    yield floats(chip_name, 8, *llama["attn_out"], bits=8)
    yield floats(chip_name, 8, *qwen["down"])
    for m in (8, 64, 512):
        for bits in (4, 8):
            yield integers(chip_name, m, *llama["attn_out"], bits=bits)
    yield integers(chip_name, 64, *llama["attn_out"], four=True)
    yield integers(chip_name, 8, *llama["attn_out"], group=128)
    yield experts(chip_name, 16, 8, *llama["attn_out"])


def floats(chip_name: str, m: int, k: int, n: int, **of_weight: Any) -> Entry:
    """`quant_matmul` of bfloat16 rows."""
    w, what = _weight(chip_name, k, n, **of_weight)
    tile = tile_for("quant_matmul", CHIPS[chip_name], m=m, **sizes_of(w))
    f = functools.partial(quant_matmul, out_dtype=jnp.bfloat16, chip=CHIPS[chip_name])
    return _entry("quant_matmul", f"A16 {what}", f, (S((m, k), jnp.bfloat16), w), tile, w, 2)


def integers(
    chip_name: str,
    m: int,
    k: int,
    n: int,
    four: bool = False,
    group: int | None = None,
    **of_weight: Any,
) -> Entry:
    """`quant_matmul_int` of int8 codes; `four` multiplies int4 by int4."""
    w, what = _weight(chip_name, k, n, group=group, **of_weight)
    tile = tile_for("quant_matmul_int", CHIPS[chip_name], m=m, **sizes_of(w))
    f = functools.partial(
        quant_matmul_int, out_dtype=jnp.bfloat16, chip=CHIPS[chip_name], four=four
    )
    arguments = (S((m, k), jnp.int8), S((m, 1), jnp.float32), None, w)
    width, unit = (0.5, "int4") if four else (1, "int8")
    what = f"A{4 if four else 8} {what}"
    return _entry("quant_matmul_int", what, f, arguments, tile, w, width, unit)


def experts(chip_name: str, m: int, count: int, k: int, n: int, **of_weight: Any) -> Entry:
    """`grouped_quant_matmul` of bfloat16 rows."""
    w, what = _weight(chip_name, k, n, experts=(count,), **of_weight)
    sizes = {"experts": count, **sizes_of(w)}
    tile = tile_for("grouped_quant_matmul", CHIPS[chip_name], m=m, **sizes)
    f = functools.partial(grouped_quant_matmul, out_dtype=jnp.bfloat16, chip=CHIPS[chip_name])
    arguments = (S((m, k), jnp.bfloat16), w, S((count,), jnp.int32))
    what = f"A16 {what}, {count} experts"
    return _entry("grouped_quant_matmul", what, f, arguments, tile, w, 2)


def _weight(
    chip_name: str,
    k: int,
    n: int,
    bits: int = 4,
    group: int | None = 128,
    symmetric: bool = True,
    experts: tuple[int, ...] = (),
) -> tuple[Weight, str]:
    """The shapes of a prepared weight, and its name."""
    grid = (*experts, k // (group or k), n)
    packed = S((*experts, k * bits // 8, n), jnp.uint8)
    zero = None if symmetric else S(grid, jnp.int8)

    def make(packed, scale, zero):
        return prepare(canonical_weight(packed, scale, zero, bits, k), CHIPS[chip_name])

    w = jax.eval_shape(make, packed, S(grid, jnp.float32), zero)
    name = f"W{bits} {k}×{n} {f'g{group}' if group else 'channel'}"
    return w, name if symmetric else f"{name} asymmetric"


def _entry(
    kernel: str,
    case: str,
    function: Callable,
    arguments: tuple,
    tile: MatmulTile,
    w: Weight,
    width: float,
    unit: str = "bf16",
) -> Entry:
    (k, _), (bm, bk, bn) = padded_shape(w), tile[:3]
    code = 0.5 if w.layout == "nibbles" else 1
    # Scales and zero points are copied once for all steps along the input channels.
    grid = w.scale.shape[-2] * bn * (4 if w.zero_point is None else 5) * bk / k
    m = arguments[0].shape[0]
    return Entry(
        kernel,
        f"{case}, {m} rows",
        function,
        arguments,
        tile,
        int(bk * bn * code + bm * bk * width + grid),
        2 * bm * bk * bn,
        unit,
    )
