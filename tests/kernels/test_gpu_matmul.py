"""Kernels of matrix products for Hopper, interpreted; `aot/test_gpu_matmul.py` compiles them."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import trial, use
from pallas_kernels.chips import CHIPS
from pallas_kernels.compat import gpu_interpreter
from pallas_kernels.quant_matmul import mosaic_gpu, prepare_gpu, quant_matmul
from pallas_kernels.weight import Weight, codes_of, dequantize, to_canonical
from tests.kernels import cases

H100 = CHIPS["h100"]
MODULES = {
    "quant_matmul": mosaic_gpu,
    "quant_matmul_int": importlib.import_module("pallas_kernels.quant_matmul_int.mosaic_gpu"),
    "grouped_quant_matmul": importlib.import_module(
        "pallas_kernels.grouped_quant_matmul.mosaic_gpu"
    ),
}
# One of each path through the kernels; all others are slow.
FEW = {
    "quant_matmul": ("m130", "tensor", "asymmetric"),
    "quant_matmul_int": ("exact_w8_asymmetric", "both_asymmetric"),
    "grouped_quant_matmul": ("tokens_of_nobody",),
}
ALL = [(op, name) for op in MODULES for name in cases.names(op)]
REFUSED = {
    **{("quant_matmul", name): "activations of float32" for name in ("lowest_codes",)},
    **{(op, name): "activations of float32" for op, name in ALL if name.startswith("float32")},
    **{("quant_matmul_int", name): "groups of 32" for name in ("group_32", "asymmetric_group_32")},
}


def run(op, case):
    kwargs = case.static | {"chip": H100, "interpret": gpu_interpreter(detect_races=True)}
    case.check(getattr(MODULES[op], op)(*case.args, **kwargs))


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in FEW for name in FEW[op]])
def test_the_interpreted_kernel_gives_the_product(op, name, capfd):
    run(op, cases.build(op, name))
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("op", "name"), [x for x in ALL if x[1] not in FEW[x[0]]])
def test_the_interpreted_kernel_gives_the_product_of_all_cases(op, name, capfd):
    if (op, name) in REFUSED:
        with pytest.raises(NotImplementedError, match=REFUSED[op, name]):
            run(op, cases.build(op, name))
    else:
        run(op, cases.build(op, name))
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("group", [pytest.param(128, marks=pytest.mark.slow), None])
def test_programs_share_input_channels_where_tokens_are_few(group):
    settings = {"tokens": (1,), "k": 1024, "n": 64, "group": group}
    run("quant_matmul", cases.matmul(**settings))
    both = settings | {"symmetric": False, "x_symmetric": False}
    run("quant_matmul_int", cases.matmul_int(**both))
    assert (
        mosaic_gpu.tile_of(prepare_gpu.prepare(cases.matmul(**settings).args[1], H100), 1).split > 1
    )


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


CALLS = {
    "quant_matmul": lambda: cases.matmul(tokens=(5,), k=4096, n=4096, symmetric=False),
    "quant_matmul_int": lambda: cases.matmul_int(tokens=(5,), k=4096, n=4096, x_symmetric=False),
    "grouped_quant_matmul": lambda: cases.grouped(k=2048, n=1024),
}


@pytest.mark.slow
@pytest.mark.parametrize("op", CALLS)
def test_the_example_of_a_call_is_of_its_kind_small_and_passes(op):
    case, module = CALLS[op](), MODULES[op]
    example = module.EXAMPLES[op](*case.args, **case.static)
    weights = [next(x for x in args if isinstance(x, Weight)) for args in (case.args, example.args)]
    assert weights[1].codes.size < weights[0].codes.size / 2
    assert weights[1].group_size == weights[0].group_size
    assert example.tile.tokens == 8 and example.tile.stages > 1
    kernel = lambda *args, **kwargs: getattr(module, op)(  # noqa: E731
        *args, **kwargs, chip=H100, tile=example.tile, interpret=gpu_interpreter()
    )
    reference = importlib.import_module(f"pallas_kernels.{op}.reference")
    assert trial._problem(kernel, getattr(reference, op), example, case.static) is None


def test_few_tokens_of_a_second_tile_get_their_own_sums():
    """A trial has one token more than its tile, and a copy has the sums of several tiles."""
    module = MODULES["quant_matmul_int"]
    case = cases.matmul_int(tokens=(9,), k=256, n=128, symmetric=False)
    tile = module.tile_of(case.args[3], (128, 256), 8)
    assert tile.tokens == 8
    case.check(
        module.quant_matmul_int(
            *case.args, **case.static, chip=H100, tile=tile, interpret=gpu_interpreter()
        )
    )


@pytest.mark.parametrize("sizes", [(3, 0, 10, 7), (0, 0), (20,), (8, 8, 4, 0), (1, 0, 0, 1)])
def test_every_token_gets_a_row_of_its_own_expert(sizes):
    tokens, size = 20, 8
    plan = MODULES["grouped_quant_matmul"].tiles_of(jnp.asarray(sizes), tokens, size)
    owners = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.asarray(plan.row)[: len(owners)]
    assert len(set(rows.tolist())) == len(owners)
    np.testing.assert_array_equal(np.asarray(plan.expert)[rows // size], owners)
    np.testing.assert_array_equal(np.asarray(plan.token)[rows], np.arange(len(owners)))
    assert np.all(np.asarray(plan.row)[len(owners) :] == len(plan.token))
    used = sum(-(-n // size) for n in sizes)
    assert np.sum(np.asarray(plan.expert) >= 0) == used <= len(plan.expert)
