"""Attention over a cache for Hopper, compiled by ptxas: no spills, and no copy of the cache."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import quant_decode_attention
from pallas_kernels.aot import compile_for, missing
from pallas_kernels.chips import CHIPS

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(bool(missing("h100")), reason=str(missing("h100"))),
]
H100 = CHIPS["h100"]


def structs(batch, heads, group, slots, dim, bits=None, zero=False, dtype="bfloat16"):
    """The arguments; `bits` None is a cache of floats."""
    of = jax.ShapeDtypeStruct
    rows = of((batch, heads, slots, dim), dtype)
    grid = [None, None]
    if bits:
        rows = of((batch, heads, slots, dim * bits // 8), jnp.uint8)
        grid = [of(rows.shape[:3], jnp.float32), of(rows.shape[:3], jnp.int8) if zero else None]
    bounds = of((batch,), jnp.int32)
    return of((batch, heads, group, dim), dtype), rows, rows, bounds, bounds, *grid, *grid


def compiled(args, bits, folder):
    """The program, which has one kernel, and what ptxas says of that."""
    f = functools.partial(quant_decode_attention, scale=0.1, k_bits=bits, v_bits=bits)
    executable, report = compile_for("h100", f, *args, dump=folder)
    (kernel,) = report.kernels
    assert kernel.name == "quant_decode_attention"
    assert kernel.figures["spills"] == 0 and kernel.figures["shared"] <= H100.tile_bytes
    return executable, report, kernel.figures


@pytest.mark.parametrize(
    ("args", "bits"),
    [
        (structs(2, 8, 4, 4096, 128), 8),
        (structs(64, 8, 4, 4096, 128, 4, zero=True), 4),
        (structs(2, 8, 4, 1024, 128, 8), 8),
        (structs(2, 8, 4, 1024, 128, 8, zero=True), 8),
        (structs(1, 3, 3, 1001, 64, 4), 4),
        (structs(1, 4, 1, 100, 128, dtype="float16"), 8),
        (structs(1, 4, 1, 100, 128, 8, dtype="float16"), 8),
        # The most queries of a head, by its channels.
        (structs(1, 1, 64, 2048, 64, 4, zero=True), 4),
        (structs(1, 1, 32, 2048, 128, 8, zero=True), 8),
        (structs(1, 1, 16, 2048, 256, 4, zero=True), 4),
        (structs(1, 1, 16, 2048, 256), 8),
    ],
)
def test_it_is_one_kernel_without_spills(args, bits, tmp_path):
    _, _, figures = compiled(args, bits, tmp_path)
    assert figures["HGMMA"] > 0 and figures["UTMALDG"] > 0


@pytest.mark.parametrize(("bits", "zero"), [(4, True), (8, False), (None, False)])
def test_the_cache_is_not_copied_and_three_programs_share_a_multiprocessor(bits, zero, tmp_path):
    args = structs(3, 8, 4, 8192, 128, bits, zero)
    _, report, figures = compiled(args, bits or 8, tmp_path)
    assert report.temporaries < args[1].size * args[1].dtype.itemsize / 2
    assert 3 * 128 * figures["registers"] <= 65_536 and 3 * (figures["shared"] + 1024) <= 233_472
