"""Matrix products for Hopper, compiled by ptxas: no spills, and within its shared memory."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import quant_matmul
from pallas_kernels.aot import compile_for, missing
from pallas_kernels.chips import CHIPS
from pallas_kernels.quant_matmul import prepare_gpu
from pallas_kernels.weight import Weight

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(bool(missing("h100")), reason=str(missing("h100"))),
]
K, N = 4096, 4096


def prepared(bits, group, symmetric=True, sums=False, experts=()):
    """Shapes and dtypes of a prepared weight."""

    def make():
        grid = (*experts, K // group, N)
        zero = None if symmetric else jnp.zeros(grid, jnp.int8)
        codes = jnp.zeros((*experts, K * bits // 8, N), jnp.uint8)
        w = Weight(codes, jnp.zeros(grid), zero, None, bits, K, N, group)
        return prepare_gpu.prepare(w, CHIPS["h100"], sums)

    return jax.eval_shape(make)


def only_kernel(f, *args, folder):
    """What ptxas says of the one kernel of a program."""
    (kernel,) = compile_for("h100", f, *args, dump=folder).report.kernels
    assert kernel.figures["spills"] == 0 and kernel.figures["shared"] <= CHIPS["h100"].tile_bytes
    return kernel


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [(4, 128, True), (4, 128, False), (4, 32, False), (4, K, True), (8, 64, True), (8, K, False)],
)
def test_weight_only_products_compile_without_spills(bits, group, symmetric, tokens, tmp_path):
    x = jax.ShapeDtypeStruct((tokens, K), jnp.bfloat16)
    kernel = only_kernel(quant_matmul, x, prepared(bits, group, symmetric), folder=tmp_path)
    assert kernel.name == "quant_matmul"
    if "HGMMA" in kernel.figures:  # nvdisasm is there
        assert kernel.figures["HGMMA"] > 0 and kernel.figures["UTMALDG"] > 0
        assert kernel.figures["I2F"] <= 4  # codes are widened by logic; zero points may not be
