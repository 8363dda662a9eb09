"""The matrix products for TPUs, interpreted: memory starts as NaN, and races are looked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import quant_matmul as public
from pallas_kernels import use
from pallas_kernels.chips import CHIPS
from pallas_kernels.grouped_quant_matmul.tpu import grouped_quant_matmul, visits_of
from pallas_kernels.quant_matmul.prepare import prepare
from pallas_kernels.quant_matmul.tpu import quant_matmul
from pallas_kernels.quant_matmul_int import prepare as integer
from pallas_kernels.quant_matmul_int.tpu import quant_matmul_int
from pallas_kernels.tuning import MatmulTile
from pallas_kernels.weight import to_canonical
from tests.kernels import cases

INTERPRET = pltpu.InterpretParams(detect_races=True)
CHIP = CHIPS["v6e"]
FLOATS = functools.partial(quant_matmul, chip=CHIP, interpret=INTERPRET)
INTEGERS = functools.partial(quant_matmul_int, chip=CHIP, interpret=INTERPRET)
FEW = "m130 w3 group_64_n_not_even channel_k_not_even".split()


@pytest.fixture(autouse=True)
def no_race(capfd):
    """Versions of JAX before 0.12 only print that they found one."""
    yield
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def run(f, case, **settings):
    """The operation's kernel on a prepared weight, compiled once."""
    *args, w = case.args
    w = prepare(w, CHIP)
    return jax.jit(functools.partial(f, **case.static, **settings))(*args, w)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def some(op, few):
    """The operation's cases; those not named in `few` are for the slow run."""
    return [name if name in few else slow(name) for name in cases.names(op)]


@pytest.mark.parametrize("name", some("quant_matmul", FEW))
def test_floats_times_codes_with_the_tuned_tile(name):
    case = cases.build("quant_matmul", name)
    case.check(run(FLOATS, case))


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("asymmetric_group_32", "post"),
        slow("asymmetric_group_32", "pre"),
        ("w8_asymmetric", "pre"),
        slow("asymmetric_channel", "post"),
        ("zero_and_huge_rows_asymmetric", "post"),
    ],
)
def test_floats_times_codes_in_many_tiles(name, scale):
    case = cases.build("quant_matmul", name)
    case.check(run(FLOATS, case, tile=MatmulTile(8, 128, 128, scale)))


@pytest.mark.parametrize("scale", ["post", slow("pre")])
def test_a_group_of_several_tiles(scale):
    case = cases.matmul(k=512, n=128, group=256, symmetric=False)
    case.check(run(FLOATS, case, tile=MatmulTile(8, 128, 128, scale)))


INTEGER_FEW = "asymmetric channel_k_not_even".split()


@pytest.mark.parametrize("name", some("quant_matmul_int", INTEGER_FEW))
def test_codes_times_codes_with_the_tuned_tile(name):
    case = cases.build("quant_matmul_int", name)
    case.check(run(INTEGERS, case))


SHIFTED = [
    {"tokens": (9,), "group": None, "per_tensor": True, "bits": 3},
    {"tokens": (70,), "group": 32, "symmetric": False},
    {"tokens": (2, 1), "group": None, "symmetric": False, "unit": True, "bits": 8},
]


@pytest.mark.parametrize(
    ("settings", "shifted"),
    [
        (SHIFTED[0], False),
        (SHIFTED[1], True),
        slow(SHIFTED[2], True),
        slow(SHIFTED[0], True),
        slow(SHIFTED[1], False),
        slow(SHIFTED[2], False),
    ],
)
def test_codes_times_codes_in_many_tiles_with_and_without_the_sums_of_columns(settings, shifted):
    case = cases.matmul_int(k=256, x_symmetric=False, **settings)
    *args, w = case.args
    w = integer.prepare(w, CHIP, shifted=shifted)
    assert (w.sums is not None) == shifted
    f = functools.partial(INTEGERS, **case.static, tile=MatmulTile(32, 128, 128))
    case.check(jax.jit(f)(*args, w))


def test_int4_times_int4_is_only_for_weights_of_4_bits():
    case = cases.matmul_int(bits=8, group=None)
    with pytest.raises(NotImplementedError, match="a weight of at most 4 bits"):
        INTEGERS(*case.args, **case.static, four=True)


GROUPED_FEW = "ragged first_and_last_empty no_token_has_an_expert".split()


@pytest.mark.parametrize("name", some("grouped_quant_matmul", GROUPED_FEW))
def test_tokens_times_the_codes_of_their_experts(name):
    case = cases.build("grouped_quant_matmul", name)
    x, w, sizes = case.args
    tile = MatmulTile(8 if len(x) < 100 else 64, 128, 128)
    f = functools.partial(
        grouped_quant_matmul, chip=CHIP, interpret=INTERPRET, tile=tile, **case.static
    )
    case.check(jax.jit(f)(x, prepare(w, CHIP), sizes))


@pytest.mark.parametrize("sizes", [(3, 0, 10, 7), (0, 0, 0, 0), (0, 40, 0, 1), (17, 16, 0, 8)])
def test_only_experts_with_rows_are_read_and_each_row_is_visited_once(sizes):
    rows, size = 48, 8
    tile, expert, start, stop, first = map(
        np.asarray, visits_of(jnp.array(sizes), rows, rows, size)
    )
    owners = np.full(rows, -1)
    for t, e, a, b in zip(tile, expert, start, stop, strict=True):
        assert np.all(owners[t * size + a : t * size + b] == -1)
        owners[t * size + a : t * size + b] = e
    wanted = np.repeat(np.arange(4), sizes)
    assert owners.tolist() == [*wanted, *[-1] * (rows - len(wanted))]
    # A new expert is read only where the visit has rows, and every tile is begun once.
    idle = stop <= start
    assert np.all(expert[1:][idle[1:]] == expert[:-1][idle[1:]])
    assert np.all(np.diff(tile) >= 0) and tile[first == 1].tolist() == list(range(rows // size))


def test_a_leading_axis_of_rows_and_weights_is_mapped_over():
    made = [cases.matmul(tokens=(3,), k=256, n=128, symmetric=False, bits=b) for b in (4, 4)]
    x, w = jax.tree.map(lambda *a: jnp.stack(a), *(case.args for case in made))
    # The interpreter that looks for races counts the semantics of a mapped grid wrongly in 0.10.
    f = functools.partial(quant_matmul, chip=CHIP, interpret=True, out_dtype=x.dtype)
    for case, y in zip(made, jax.vmap(f)(x, w), strict=True):
        case.check(y)


def test_dispatch_takes_the_kernel_compiles_once_and_differentiates_the_reference():
    case = cases.matmul(tokens=(3,), k=256, n=128, dtype="float32")
    count = 0

    def loss(x, w):
        nonlocal count
        count += 1
        return jnp.sum(jnp.sin(public(x, w)))

    x, w = case.args
    wanted = jax.grad(loss)(x, w)
    with use("v6e", interpret=INTERPRET):
        assert "pallas_call" in str(jax.make_jaxpr(public)(x, w))
        gradient, count = jax.jit(jax.grad(loss)), 0
        found = [gradient(x, w), gradient(x + 0, w)]
    assert count == 1
    for y in found:
        np.testing.assert_allclose(y, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize(("in_ch", "out_ch", "group"), [(96, 5, 32), (129, 130, None)])
def test_preparing_a_weight_is_undone(bits, in_ch, out_ch, group):
    rng = np.random.default_rng(bits)
    w, _ = cases.weight(rng, in_ch, out_ch, bits, group, symmetric=bits % 2 == 0)
    prepared = prepare(w, CHIP)
    assert prepared.codes.shape[-1] % 128 == 0 and prepared.shape == w.shape
    jax.tree.map(np.testing.assert_array_equal, to_canonical(prepared), w)


def test_a_canonical_weight_of_an_odd_width_is_refused_for_the_reference_to_take():
    case = cases.matmul(bits=3)
    with pytest.raises(NotImplementedError, match="3 bits; prepare the weight"):
        FLOATS(*case.args, **case.static)
    with use("v6e", interpret=INTERPRET):
        case.check(public(*case.args))


def test_a_tile_that_fits_no_group_is_refused():
    case = cases.matmul(k=384, group=192)
    with pytest.raises(ValueError, match="128 input channels holds no whole groups of 192"):
        run(FLOATS, case, tile=MatmulTile(8, 128, 128))


def test_no_rows_give_no_rows():
    case = cases.matmul(tokens=(0,))
    assert FLOATS(*case.args, **case.static).shape == (0, 200)
