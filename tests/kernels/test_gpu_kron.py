"""Kronecker and Hadamard transforms for Hopper, interpreted."""

import importlib

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import trial
from pallas_kernels.chips import CHIPS
from pallas_kernels.compat import gpu_interpreter
from pallas_kernels.hadamard import mosaic_gpu as hadamard_gpu
from pallas_kernels.kron_matmul import mosaic_gpu as kron_gpu
from tests.kernels import cases

H100 = CHIPS["h100"]
MODULES = {"kron_matmul": kron_gpu, "kron_quantize": kron_gpu, "hadamard": hadamard_gpu}
FEW = {
    "kron_matmul": ("64x64", "no_left", "zero_and_huge_rows"),
    "kron_quantize": ("int8_32x128", "int4_64x64", "int4_clip", "int8_no_left"),
    "hadamard": ("order_4096", "base_12", "heads"),
}
REFUSED = {"16x256", "int8_16x256", "base_12_short"}
ALL = [(op, name) for op in MODULES for name in cases.names(op) if name not in FEW[op]]


def run(op, name):
    case = cases.build(op, name)
    kwargs = case.static | {"chip": H100, "interpret": gpu_interpreter(detect_races=True)}
    case.check(getattr(MODULES[op], op)(*case.args, **kwargs))


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in FEW for name in FEW[op]])
def test_the_interpreted_kernel_gives_the_transform(op, name, capfd):
    run(op, name)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("op", "name"), ALL)
def test_the_interpreted_kernel_gives_the_transform_of_all_cases(op, name, capfd):
    if name in REFUSED or "float32" in name:
        with pytest.raises(NotImplementedError):
            run(op, name)
    else:
        run(op, name)
    assert "RACE" not in capfd.readouterr().out


def test_programs_walk_over_several_tokens(monkeypatch):
    monkeypatch.setattr(
        kron_gpu, "PROCESSORS", 1
    )  # two programs, three tokens each, one of padding
    case = cases.kron_quantize(tokens=(5,), n1=2, n2=64, bits=4, packed=True)
    kwargs = case.static | {"chip": H100, "interpret": gpu_interpreter()}
    found = kron_gpu.kron_quantize(*case.args, **kwargs)
    case.check(found)
    assert found[0].shape == (5, 64)


@pytest.mark.parametrize(
    ("order", "doublings", "inner", "left", "right"),
    [(1, 12, 1, 64, 64), (1, 7, 1, None, 128), (28, 9, 1, 112, 128), (1, 3, 128, 8, None)],
)
def test_the_factors_make_the_matrix_and_need_little_padding(order, doublings, inner, left, right):
    base = None if order == 1 else np.ones((order, order), np.int8)
    found = hadamard_gpu.factors(base, doublings, inner)
    assert [None if m is None else len(m) for m in found] == [left, right]


@pytest.mark.parametrize("op", ["kron_quantize", "hadamard"])
def test_the_example_of_a_call_passes(op):
    name = {"kron_quantize": "int4_64x64", "hadamard": "heads"}[op]
    case = cases.build(op, name)
    example = MODULES[op].EXAMPLES[op](*case.args, **case.static)
    kernel = lambda *args, **kwargs: getattr(MODULES[op], op)(  # noqa: E731
        *args, **kwargs, chip=H100, tile=example.tile, interpret=gpu_interpreter()
    )
    package = "hadamard" if op == "hadamard" else "kron_matmul"
    reference = getattr(importlib.import_module(f"pallas_kernels.{package}.reference"), op)
    assert trial._problem(kernel, reference, example, case.static) is None


def test_factors_that_do_not_fit_are_refused():
    x = jnp.zeros((3, 256 * 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="factors of orders 256 and 128"):
        kron_gpu.form_of(x, jnp.zeros((256, 256)), jnp.zeros((128, 128)), H100)
