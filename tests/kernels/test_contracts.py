"""What the public functions refuse, whatever implements them; each message says which and why."""

import functools
import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    DenseWeight,
    canonical_weight,
    dense_matmul,
    grouped_quant_matmul,
    hadamard,
    kron_matmul,
    kron_quantize,
    quant_decode_attention,
    quant_matmul_int,
)
from tests.kernels import cases

F32 = functools.partial(np.ones, dtype=np.float32)
U8 = functools.partial(np.zeros, dtype=np.uint8)
I8 = functools.partial(np.zeros, dtype=np.int8)


def weight(packed=(8, 4), scale=(2, 4), zero=None, bits=4, in_ch=16):
    zero = None if zero is None else I8(zero)
    # The tests' own type checks would be first to complain.
    return inspect.unwrap(canonical_weight)(U8(packed), F32(scale), zero, bits, in_ch)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 9}, "bits=9 is outside 2..8"),
        ({"bits": 1}, "bits=1 is outside 2..8"),
        ({"in_ch": 18}, r"18 input channels of 4 bits take 9 bytes.*\(8, 4\) has 8"),
        ({"scale": (3, 4)}, r"scale \(3, 4\) fits no weight of 16 × 4: groups divide in_ch"),
        ({"scale": (2, 3)}, r"scale \(2, 3\) fits no weight of 16 × 4.*columns are 4 or 1"),
        ({"zero": (1, 4)}, r"zero_point \(1, 4\) has not the shape of scale \(2, 4\)"),
    ],
)
def test_parts_of_a_weight_that_contradict_each_other(wrong, message):
    assert weight().shape == (16, 4)
    with pytest.raises(ValueError, match=message):
        weight(**wrong)


def test_activations_that_do_not_fit_the_weight():
    w = weight()
    with pytest.raises(ValueError, match=r"\(3, 15\) do not fit a weight of shape \(16, 4\)"):
        quant_matmul_int(I8((3, 15)), F32((3, 1)), None, w)
    with pytest.raises(ValueError, match=r"\(3, 4\) do not fit a weight of shape \(5, 4\)"):
        dense_matmul(F32((3, 4)), DenseWeight(jnp.ones((4, 5)), transposed=True))
    experts, _ = cases.weight(np.random.default_rng(0), 16, 4, 4, None, experts=(2,))
    with pytest.raises(ValueError, match=r"do not fit experts of shape \(16, 4\)"):
        grouped_quant_matmul(F32((3, 16)), w, np.array([3], np.int32))
    with pytest.raises(ValueError, match=r"\(3,\) group sizes for 2 experts"):
        grouped_quant_matmul(F32((3, 16)), experts, np.array([1, 1, 1], np.int32))


def test_factors_that_do_not_make_the_channels():
    x, m = F32((2, 24)), jnp.eye(4)
    for f in (kron_matmul, kron_quantize):
        with pytest.raises(ValueError, match="orders 4 and 4 do not make 24 channels"):
            f(x, m, m)
    with pytest.raises(ValueError, match="bits=16 is outside 2"):
        kron_quantize(x, m, None, bits=16)
    with pytest.raises(ValueError, match=r"at most 4 bits.*not bits=8 and 24 channels"):
        kron_quantize(x, m, None, bits=8, packed=True)
    with pytest.raises(ValueError, match=r"24 channels are not whole runs of 16·1"):
        hadamard(x, None, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k_bits": 9}, "k_bits=9 is outside 2..8"),
        ({"k": U8((2, 3, 5, 9))}, r"k \(2, 3, 5, 9\) does not fit queries .*\(2, 3, slots, 8\)"),
        ({"v": F32((2, 2, 5, 16))}, r"v \(2, 2, 5, 16\) does not fit queries"),
        ({"k": I8((2, 3, 5, 8))}, "k is int8: codes are uint8 and have a scale"),
        ({"k_scale": F32((2, 3, 4))}, r"k_scale \(2, 3, 4\) has not one value a row"),
        ({"v": F32((2, 3, 6, 16))}, "k has 5 slots and v 6"),
    ],
)
def test_caches_that_do_not_fit_the_queries(wrong, message):
    lens = np.array([5, 3], np.int32)
    args = {"q": F32((2, 3, 4, 16)), "k": U8((2, 3, 5, 8)), "v": F32((2, 3, 5, 16))}
    args |= {"starts": lens * 0, "stops": lens, "k_scale": F32((2, 3, 5)), "k_bits": 4}
    assert quant_decode_attention(**args, scale=0.25).shape == (2, 3, 4, 16)
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(quant_decode_attention)(**(args | wrong), scale=0.25)
