"""Attention of a prompt: the reference and the CPU's kernel against float64, query by query."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import prefill_attention, use
from pallas_kernels.native import library
from tests.kernels import oracles

# batch, time, kv heads, heads, slots, head_dim, slot of the first query, starts, window
CASES = {
    "one token": (1, 1, 1, 1, 1, 64, 0, (0,), None),
    "a prompt by itself": (2, 70, 2, 4, 70, 64, 0, (0, 33), None),
    "behind others": (2, 50, 1, 3, 256, 64, 150, (0, 180), None),
    "more keys than a chunk": (1, 5, 1, 2, 1200, 64, 1150, (7,), None),
    "a window": (2, 130, 2, 2, 130, 64, 0, (0, 60), 20),
    "a window behind others": (1, 49, 1, 2, 700, 64, 600, (3,), 70),
    "heads of 80 channels": (1, 37, 2, 4, 40, 80, 3, (0,), None),
    "heads of 128 channels": (1, 49, 1, 4, 64, 128, 0, (5,), None),
}


def operands(name):
    """Arguments, keywords and the expected result; slots that nobody sees hold NaN."""
    batch, time, kv_heads, heads, slots, dim, slot, starts, window = CASES[name]
    rng = np.random.default_rng(len(name))
    q = rng.standard_normal((batch, time, heads, dim)).astype(np.float32)
    k, v = (rng.standard_normal((batch, kv_heads, slots, dim)).astype(np.float32) for _ in range(2))
    scale, starts = 2 * dim**-0.5, np.asarray(starts, np.int32)
    expected = np.zeros(q.shape)
    for i in range(time):
        low = starts if window is None else np.maximum(starts, slot + i + 1 - window)
        rows = q[:, i].reshape(batch, kv_heads, -1, dim)
        stop = np.full(batch, slot + i + 1)
        expected[:, i] = oracles.attention(rows, k, v, low, stop, scale).reshape(
            expected[:, i].shape
        )
    seen = np.arange(slots)
    seen = (seen >= starts[:, None]) & (seen < slot + time)
    k, v = (np.where(seen[:, None, :, None], a, np.nan) for a in (k, v))
    return (q, k, v, starts, slot), dict(scale=scale, window=window), expected


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "reference"])
def test_queries_see_the_slots_up_to_their_own(name, kernel):
    if kernel and not library.available():
        pytest.skip("no native library")
    args, static, expected = operands(name)
    with use(reference=not kernel):
        found = jax.jit(functools.partial(prefill_attention, **static))(*args)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_bfloat16_is_computed_in_float32():
    (q, k, v, *rest), static, _ = operands("a prompt by itself")
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in (q, k, v))
    found = prefill_attention(q, k, v, *map(jnp.asarray, rest), **static)
    assert found.dtype == jnp.bfloat16
    exact = prefill_attention(
        *(a.astype(jnp.float32) for a in (q, k, v)), *map(jnp.asarray, rest), **static
    )
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=2e-2)


def test_a_number_that_is_none_is_not_hidden():
    (q, *rest), static, _ = operands("a prompt by itself")
    q[0, 40, 1, 3] = np.nan
    found = np.asarray(prefill_attention(*map(jnp.asarray, (q, *rest)), **static))
    assert np.isnan(found[0, 40, 1]).all()
    assert np.isfinite(np.delete(found, 40, axis=1)).all()


def test_the_gradient_is_that_of_the_reference():
    args, static, _ = operands("heads of 80 channels")
    args = [jnp.nan_to_num(jnp.asarray(a)) for a in args]
    loss = lambda q: jnp.sum(jnp.sin(prefill_attention(q, *args[1:], **static)))  # noqa: E731
    found = jax.jit(jax.grad(loss))(args[0])
    with use(reference=True):
        np.testing.assert_allclose(found, jax.jit(jax.grad(loss))(args[0]), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=(2, 3, 70, 64), v=(2, 3, 70, 64)), "kv heads that divide 4"),
        (dict(k=(2, 2, 60, 64), v=(2, 2, 60, 64)), "70 queries have no room in 60 slots"),
        (dict(window=0), "window=0 is below 1"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    shapes = dict(q=(2, 70, 4, 64), k=(2, 2, 70, 64), v=(2, 2, 70, 64), starts=(2,)) | change
    window = shapes.pop("window", None)
    arrays = {
        name: jnp.zeros(s, jnp.int32 if name == "starts" else None) for name, s in shapes.items()
    }
    with pytest.raises(ValueError, match=message):
        prefill_attention(*arrays.values(), 0, scale=1.0, window=window)
