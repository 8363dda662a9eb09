"""Hopper's attention over a cache, interpreted; `aot/test_gpu_attention.py` compiles it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quant_decode_attention, trial, use
from pallas_kernels.chips import CHIPS
from pallas_kernels.compat import gpu_interpreter
from pallas_kernels.quant_decode_attention import mosaic_gpu, reference
from pallas_kernels.tuning_hopper import Attention
from tests.kernels import cases

H100 = CHIPS["h100"]
REFUSED = {
    "int3_asymmetric": "codes of 3 bits",
    **{name: "queries of float32" for name in ("float32", "float32_int4", "float32_floats")},
}
ALL = [name for name in cases.names("quant_decode_attention") if name not in REFUSED]
SMALL = {"heads": (1, 3), "slots": 150, "starts": (3, 130, 9), "stops": (150, 131, 9)}
FEW = {  # one of each path through the kernel; the others are slow
    "int4": {"bits": 4, "symmetric": False},
    "int8": {"bits": 8, "dim": 64},
    "floats": {"bits": None, "dim": 64},
}
TILES = {"whole": Attention(64, 2, 1), "shared": Attention(64, 2, 2)}


@pytest.fixture(autouse=True)
def no_races(capfd):
    """The interpreter of JAX 0.10 prints a race and goes on."""
    yield
    out, err = capfd.readouterr()
    assert "RACE" not in (out + err).upper()


def run(case, tile=None, interpret=None):
    return mosaic_gpu.quant_decode_attention(
        *case.args,
        **case.static,
        chip=H100,
        tile=tile,
        interpret=interpret or gpu_interpreter(detect_races=True),
    )


@pytest.mark.parametrize(
    ("name", "tile"), [("int4", "shared"), ("int8", "whole"), ("floats", "shared")]
)
def test_the_interpreted_kernel_gives_attention(name, tile):
    """Over several tiles, of which some are partly seen, one slot is, or none."""
    case = cases.attention(**SMALL, **FEW[name])
    found = run(case, TILES[tile])
    case.check(found)
    assert not np.asarray(found[2]).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_the_interpreted_kernel_gives_attention_of_all_cases(name):
    case = cases.build("quant_decode_attention", name)
    case.check(run(case))


@pytest.mark.slow
def test_keys_and_values_may_be_stored_in_different_ways():
    settings = {"starts": (3,), "stops": (90,), "slots": 100, "heads": (1, 9), "dim": 64}
    fours, floats = (cases.attention(bits=b, symmetric=False, **settings) for b in (4, None))
    q, k, _, starts, stops, k_scale, k_zero, *_ = fours.args
    args = (q, k, floats.args[2], starts, stops, k_scale, k_zero, None, None)
    expected = reference.quant_decode_attention(*args, **fours.static)
    case = cases.Case(args, fours.static, expected, None)
    np.testing.assert_allclose(
        np.asarray(run(case), np.float32), np.asarray(expected, np.float32), atol=0.02
    )


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_does_not_take_is_refused(name):
    with pytest.raises(NotImplementedError, match=REFUSED[name]):
        run(cases.build("quant_decode_attention", name))


@pytest.mark.parametrize(
    ("heads", "dim", "reason"), [((1, 2), 80, "80 channels"), ((1, 33), 128, "33 queries of 128")]
)
def test_heads_that_fit_no_tile_are_refused(heads, dim, reason):
    case = cases.attention(heads=heads, dim=dim, slots=8, starts=(0,), stops=(8,), bits=None)
    with pytest.raises(NotImplementedError, match=reason):
        run(case)


def test_the_public_function_has_the_gradient_of_the_reference_and_can_be_mapped():
    case = cases.attention(heads=(1, 2), slots=64, dim=64, starts=(0, 3), stops=(50, 9), bits=None)
    q, k, v, starts, stops, *_ = case.args
    f = functools.partial(quant_decode_attention, scale=0.1)
    loss = lambda q: jnp.sum(f(q, k, v, starts, stops).astype(jnp.float32) ** 2)  # noqa: E731
    expected, y = jax.grad(loss)(q), f(q, k, v, starts, stops)
    each = [a[:, None] for a in (q, k, v, starts, stops)]
    with use("h100", interpret=gpu_interpreter()):
        found = jax.grad(loss)(q)
        mapped = jax.vmap(f)(*each)[:, 0]
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(expected, np.float32), atol=0.02
    )
    np.testing.assert_allclose(np.asarray(mapped, np.float32), np.asarray(y, np.float32), atol=0.02)


@pytest.mark.parametrize("name", [pytest.param("int4", marks=pytest.mark.slow), "floats"])
def test_the_example_of_a_call_is_small_and_passes(name):
    case = cases.attention(heads=(4, 3), slots=4096, starts=(0,), stops=(4000,), **FEW[name])
    example = mosaic_gpu.EXAMPLES["quant_decode_attention"](*case.args, **case.static)
    assert example.args[1].size < case.args[1].size / 10 and example.tile.split == 2
    kernel = functools.partial(
        mosaic_gpu.quant_decode_attention,
        chip=H100,
        tile=example.tile,
        interpret=gpu_interpreter(),
    )
    f = reference.quant_decode_attention
    assert trial._problem(kernel, f, example, case.static) is None


def test_programs_share_a_sequence_only_where_there_are_few():
    one, many = (mosaic_gpu.attention(pairs, 4, 4096, 128, 4, 4) for pairs in (8, 64 * 8))
    assert one.split == 32 and many.split == 1
