"""The kernels as the TPU's own compiler takes them."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import hadamard, kron_matmul, kron_quantize
from pallas_kernels.aot import compile_for, missing
from tests.kernels.cases import paley

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(bool(missing("v6e")), reason=str(missing("v6e"))),
]
INT4 = functools.partial(kron_quantize, bits=4, packed=True)


def structs(n1, n2, tokens, dtype="bfloat16", channels=None):
    square = lambda n: n and jax.ShapeDtypeStruct((n, n), jnp.float32)  # noqa: E731
    channels = channels or n1 * n2
    return jax.ShapeDtypeStruct((tokens, channels), dtype), square(n1), square(n2)


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize(
    ("f", "args"),
    [
        (kron_matmul, structs(32, 128, 1)),
        (kron_matmul, structs(32, 128, 256, "float32")),
        (kron_quantize, structs(16, 256, 256)),
        (INT4, structs(12, 64, 128)),
        (INT4, structs(8, 128, 300)),  # the last tile is not full
        (INT4, structs(7, 128, 64)),  # nor the last byte of lanes
        (INT4, structs(None, 128, 128, channels=1024)),
        (kron_matmul, structs(8, None, 128, channels=1024)),
        (INT4, structs(112, 128, 64)),
    ],
)
def test_it_is_one_kernel(chip, f, args):
    x, *factors = args

    def call(x, factors):
        return f(x, *factors)

    executable, _ = compile_for(chip, call, x, factors)
    assert executable.as_text().count('custom_call_target="tpu_custom_call"') == 1


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_clip_factors_are_scalars_of_the_kernel(chip):
    clip = jax.ShapeDtypeStruct((2,), jnp.float32)
    executable, _ = compile_for(chip, INT4, *structs(32, 128, 64), clip)
    assert executable.as_text().count('custom_call_target="tpu_custom_call"') == 1


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_so_is_a_hadamard_matrix(chip):
    f = functools.partial(hadamard, base=paley(11), doublings=6, inner=1)
    executable, _ = compile_for(chip, f, structs(12, 64, 64)[0])
    assert executable.as_text().count('custom_call_target="tpu_custom_call"') == 1
