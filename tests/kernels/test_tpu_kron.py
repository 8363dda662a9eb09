"""The TPU's kernels for Kronecker products, interpreted: memory starts as NaN, races are found."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import kron_matmul, use
from pallas_kernels.chips import CHIPS
from pallas_kernels.hadamard import tpu as hadamard_tpu
from pallas_kernels.kron_matmul import reference, tpu
from pallas_kernels.tuning import KronTile
from tests.kernels.cases import build, kron, kron_quantize, names

INTERPRET = pltpu.InterpretParams(detect_races=True)
CHIP = CHIPS["v6e"]
FAST = set(
    "m1 12x128 no_left no_right zero_and_huge_rows float32 int8_two_leading_axes "
    "int8_clip int4 int4_clip int4_zero_and_huge_rows int4_float32 int3".split()
)
HADAMARDS = {"m7", "order_128"}
NOT_TAKEN = {
    "base_12_short": r"order 48 = 12·2\^2; at least 2\^6",
    "order_64": "7 tokens of 64 channels; whole runs of 128",
}
# What is tested is the result, so the compiler of the interpreter's program need not try hard.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(autouse=True)
def no_races(capfd):
    """The interpreter of JAX 0.10 prints a race and goes on."""
    yield
    out, err = capfd.readouterr()
    assert "RACE" not in (out + err).upper()


def run(op, case, module=tpu, **settings):
    settings = {"chip": CHIP, "interpret": INTERPRET, **case.static, **settings}
    f = functools.partial(getattr(module, op), **settings)
    return jax.jit(f, compiler_options=QUICK)(*case.args)


def of(op):
    return [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in names(op)
    ]


@pytest.mark.parametrize("name", of("kron_matmul"))
def test_products_are_those_of_float64(name):
    case = build("kron_matmul", name)
    case.check(run("kron_matmul", case))


@pytest.mark.parametrize("name", of("kron_quantize"))
def test_codes_are_those_of_float64(name):
    case = build("kron_quantize", name)
    case.check(run("kron_quantize", case))


LAYOUTS = [
    pytest.param({"n1": 8, "n2": 64}, 4, id="two runs in 128 lanes"),
    pytest.param({"n1": 4, "n2": 128}, 4, id="two registers exchange halves"),
    pytest.param({"n1": 4, "n2": 256}, 4, id="wide", marks=pytest.mark.slow),
    pytest.param({"n1": 6, "n2": 64}, 8, id="half a byte of lanes", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("settings", "c"), LAYOUTS)
def test_every_layout_gives_the_same_codes(settings, c):
    """Three tiles, the last of them not full."""
    case = kron_quantize(bits=4, packed=True, tokens=(70,), **settings)
    case.check(run("kron_quantize", case, tile=KronTile(32, c, 1024)))


@pytest.mark.parametrize(("settings", "c"), LAYOUTS[1:])
def test_every_layout_gives_the_same_floats(settings, c):
    case = kron(tokens=(70,), **settings)
    case.check(run("kron_matmul", case, tile=KronTile(32, c, 1024)))


def test_tokens_can_be_quantized_without_a_product():
    case = kron_quantize(bits=4, packed=True, n1=None, n2=None, channels=384)
    case.check(run("kron_quantize", case))


def test_a_mapped_axis_gives_what_a_leading_axis_gives():
    case = kron(n1=4, tokens=(2, 3))
    x, left, right = case.args
    f = functools.partial(tpu.kron_matmul, chip=CHIP, interpret=INTERPRET)
    f = jax.vmap(f, in_axes=(0, None, None))
    found = jax.jit(f, compiler_options=QUICK)(x, left, right)
    case.check(found)


def test_the_public_function_has_the_gradient_of_the_reference_and_is_compiled_once():
    x, left, right = kron(n1=4, dtype="float32", tokens=(3,)).args
    loss = lambda f: lambda x, left: jnp.sum(f(x, left, right) ** 2)  # noqa: E731
    expected = jax.grad(loss(reference.kron_matmul), argnums=(0, 1))(x, left)
    with use("v6e", interpret=INTERPRET):
        gradient = jax.jit(jax.grad(loss(kron_matmul), argnums=(0, 1)))
        for _ in range(2):
            found = gradient(x, left)
        assert gradient._cache_size() == 1
        assert "pallas_call" in str(jax.make_jaxpr(gradient)(x, left))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"n1": 24, "n2": 24}, "whole runs of 128"),
        ({"n1": 8, "n2": 96}, "a right factor of order 96"),
        ({"n1": 2, "n2": 1024}, "a right factor of order 1024"),
        ({"n1": 2, "n2": 128, "dtype": "float16"}, "activations of float16"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(settings, why):
    n1, n2 = settings["n1"], settings["n2"]
    x = jnp.zeros((7, n1 * n2), settings.get("dtype", "float32"))
    with pytest.raises(NotImplementedError, match=why):
        tpu.kron_matmul(x, jnp.eye(n1), jnp.eye(n2), chip=CHIP)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in HADAMARDS else pytest.mark.slow)
        for name in names("hadamard")
        if name not in NOT_TAKEN
    ],
)
def test_a_hadamard_matrix_is_that_of_float64(name):
    case = build("hadamard", name)
    case.check(run("hadamard", case, module=hadamard_tpu))


@pytest.mark.parametrize(("name", "why"), NOT_TAKEN.items())
def test_a_hadamard_matrix_of_few_lanes_is_refused(name, why):
    case = build("hadamard", name)
    with pytest.raises(NotImplementedError, match=why):
        hadamard_tpu.hadamard(*case.args, **case.static, chip=CHIP)
