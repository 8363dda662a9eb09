"""The TPU's attention over a cache, interpreted: memory starts as NaN, races are found."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import quant_decode_attention, use
from pallas_kernels.chips import CHIPS
from pallas_kernels.quant_decode_attention import reference, tpu
from tests.kernels.cases import attention, build, names

INTERPRET = pltpu.InterpretParams(detect_races=True)
TILE = 128
REFUSED = "int3_asymmetric"
FAST = set("int8_asymmetric int4_asymmetric floats seven_queries_a_head one_slot float32".split())
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(autouse=True)
def no_races(capfd):
    """The interpreter of JAX 0.10 prints a race and goes on."""
    yield
    out, err = capfd.readouterr()
    assert "RACE" not in (out + err).upper()


def run(case, interpret=INTERPRET, tile=TILE):
    f = functools.partial(
        tpu.quant_decode_attention,
        **case.static,
        chip=CHIPS["v6e"],
        interpret=interpret,
        tile=tile,
    )
    return jax.jit(f, compiler_options=QUICK)(*case.args)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in names("quant_decode_attention")
        if name != REFUSED
    ],
)
def test_attention_is_that_of_float64(name):
    case = build("quant_decode_attention", name)
    case.check(run(case))


def test_tiles_that_no_sequence_sees_are_not_read():
    """A grid step beyond the last tile that is seen asks for that tile again."""
    case = attention(slots=1024, starts=(300, 0), stops=(420, 0))
    args = list(case.args)
    for i in (1, 2):  # codes that nobody sees may be anything; their steps are NaN already
        args[i] = np.where(np.isnan(args[5])[..., None], 255, args[i]).astype(np.uint8)
    starts, stops = case.args[3:5]
    tiles = [int(t) for b in range(2) for t in _tiles(starts[b], stops[b], 1024)]
    assert tiles == [2, 3, 3, 3, 3, 3, 3, 3, *[0] * 8]
    found = run(case.__class__(tuple(args), case.static, case.expected, case.check))
    case.check(found)
    assert not np.asarray(found[1]).any()


def _tiles(start, stop, slots):
    return [tpu.tile_of(start, stop, j, TILE, slots) for j in range(slots // TILE)]


def test_other_widths_are_refused():
    case = build("quant_decode_attention", REFUSED)
    with pytest.raises(NotImplementedError, match="3-bit k of 128 channels"):
        run(case)


def test_the_public_function_has_the_gradient_of_the_reference_and_is_compiled_once():
    case = attention(slots=64, starts=(0,), stops=(50,), heads=(1, 2), dtype="float32")
    q, *rest = case.args
    loss = lambda f: lambda q: jnp.sum(f(q, *rest, **case.static) ** 2)  # noqa: E731
    expected = jax.grad(loss(reference.quant_decode_attention))(q)
    with use("v6e", interpret=INTERPRET):
        gradient = jax.jit(jax.grad(loss(quant_decode_attention)))
        for _ in range(2):
            found = gradient(q)
        assert gradient._cache_size() == 1
        assert "pallas_call" in str(jax.make_jaxpr(gradient)(q))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_mapped_axis_gives_the_same():
    case = attention(slots=64, starts=(0, 3), stops=(50, 9), heads=(1, 2))
    f = functools.partial(
        tpu.quant_decode_attention, **case.static, chip=CHIPS["v6e"], interpret=INTERPRET
    )
    args = case.args[:6]  # no zero points
    each = [a[:, None] for a in args]
    call = lambda *a: f(*a, None, a[5], None)  # noqa: E731
    expected = call(*args)
    mapped = jax.jit(jax.vmap(call), compiler_options=QUICK)
    np.testing.assert_allclose(mapped(*each)[:, 0], expected, atol=1e-2)
