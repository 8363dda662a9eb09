import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.models.rope import Rope, rope_tables, rotate, turned_channels

DIM = 16
POSITIONS = np.array([[0, 1, 5, 17, 63, 200]])
KINDS = {
    "default": Rope(theta=1e4),
    "linear": Rope(theta=1e4, kind="linear", factor=4.0),
    "dynamic": Rope(theta=1e4, kind="dynamic", factor=2.0, original_context=64),
    "llama3": Rope(theta=5e5, kind="llama3", factor=8.0, original_context=64),
    "yarn": Rope(theta=1e4, kind="yarn", factor=4.0, original_context=64, attention_factor=1.1),
    "longrope": Rope(
        theta=1e4,
        kind="longrope",
        original_context=64,
        short_factors=tuple(1 + i / 20 for i in range(DIM // 2)),
        long_factors=tuple(1 + i**1.5 for i in range(DIM // 2)),
        attention_factor=1.2,
    ),
}


def frequency(rope, i, longest):
    """The i-th frequency by the formula of its kind, one number at a time."""
    base, original = rope.theta, rope.original_context
    if rope.kind == "dynamic" and longest > original:
        base *= (rope.factor * longest / original - (rope.factor - 1)) ** (DIM / (DIM - 2))
    f = base ** (-2 * i / DIM)
    if rope.kind == "longrope":
        return f / (rope.long_factors if longest > original else rope.short_factors)[i]
    if rope.kind == "linear":
        return f / rope.factor
    if rope.kind == "llama3":
        turns = original * f / (2 * math.pi)
        if turns > rope.high_freq_factor:
            return f
        if turns < rope.low_freq_factor:
            return f / rope.factor
        mix = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return (1 - mix) * f / rope.factor + mix * f
    if rope.kind == "yarn":
        low, high = (
            DIM * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(base))
            for beta in (rope.beta_fast, rope.beta_slow)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), DIM - 1)
        ramp = min(max((i - low) / (high - low), 0), 1)
        return f / rope.factor * ramp + f * (1 - ramp)
    return f


@pytest.mark.parametrize("kind", KINDS)
def test_angles_follow_the_formula_of_each_kind(kind):
    rope, longest = KINDS[kind], POSITIONS.max() + 1
    cos, sin = rope_tables(rope, DIM, jnp.asarray(POSITIONS))
    f = np.array([frequency(rope, i, longest) for i in range(DIM // 2)])
    angles = POSITIONS[..., None] * f
    np.testing.assert_allclose(cos, rope.attention_factor * np.cos(angles), atol=1e-4)
    np.testing.assert_allclose(sin, rope.attention_factor * np.sin(angles), atol=1e-4)


def test_kinds_differ():
    tables = [np.asarray(rope_tables(r, DIM, jnp.asarray(POSITIONS))[0]) for r in KINDS.values()]
    for i, a in enumerate(tables):
        assert all(np.abs(a - b).max() > 0.01 for b in tables[:i])


def test_dynamic_scaling_does_nothing_within_the_original_context():
    positions = jnp.arange(64)[None]
    tables = [rope_tables(KINDS[k], DIM, positions) for k in ("dynamic", "default")]
    np.testing.assert_allclose(*tables, atol=1e-5)


def test_longrope_takes_the_long_factors_one_token_beyond_the_original_context():
    rope, default = KINDS["longrope"], KINDS["default"]
    for longest, factors in ((64, rope.short_factors), (65, rope.long_factors)):
        found, _ = rope_tables(rope, DIM, jnp.array([[1, longest - 1]]))
        plain = default.theta ** (-2 * np.arange(DIM // 2) / DIM)
        np.testing.assert_allclose(found[0, 0], 1.2 * np.cos(plain / factors), atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_horizon_stands_for_the_length_of_the_whole_sequence(kind):
    whole = rope_tables(KINDS[kind], DIM, jnp.arange(100)[None])
    part = rope_tables(KINDS[kind], DIM, jnp.arange(10)[None], jnp.int32(100))
    alone = rope_tables(KINDS[kind], DIM, jnp.arange(10)[None])
    for a, b, c in zip(whole, part, alone, strict=True):
        np.testing.assert_allclose(b, a[:, :10], atol=1e-5)
        assert np.abs(c - b).max() > 1e-3


def test_the_rest_of_a_head_passes_where_a_share_of_it_turns():
    x = np.random.default_rng(2).standard_normal((1, 6, 2, DIM)).astype(np.float32)
    rope = dataclasses.replace(KINDS["default"], partial=0.5)
    cos, sin = rope_tables(rope, DIM, jnp.asarray(POSITIONS))
    assert cos.shape[-1] == DIM // 4 and turned_channels(rope, DIM) == DIM // 2
    y, half = rotate(x, cos, sin), DIM // 2
    np.testing.assert_array_equal(y[..., half:], x[..., half:])
    whole = rotate(x[..., :half], *rope_tables(KINDS["default"], half, jnp.asarray(POSITIONS)))
    np.testing.assert_array_equal(y[..., :half], whole)


def test_pairs_are_turned_as_complex_numbers():
    x = np.random.default_rng(0).standard_normal((1, 6, 2, DIM)).astype(np.float32)
    cos, sin = rope_tables(KINDS["default"], DIM, jnp.asarray(POSITIONS))
    half = DIM // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * (np.asarray(cos) + 1j * np.asarray(sin))[
        :, :, None
    ]
    y = rotate(x, cos, sin)
    np.testing.assert_allclose(y, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_scores_depend_on_the_distance_alone(kind):
    q, k = np.random.default_rng(1).standard_normal((2, 1, 1, 1, DIM)).astype(np.float32)

    def score(a, b):
        turned = (
            rotate(x, *rope_tables(KINDS[kind], DIM, jnp.array([[t]]))) for x, t in ((q, a), (k, b))
        )
        return float(np.sum(np.prod(list(map(np.asarray, turned)), axis=0)))

    assert score(9, 4) == pytest.approx(score(29, 24), abs=1e-3)
    assert abs(score(9, 4) - score(9, 8)) > 0.01


def test_bfloat16_is_turned_in_float32_and_comes_back_as_bfloat16():
    x = jnp.ones((1, 6, 1, DIM), jnp.bfloat16)
    tables = rope_tables(KINDS["default"], DIM, jnp.asarray(POSITIONS))
    y = rotate(x, *tables)
    assert y.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), *tables)
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
