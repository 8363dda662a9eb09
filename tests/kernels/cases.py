"""The cases that every implementation of an operation runs, with operands and a float64 result.

    for name in names("quant_matmul"):
        case = build("quant_matmul", name)
        case.check(implementation(*case.args, **case.static, chip=..., interpret=...))

`args` are those of the public function, weights in the canonical form; `static` are its keywords.
A case that an implementation does not take is for its tests to leave out by name. A builder may be
called with settings of one's own, too: ``matmul(tokens=(3,), k=1024, n=256)``.

How close: float32 1e-5, bfloat16 5e-3 of the largest entry of the same row, so that a row of zeros
gives zeros exactly, and beside that half a step of a bfloat16 result; integer sums are exact before
they are scaled (2e-6); codes are equal, or off by one in at most 0.1 % of float32 and 0.5 % of
bfloat16 entries, where sums in another order tip a tie.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import Weight, canonical_weight
from pallas_kernels.packing import pack, pack_rows
from tests.kernels import oracles

CLOSE = {"float32": 1e-5, "bfloat16": 5e-3}
TIES = {"float32": 1e-3, "bfloat16": 5e-3}


@dataclasses.dataclass(frozen=True)
class Case:
    """Operands of one call, the result in float64 and the check of a result against it."""

    args: tuple
    static: dict[str, Any]
    expected: Any
    check: Callable[[Any], None]


def build(op: str, name: str) -> Case:
    """The operands and the expected result of a case."""
    return CASES[op][name]()


def names(op: str) -> list[str]:
    """The cases of an operation, for `pytest.mark.parametrize`."""
    return list(CASES[op])


def check_rows(expected: np.ndarray, tolerance: float, dtype: str, found: Any) -> None:
    """Fails where an entry is further off than `tolerance` of the largest of its row.

    An entry of bfloat16 may besides be off by its own rounding, 2^−8 of it.
    """
    assert found.dtype == dtype and found.shape == expected.shape
    found = np.asarray(found, np.float64)
    assert np.all(np.isfinite(found))
    rounding = 2**-8 * np.abs(expected) if dtype == "bfloat16" else 0.0
    excess = (np.abs(found - expected) - rounding).max(-1, initial=0)
    limit = tolerance * np.abs(expected).max(-1, initial=0)
    worst = np.unravel_index(np.argmax(excess - limit), limit.shape) if limit.size else ()
    assert np.all(excess <= limit), f"row {worst}: off by {excess[worst]}, allowed {limit[worst]}"


# ---------------------------------------------------------------- weights and activations


def codes_of(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """Signed codes over their whole range."""
    return rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)


def weight(
    rng: np.random.Generator,
    k: int,
    n: int,
    bits: int = 4,
    group: int | None = 128,
    symmetric: bool = True,
    per_tensor: bool = False,
    experts: tuple[int, ...] = (),
    lowest: bool = False,
    unit: bool = False,
) -> tuple[Weight, np.ndarray]:
    """A canonical weight and what it stands for; group None is one scale a channel."""
    codes = codes_of(rng, (*experts, k, n), bits)
    if lowest:
        codes = np.full_like(codes, -(2 ** (bits - 1)))
    grid = (*experts, k // (group or k), 1 if per_tensor else n)
    scale = np.ones(grid) if unit else rng.uniform(0.01, 0.1, grid)
    scale = scale.astype(np.float32)
    zero = None if symmetric else codes_of(rng, grid, bits)
    packed = np.asarray(pack(codes, bits))
    w = canonical_weight(packed, scale, zero, bits, k)
    return w, oracles.dense_weight(codes, scale, zero)


def activations(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: str, special: bool = False
) -> Any:
    """Normal values; `special` adds outliers, a row of zeros and a huge value in the next."""
    x = rng.standard_normal(shape)
    if special:
        x[..., ::17] *= 20
        x[0], x[1, 3] = 0, 1e4
    return jnp.asarray(x, dtype)


# ---------------------------------------------------------------- the operations


def matmul(
    tokens: tuple[int, ...] = (7,),
    k: int = 384,
    n: int = 200,
    dtype: str = "bfloat16",
    out_dtype: str | None = None,
    special: bool = False,
    **of_weight: Any,
) -> Case:
    """`quant_matmul`."""
    rng = np.random.default_rng(k + n)
    w, dense = weight(rng, k, n, **of_weight)
    x = activations(rng, (*tokens, k), dtype, special)
    expected = np.asarray(x, np.float64) @ dense
    out = out_dtype or dtype
    check = functools.partial(check_rows, expected, CLOSE[dtype], out)
    return Case((x, w), {"out_dtype": jnp.dtype(out)}, expected, check)


def matmul_int(
    tokens: tuple[int, ...] = (7,),
    k: int = 384,
    n: int = 200,
    x_bits: int = 8,
    x_symmetric: bool = True,
    shared: bool = False,
    out_dtype: str = "float32",
    unit: bool = False,
    **of_weight: Any,
) -> Case:
    """`quant_matmul_int`; `unit` scales leave the integers, which must be exact."""
    rng = np.random.default_rng(k + n)
    w, dense = weight(rng, k, n, unit=unit, **of_weight)
    codes = codes_of(rng, (*tokens, k), x_bits)
    if len(codes) > 1:
        codes[0], codes[1] = 0, -(2 ** (x_bits - 1))
    grid = (1,) if shared else (*tokens, 1)
    scale = (np.ones(grid) if unit else rng.uniform(0.01, 0.1, grid)).astype(np.float32)
    zero = None if x_symmetric else codes_of(rng, grid, x_bits)
    expected = (codes.astype(np.float64) - (0 if zero is None else zero)) * scale @ dense
    tolerance = 0.0 if unit else 2e-6 if out_dtype == "float32" else CLOSE[out_dtype]
    check = functools.partial(check_rows, expected, tolerance, out_dtype)
    return Case((codes, scale, zero, w), {"out_dtype": jnp.dtype(out_dtype)}, expected, check)


def grouped(
    sizes: tuple[int, ...] = (3, 0, 10, 7),
    tokens: int = 20,
    k: int = 256,
    n: int = 200,
    dtype: str = "bfloat16",
    **of_weight: Any,
) -> Case:
    """`grouped_quant_matmul`; tokens beyond the sum of the sizes belong to nobody."""
    rng = np.random.default_rng(sum(sizes))
    w, dense = weight(rng, k, n, experts=(len(sizes),), **of_weight)
    x = activations(rng, (tokens, k), dtype)
    group_sizes = np.asarray(sizes, np.int32)
    expected = oracles.grouped_matmul(x, dense, group_sizes)
    check = functools.partial(check_rows, expected, CLOSE[dtype], dtype)
    return Case((x, w, group_sizes), {"out_dtype": jnp.dtype(dtype)}, expected, check)


def factors(rng: np.random.Generator, n1: int | None, n2: int | None) -> list[Any]:
    """Square factors that keep the size of what they multiply; None for none."""
    make = lambda n: rng.standard_normal((n, n)).astype(np.float32) / np.sqrt(n)  # noqa: E731
    return [None if n is None else np.float32(make(n)) for n in (n1, n2)]


def kron(
    n1: int | None = 8,
    n2: int | None = 128,
    tokens: tuple[int, ...] = (7,),
    channels: int | None = None,
    dtype: str = "bfloat16",
    special: bool = False,
) -> Case:
    """`kron_matmul`; a factor of order None is left out, and `channels` says what it fills."""
    rng = np.random.default_rng(1)
    left, right = factors(rng, n1, n2)
    x = activations(rng, (*tokens, channels or n1 * n2), dtype, special)
    expected = oracles.kron(np.asarray(x), left, right)
    check = functools.partial(check_rows, expected, CLOSE[dtype], dtype)
    return Case((x, left, right), {}, expected, check)


def kron_quantize(
    bits: int = 8, packed: bool = False, clip: tuple[float, float] | None = None, **of_kron: Any
) -> Case:
    """`kron_quantize`."""
    floats = kron(**of_kron)
    clips = None if clip is None else np.asarray(clip, np.float32)
    expected = oracles.token_codes(floats.expected, clips, bits)
    check = functools.partial(check_codes, expected, str(floats.args[0].dtype), packed)
    return Case((*floats.args, clips), {"bits": bits, "packed": packed}, expected, check)


def check_codes(
    expected: tuple[np.ndarray, np.ndarray], dtype: str, packed: bool, found: Any
) -> None:
    """Fails where scales differ, or codes by more than ties allow."""
    (codes, scale), (found_codes, found_scale) = expected, found
    assert found_scale.dtype == np.float32 and found_scale.shape == scale.shape
    np.testing.assert_allclose(found_scale, scale, rtol=CLOSE[dtype])
    found_codes = np.asarray(found_codes)
    assert found_codes.dtype == (np.uint8 if packed else np.int8)
    if packed:
        low, high = found_codes & 15, found_codes >> 4
        found_codes = np.stack([low, high], -1).reshape(codes.shape).astype(np.int8)
        found_codes = np.where(found_codes > 7, found_codes - 16, found_codes)
    off = np.abs(found_codes.astype(int) - codes)
    assert off.max() <= 1 and np.mean(off) <= TIES[dtype], f"{np.mean(off):%} of codes are off"


def paley(q: int) -> np.ndarray:
    """A Hadamard matrix of order q + 1, for a prime q of the form 4n + 3."""
    squares = {i * i % q for i in range(1, q)}
    matrix = np.ones((q + 1, q + 1), np.int8)
    for i in range(q):
        for j in range(q):
            matrix[i + 1, j + 1] = -1 if i == j or (j - i) % q not in squares else 1
    assert np.array_equal(matrix.astype(int) @ matrix.T, (q + 1) * np.eye(q + 1))
    return matrix


def hadamard(
    order: int = 1,
    doublings: int = 10,
    inner: int = 1,
    runs: int = 1,
    tokens: tuple[int, ...] = (7,),
    dtype: str = "bfloat16",
    special: bool = False,
) -> Case:
    """`hadamard` with a base of the order."""
    rng = np.random.default_rng(doublings)
    base = None if order == 1 else paley(order - 1)
    channels = runs * (order << doublings) * inner
    x = activations(rng, (*tokens, channels), dtype, special)
    expected = oracles.hadamard(np.asarray(x), base, doublings, inner)
    check = functools.partial(check_rows, expected, CLOSE[dtype], dtype)
    static = {"base": base, "doublings": doublings, "inner": inner}
    return Case((x,), static, expected, check)


def attention(
    heads: tuple[int, int] = (2, 4),
    slots: int = 300,
    dim: int = 128,
    starts: tuple[int, ...] = (0, 3, 130, 0),
    stops: tuple[int, ...] = (300, 200, 131, 0),
    bits: int | None = 8,
    symmetric: bool = True,
    dtype: str = "bfloat16",
) -> Case:
    """`quant_decode_attention`; `heads` are kv heads and queries to each, `bits` None floats.

    Slots that no sequence sees hold NaN, in the floats or in the scales of the codes.
    """
    rng = np.random.default_rng(slots + dim)
    batch, (kv_heads, group) = len(starts), heads
    q = activations(rng, (batch, kv_heads, group, dim), dtype)
    index = np.arange(slots)
    seen = (index >= np.array(starts)[:, None]) & (index < np.array(stops)[:, None])
    seen = np.broadcast_to(seen[:, None], (batch, kv_heads, slots))
    rows, grids, floats = [], [], []
    for _ in "kv":
        if bits is None:
            a = activations(rng, (batch, kv_heads, slots, dim), dtype)
            rows.append(jnp.where(seen[..., None], a, jnp.nan))
            grids += [None, None]
            floats.append(np.asarray(a, np.float64))
            continue
        codes = codes_of(rng, (batch, kv_heads, slots, dim), bits)
        scale = rng.uniform(0.5, 1.5, seen.shape).astype(np.float32) / 2 ** (bits - 1)
        zero = None if symmetric else codes_of(rng, seen.shape, bits)
        shifted = codes.astype(np.float64) - (0 if zero is None else zero[..., None])
        floats.append(shifted * scale[..., None])
        rows.append(np.asarray(pack_rows(codes, bits)))
        grids += [np.where(seen, scale, np.float32(np.nan)), zero]
    scale = dim**-0.5
    starts, stops = np.asarray(starts, np.int32), np.asarray(stops, np.int32)
    expected = oracles.attention(q, *floats, starts, stops, scale)
    static = {"scale": scale, "k_bits": bits or 8, "v_bits": bits or 8}
    # Beside its result, a bfloat16 kernel rounds the weights of the values and the values.
    tolerance = 2e-5 if dtype == "float32" else 8e-3
    check = functools.partial(check_rows, expected, tolerance, dtype)
    return Case((q, *rows, starts, stops, *grids), static, expected, check)


# ---------------------------------------------------------------- the tables

_M = {f"m{m}": {"tokens": (m,)} for m in (1, 2, 7, 16, 128, 130)}
_WEIGHTS = {
    "one_group": {"k": 128},
    "group_32": {"group": 32},
    "group_64_n_not_even": {"group": 64, "n": 201},
    "group_64_k_not_even": {"group": 64, "k": 320},
    "channel": {"group": None},
    "channel_k_not_even": {"group": None, "k": 200, "symmetric": False},
    "tensor": {"group": None, "per_tensor": True},
    "asymmetric": {"symmetric": False},
    "asymmetric_channel": {"symmetric": False, "group": None},
    "asymmetric_group_32": {"symmetric": False, "group": 32},
    "w8_channel": {"bits": 8, "group": None},
    "w8_group": {"bits": 8},
    "w8_asymmetric": {"bits": 8, "symmetric": False},
    "lowest_codes": {"lowest": True},
}
_ODD_WIDTHS = {f"w{bits}": {"bits": bits, "symmetric": bits % 2 == 0} for bits in (2, 3, 5, 6, 7)}
_MATMUL = {
    **_M,
    **_WEIGHTS,
    **_ODD_WIDTHS,
    "long_k": {"k": 2176, "n": 300},
    "zero_and_huge_rows": {"special": True},
    "zero_and_huge_rows_asymmetric": {"special": True, "symmetric": False},
    "no_leading_axis": {"tokens": ()},
    "two_leading_axes": {"tokens": (2, 3)},
    "float32": {"dtype": "float32"},
    "float32_asymmetric": {"dtype": "float32", "symmetric": False, "special": True},
    "float32_w8": {"dtype": "float32", "bits": 8},
    # In bfloat16 the scales' roundings of such a column would add up.
    "lowest_codes": {"dtype": "float32", "lowest": True},
    "bfloat16_to_float32": {"out_dtype": "float32"},
}
_MATMUL_INT = {
    **_M,
    **_WEIGHTS,
    **_ODD_WIDTHS,
    "long_k": {"k": 2176, "n": 300},
    "exact": {"unit": True},
    "exact_w8_asymmetric": {"unit": True, "bits": 8, "symmetric": False, "x_symmetric": False},
    "x4": {"x_bits": 4},
    "x4_channel": {"x_bits": 4, "group": None},
    "x4_asymmetric": {"x_bits": 4, "x_symmetric": False, "symmetric": False},
    "x_asymmetric": {"x_symmetric": False},
    "x_asymmetric_channel": {"x_symmetric": False, "group": None},
    "both_asymmetric": {"x_symmetric": False, "symmetric": False, "group": None},
    "one_grid_for_all_tokens": {"shared": True, "x_symmetric": False},
    "no_leading_axis": {"tokens": ()},
    "two_leading_axes": {"tokens": (2, 3), "x_symmetric": False},
    "bfloat16_out": {"out_dtype": "bfloat16"},
}
_GROUPED = {
    "ragged": {},
    "first_and_last_empty": {"sizes": (0, 9, 0, 11, 0)},
    "one_expert_has_all": {"sizes": (0, 0, 20, 0)},
    "tokens_of_nobody": {"sizes": (3, 0, 4), "tokens": 20},
    "no_token_has_an_expert": {"sizes": (0, 0, 0), "tokens": 5},
    "one_token": {"sizes": (0, 1), "tokens": 1},
    "many_tokens": {"sizes": (130, 2, 0, 125, 43), "tokens": 300},
    "one_token_each": {"sizes": (1,) * 16, "tokens": 16},
    "channel": {"group": None},
    "tensor": {"group": None, "per_tensor": True},
    "group_32": {"group": 32},
    "asymmetric": {"symmetric": False},
    "w8_channel": {"bits": 8, "group": None},
    "w8_asymmetric": {"bits": 8, "symmetric": False},
    "w3": {"bits": 3},
    "float32": {"dtype": "float32"},
    "float32_asymmetric": {"dtype": "float32", "symmetric": False},
}
_KRON = {
    **_M,
    "32x128": {"n1": 32},
    "16x256": {"n1": 16, "n2": 256},
    "12x128": {"n1": 12},
    "32x64": {"n1": 32, "n2": 64},
    "64x64": {"n1": 64, "n2": 64},
    "128x128": {"n1": 128, "tokens": (3,)},
    "no_left": {"n1": None, "channels": 512},
    "no_right": {"n1": 8, "n2": None, "channels": 1024},
    "zero_and_huge_rows": {"special": True},
    "no_leading_axis": {"tokens": ()},
    "two_leading_axes": {"tokens": (2, 3)},
    "float32": {"dtype": "float32"},
    "float32_32x128": {"dtype": "float32", "n1": 32},
}
_QUANTIZE = {
    **{f"int8_{name}": settings for name, settings in _KRON.items()},
    "int8_clip": {"clip": (0.7, 0.9)},
    "int4_in_bytes": {"bits": 4},
    "int4": {"bits": 4, "packed": True},
    "int4_m130": {"bits": 4, "packed": True, "tokens": (130,)},
    "int4_32x128": {"bits": 4, "packed": True, "n1": 32},
    "int4_64x64": {"bits": 4, "packed": True, "n1": 64, "n2": 64},
    "int4_clip": {"bits": 4, "packed": True, "clip": (0.8, 0.6)},
    "int4_zero_and_huge_rows": {"bits": 4, "packed": True, "special": True},
    "int4_float32": {"bits": 4, "packed": True, "dtype": "float32"},
    "int3": {"bits": 3},
    "int6": {"bits": 6},
}
_HADAMARD = {
    **{name: {"doublings": 10, **settings} for name, settings in _M.items()},
    "order_128": {"doublings": 7},
    "order_4096": {"doublings": 12, "tokens": (2,)},
    "order_64": {"doublings": 6},
    "two_runs": {"doublings": 9, "runs": 2},
    "base_12": {"order": 12, "doublings": 7},
    "base_20": {"order": 20, "doublings": 8},
    "base_12_short": {"order": 12, "doublings": 2},
    "heads": {"doublings": 3, "inner": 128},
    "base_and_heads": {"order": 12, "doublings": 1, "inner": 64},
    "zero_and_huge_rows": {"special": True},
    "two_leading_axes": {"tokens": (2, 3)},
    "float32": {"dtype": "float32"},
    "float32_base_12": {"dtype": "float32", "order": 12, "doublings": 7},
}
_ATTENTION = {
    "int8": {},
    "int8_asymmetric": {"symmetric": False},
    "int4": {"bits": 4},
    "int4_asymmetric": {"bits": 4, "symmetric": False},
    "int3_asymmetric": {"bits": 3, "symmetric": False},
    "floats": {"bits": None},
    "dim_64": {"dim": 64, "bits": 4, "symmetric": False},
    "one_query_a_head": {"heads": (3, 1)},
    "seven_queries_a_head": {"heads": (1, 7), "bits": 4},
    "one_slot": {"slots": 1, "starts": (0,), "stops": (1,)},
    "many_slots": {"slots": 1300, "starts": (0, 700), "stops": (1300, 1299), "bits": 4},
    "float32": {"dtype": "float32", "symmetric": False},
    "float32_int4": {"dtype": "float32", "bits": 4, "symmetric": False},
    "float32_floats": {"dtype": "float32", "bits": None},
}
_BUILDERS = {
    "quant_matmul": (matmul, _MATMUL),
    "quant_matmul_int": (matmul_int, _MATMUL_INT),
    "grouped_quant_matmul": (grouped, _GROUPED),
    "kron_matmul": (kron, _KRON),
    "kron_quantize": (kron_quantize, _QUANTIZE),
    "hadamard": (hadamard, _HADAMARD),
    "quant_decode_attention": (attention, _ATTENTION),
}
CASES: dict[str, dict[str, Callable[[], Case]]] = {
    op: {name: functools.partial(builder, **settings) for name, settings in table.items()}
    for op, (builder, table) in _BUILDERS.items()
}
