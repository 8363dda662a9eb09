"""Kronecker transforms for Hopper, compiled by ptxas."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.aot import compile_for, missing
from pallas_kernels.chips import CHIPS
from pallas_kernels.hadamard import mosaic_gpu as hadamard_gpu
from pallas_kernels.kron_matmul import mosaic_gpu as kron_gpu

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(bool(missing("h100")), reason=str(missing("h100"))),
]
H100 = CHIPS["h100"]


def only_kernel(f, *args, folder):
    """What ptxas says of the one kernel of a program."""
    (kernel,) = compile_for("h100", f, *args, dump=folder).report.kernels
    assert kernel.figures["spills"] == 0 and kernel.figures["shared"] <= H100.tile_bytes
    return kernel


@pytest.mark.parametrize("tokens", [16, 2048])
@pytest.mark.parametrize(("n1", "n2"), [(64, 64), (112, 128)])
@pytest.mark.parametrize("packed", [False, True])
def test_the_fused_quantizer_compiles_without_spills(n1, n2, packed, tokens, tmp_path):
    f = functools.partial(kron_gpu.kron_quantize, bits=4 if packed else 8, packed=packed, chip=H100)
    x = jax.ShapeDtypeStruct((tokens, n1 * n2), jnp.bfloat16)
    factors = [jax.ShapeDtypeStruct((n, n), jnp.float32) for n in (n1, n2)]
    clip = jax.ShapeDtypeStruct((2,), jnp.float32)
    assert only_kernel(f, x, *factors, clip, folder=tmp_path).name == "kron_quantize"


@pytest.mark.parametrize(("doublings", "inner"), [(12, 1), (5, 128)])
def test_the_hadamard_transform_compiles_without_spills(doublings, inner, tmp_path):
    f = functools.partial(
        hadamard_gpu.hadamard, base=None, doublings=doublings, inner=inner, chip=H100
    )
    kernel = only_kernel(f, jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16), folder=tmp_path)
    assert kernel.name == "kron_matmul"
