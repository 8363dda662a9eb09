"""Matrix products for Hopper, compiled by ptxas: no spills, and within its shared memory."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import quant_matmul
from pallas_kernels.aot import compile_for, missing
from pallas_kernels.chips import CHIPS
from pallas_kernels.grouped_quant_matmul import mosaic_gpu as grouped_gpu
from pallas_kernels.quant_matmul import prepare_gpu
from pallas_kernels.quant_matmul_int import mosaic_gpu as int_gpu
from pallas_kernels.weight import Weight

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(bool(missing("h100")), reason=str(missing("h100"))),
]
K, N = 4096, 4096
H100 = CHIPS["h100"]
mosaic_int = functools.partial(int_gpu.quant_matmul_int, out_dtype=jnp.bfloat16, chip=H100)
mosaic_grouped = functools.partial(
    grouped_gpu.grouped_quant_matmul, out_dtype=jnp.bfloat16, chip=H100
)


def prepared(bits, group, symmetric=True, sums=False, experts=()):
    """Shapes and dtypes of a prepared weight."""

    def make():
        grid = (*experts, K // group, N)
        zero = None if symmetric else jnp.zeros(grid, jnp.int8)
        codes = jnp.zeros((*experts, K * bits // 8, N), jnp.uint8)
        w = Weight(codes, jnp.zeros(grid), zero, None, bits, K, N, group)
        return prepare_gpu.prepare(w, H100, sums)

    return jax.eval_shape(make)


def only_kernel(f, *args, folder):
    """What ptxas says of the one kernel of a program."""
    (kernel,) = compile_for("h100", f, *args, dump=folder).report.kernels
    assert kernel.figures["spills"] == 0 and kernel.figures["shared"] <= H100.tile_bytes
    return kernel


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [
        (4, 128, True),
        (4, 128, False),
        (4, 32, False),
        (4, 32, True),
        (4, K, True),
        (8, 64, True),
        (8, K, False),
    ],
)
def test_weight_only_products_compile_without_spills(bits, group, symmetric, tokens, tmp_path):
    x = jax.ShapeDtypeStruct((tokens, K), jnp.bfloat16)
    kernel = only_kernel(quant_matmul, x, prepared(bits, group, symmetric), folder=tmp_path)
    assert kernel.name == "quant_matmul"
    if "HGMMA" in kernel.figures:  # nvdisasm is there
        assert kernel.figures["HGMMA"] > 0 and kernel.figures["UTMALDG"] > 0
        assert kernel.figures["I2F"] <= 4  # codes are widened by logic; zero points may not be


@pytest.mark.parametrize("tokens", [1, 256])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(8, K, True), (8, K, False), (4, K, True), (4, 128, False)]
)
def test_integer_products_compile_without_spills(bits, group, symmetric, tokens, tmp_path):
    codes = jax.ShapeDtypeStruct((tokens, K), jnp.int8)
    scale = jax.ShapeDtypeStruct((tokens, 1), jnp.float32)
    zero = None if symmetric else jax.ShapeDtypeStruct((tokens, 1), jnp.int8)
    w = prepared(bits, group, symmetric, sums=not symmetric)
    kernel = only_kernel(mosaic_int, codes, scale, zero, w, folder=tmp_path)
    assert kernel.name == "quant_matmul_int"
    if "IGMMA" in kernel.figures:
        assert kernel.figures["IGMMA"] > 0 and kernel.figures["HGMMA"] == 0


@pytest.mark.parametrize("tokens", [16, 512])
def test_products_with_experts_compile_without_spills(tokens, tmp_path):
    x = jax.ShapeDtypeStruct((tokens, K), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((8,), jnp.int32)
    w = prepared(4, 128, symmetric=False, experts=(8,))
    kernel = only_kernel(mosaic_grouped, x, w, sizes, folder=tmp_path)
    assert kernel.name == "grouped_quant_matmul"
