import logging
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, trial, use
from pallas_kernels.trial import Example

OP = "pallas_kernels.double"


def reference(x, *, times):
    return x * times


@pytest.fixture
def call(monkeypatch):
    """Makes an unproven kernel of a function and returns its operation and a log of its calls."""
    log = []

    def make(kernel, kind=lambda x: x.dtype.name):
        def double(x, *, times, chip, interpret=False, tile=None):
            log.append((x.shape, tile))
            return kernel(x, times)

        def example(x, *, times):
            return Example(kind(x), (np.arange(1, 5, dtype=x.dtype),), "small")

        module = types.ModuleType(f"{OP}.fast")
        module.double, module.EXAMPLES = double, {"double": example}
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(trial, "_passed", {})
        names = {"cpu": ("fast",), "gpu": ("fast",)}
        return lambda x, times=3.0: dispatch.first_supported(
            OP, names, reference, x, times=times
        ), log

    return make


def test_a_kernel_that_agrees_is_used_and_tried_once_a_kind(call):
    op, log = call(lambda x, times: x * times)
    for x in (jnp.ones(7), jnp.ones(9), jnp.ones(7, jnp.bfloat16)):
        np.testing.assert_array_equal(op(x), 3.0)
    shapes = [shape for shape, tile in log if tile == "small"]
    assert shapes == [(4,), (4,)] and (9,) in [shape for shape, _ in log]


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (lambda x, times: x * (times + 1), "off by 4, where 0.12 is allowed"),
        (lambda x, times: x * jnp.nan, "off by nan"),
        (lambda x, times: x[:2], r"\(2,\) instead of float32 \(4,\)"),
        (lambda x, times: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_kernel_that_fails_or_disagrees_is_not_used_and_the_reason_is_logged(
    call, caplog, kernel, reason
):
    op, log = call(kernel)
    with caplog.at_level(logging.WARNING, "pallas_kernels"):
        np.testing.assert_array_equal(op(jnp.ones(7)), 3.0)
        np.testing.assert_array_equal(op(jnp.ones(8)), 3.0)
    (record,) = caplog.records
    assert "is not used on this cpu" in record.message
    assert re.search(reason, record.message)
    assert {shape for shape, _ in log} == {(4,)}


def test_the_trial_runs_inside_transformations_too(call):
    op, log = call(lambda x, times: x * times)
    assert jax.jit(op)(jnp.ones(3)).tolist() == [3.0] * 3
    assert jax.vmap(jax.grad(lambda x: op(x)))(jnp.ones(2)).tolist() == [3.0] * 2
    assert [shape for shape, tile in log if tile] == [(4,)]


def test_no_trial_where_the_chip_is_not_there(call):
    op, log = call(lambda x, times: x * times)
    with use("h100"):
        op(jnp.ones(3))
    assert [tile for _, tile in log] == [None]


def test_a_kind_that_the_kernel_refuses_goes_to_the_next(call):
    def refuse(x):
        raise NotImplementedError("no such kind")

    op, log = call(lambda x, times: x * times, refuse)
    assert op(jnp.ones(2)).tolist() == [3.0, 3.0] and not log


@pytest.mark.parametrize("packed", [False, True])
def test_few_codes_may_be_off_by_one(packed):
    codes = np.full(1000, 0x77, np.uint8) if packed else np.full(1000, 7, np.int8)
    near, far = codes.copy(), codes.copy()
    near[0] -= 1
    far[0] -= 2
    assert trial._difference(near, codes) is None
    assert "by up to 2" in trial._difference(far, codes)
    assert "100.0%" in trial._difference(codes - 1, codes) or packed
