"""The kernel as the TPU's own compiler takes it."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import quant_decode_attention
from pallas_kernels.aot import compile_for, missing

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(bool(missing("v6e")), reason=str(missing("v6e"))),
]


def structs(batch, heads, group, slots, dim, bits=None, zero=False, dtype="bfloat16"):
    """The arguments; `bits` None is a cache of floats."""
    of = jax.ShapeDtypeStruct
    rows = of((batch, heads, slots, dim), dtype)
    if bits:
        rows = of((batch, heads, slots, dim * bits // 8), jnp.uint8)
    grid = [bits and of(rows.shape[:3], jnp.float32), zero and of(rows.shape[:3], jnp.int8)]
    grid = [a or None for a in grid]
    bounds = of((batch,), jnp.int32)
    return of((batch, heads, group, dim), dtype), rows, rows, bounds, bounds, *grid, *grid


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize(
    ("args", "bits"),
    [
        (structs(2, 8, 4, 1024, 128, 8), 8),
        (structs(2, 8, 4, 1024, 128, 4, zero=True), 4),
        (structs(2, 2, 7, 1001, 64, 4, zero=True), 4),
        (structs(1, 4, 1, 100, 128, 8, zero=True), 8),
        (structs(2, 3, 3, 300, 64), 8),
        (structs(1, 2, 4, 256, 128, 4, True, "float32"), 4),
        (structs(1, 2, 4, 1, 128, dtype="float32"), 8),
    ],
)
def test_it_is_one_kernel(chip, args, bits):
    f = functools.partial(quant_decode_attention, scale=0.1, k_bits=bits, v_bits=bits)
    executable, _ = compile_for(chip, f, *args)
    assert executable.as_text().count('custom_call_target="tpu_custom_call"') == 1
