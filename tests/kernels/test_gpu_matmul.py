"""Kernels of matrix products for Hopper, interpreted; `aot/test_gpu_matmul.py` compiles them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import trial, use
from pallas_kernels.chips import CHIPS
from pallas_kernels.compat import gpu_interpreter
from pallas_kernels.quant_matmul import mosaic_gpu, prepare_gpu, quant_matmul, reference
from pallas_kernels.weight import codes_of, dequantize, to_canonical
from tests.kernels import cases

H100 = CHIPS["h100"]
FEW = ("m1", "m130", "group_32", "channel", "tensor", "asymmetric", "w8_group", "w3")
MANY = sorted(set(cases.names("quant_matmul")) - set(FEW))


def run(name):
    case = cases.build("quant_matmul", name)
    kwargs = case.static | {"chip": H100, "interpret": gpu_interpreter(detect_races=True)}
    case.check(mosaic_gpu.quant_matmul(*case.args, **kwargs))


@pytest.mark.parametrize("name", FEW)
def test_the_interpreted_kernel_gives_the_product(name, capfd):
    run(name)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
def test_the_interpreted_kernel_gives_the_product_of_all_cases(name, capfd):
    if name.startswith("float32") or name == "lowest_codes":  # which has float32 activations
        with pytest.raises(NotImplementedError, match="activations of float32"):
            run(name)
    else:
        run(name)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "settings", [{}, {"group": None, "k": 200}, {"bits": 3, "symmetric": False}]
)
def test_a_prepared_weight_is_the_same_weight(settings):
    w = cases.matmul(n=201, **settings).args[1]
    prepared = prepare_gpu.prepare(w, H100)
    assert prepared.codes.dtype == jnp.int4 and prepared.codes.shape[0] == 256
    np.testing.assert_array_equal(codes_of(prepared), codes_of(w))
    np.testing.assert_array_equal(dequantize(prepared), dequantize(w))
    jax.tree.map(np.testing.assert_array_equal, to_canonical(prepared), w)
    assert prepare_gpu.prepare(prepared, H100) is prepared


def test_a_scale_for_all_channels_becomes_one_for_each():
    w = cases.matmul(group=None, per_tensor=True).args[1]
    prepared = prepare_gpu.prepare(w, H100)
    np.testing.assert_array_equal(dequantize(prepared), dequantize(w))
    assert to_canonical(prepared).scale.shape == (1, w.out_ch)


def test_another_chip_and_groups_that_fit_no_tile_are_refused():
    w = cases.matmul(k=96, group=24).args[1]
    with pytest.raises(NotImplementedError, match="groups of 24"):
        prepare_gpu.prepare(w, H100)
    with pytest.raises(NotImplementedError, match="v6e is no Hopper"):
        prepare_gpu.prepare(w, CHIPS["v6e"])


def test_the_public_function_has_the_gradient_of_the_reference_and_can_be_mapped():
    x, w = cases.matmul(tokens=(2, 1), k=128, n=64).args
    loss = lambda x: jnp.sum(quant_matmul(x, w).astype(jnp.float32) ** 2)  # noqa: E731
    expected, gradient = jax.vmap(lambda x: quant_matmul(x, w))(x), jax.grad(loss)(x)
    with use("h100", interpret=gpu_interpreter()):
        found = jax.vmap(lambda x: quant_matmul(x, w))(x)
        np.testing.assert_allclose(jax.grad(loss)(x), gradient, rtol=0.05, atol=0.5)
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.05)


def test_the_example_of_a_call_is_of_its_kind_and_small():
    x, w = cases.matmul(tokens=(5,), k=4096, n=4096, symmetric=False).args
    example = mosaic_gpu.example(x, w, jnp.bfloat16)
    small = example.args[1]
    assert small.codes.size < w.codes.size / 8 and small.group_size == 128
    assert example.tile.split == 2 and example.tile.tokens == 8
    kernel = lambda *args, **kwargs: mosaic_gpu.quant_matmul(  # noqa: E731
        *args, **kwargs, chip=H100, tile=example.tile, interpret=gpu_interpreter()
    )
    static = {"out_dtype": jnp.bfloat16}
    assert trial._problem(kernel, reference.quant_matmul, example, static) is None
