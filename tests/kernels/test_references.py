"""Every reference on the cases: the implementations of chips are held to the same."""

import re

import jax
import pytest

import pallas_kernels
from tests.kernels.cases import CASES, build

# References know no tiles, so that numbers of tokens are all one to them; and the two products that
# have tests of their own are left to the slow run.
OWN_TESTS = ("quant_matmul", "quant_matmul_int")
PAIRS = [
    pytest.param(op, name, marks=[pytest.mark.slow] if op in OWN_TESTS else [])
    for op in CASES
    for name in CASES[op]
    if not re.fullmatch(r"(int8_)?m(2|7|16|128)", name)
]


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_the_reference_gives_what_the_operation_means(op, name):
    case = build(op, name)
    function = getattr(pallas_kernels, op)
    with pallas_kernels.use(reference=True):
        case.check(jax.jit(lambda *args: function(*args, **case.static))(*case.args))


@pytest.mark.parametrize("op", CASES)
def test_a_wrong_result_is_noticed(op):
    case = build(op, next(iter(CASES[op])))
    with pytest.raises(AssertionError):
        case.check(jax.tree.map(lambda a: a + 1, case.expected))
