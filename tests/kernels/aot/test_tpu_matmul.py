"""The matrix products compiled for TPUs that are not there: what they refuse shows here alone."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.aot import compile_for, missing
from pallas_kernels.chips import CHIPS
from pallas_kernels.grouped_quant_matmul.tpu import grouped_quant_matmul
from pallas_kernels.quant_matmul.prepare import prepare
from pallas_kernels.quant_matmul.tpu import quant_matmul
from pallas_kernels.quant_matmul_int import prepare as integer
from pallas_kernels.quant_matmul_int.tpu import quant_matmul_int
from pallas_kernels.weight import Weight, canonical_weight

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(bool(missing("v6e")), reason=str(missing("v6e"))),
]
S = jax.ShapeDtypeStruct
TPUS = ["v5e", "v6e"]


def weight(k, n, bits=4, group=128, symmetric=True, per_tensor=False, experts=()) -> Weight:
    """The shapes of a canonical weight."""
    grid = (*experts, k // (group or k), 1 if per_tensor else n)
    zero = None if symmetric else S(grid, jnp.int8)
    packed = S((*experts, k * bits // 8, n), jnp.uint8)
    made = functools.partial(canonical_weight, bits=bits, in_ch=k)
    return jax.eval_shape(made, packed, S(grid, jnp.float32), zero)


WEIGHTS = {
    "group_128": weight(1024, 512),
    "group_32_asymmetric": weight(512, 512, group=32, symmetric=False),
    "group_64_of_576": weight(576, 1536, group=64),
    "channel_asymmetric": weight(1024, 512, group=None, symmetric=False),
    "tensor": weight(1024, 512, group=None, per_tensor=True),
    "int8": weight(1024, 512, bits=8),
    "int8_asymmetric": weight(1024, 512, bits=8, symmetric=False),
    "one_group_of_3_columns": weight(128, 3),
}


@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("m", [1, 130])
@pytest.mark.parametrize("name", WEIGHTS)
def test_floats_times_codes_compile(name, m, chip):
    k = WEIGHTS[name].in_ch
    w = jax.eval_shape(lambda w: prepare(w, CHIPS[chip]), WEIGHTS[name])
    x = S((m, k), jnp.bfloat16)
    f = functools.partial(quant_matmul, out_dtype=x.dtype, chip=CHIPS[chip])
    assert "quant_matmul" in compile_for(chip, f, x, w).executable.as_text()


@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize(
    ("m", "shifted", "four"), [(1, False, False), (130, True, False), (64, False, True)]
)
@pytest.mark.parametrize("name", WEIGHTS)
def test_codes_times_codes_compile(name, m, shifted, four, chip):
    w = jax.eval_shape(lambda w: integer.prepare(w, CHIPS[chip], shifted), WEIGHTS[name])
    if four and (w.bits > 4 or w.group_size < 128):
        pytest.skip("int4 times int4 takes 4 bits, and groups as deep as the matrix unit")
    zero = S((m, 1), jnp.int8) if shifted else None
    args = (S((m, w.in_ch), jnp.int8), S((m, 1), jnp.float32), zero, w)
    f = functools.partial(quant_matmul_int, out_dtype=jnp.bfloat16, chip=CHIPS[chip], four=four)
    assert "quant_matmul_int" in compile_for(chip, f, *args).executable.as_text()


EXPERTS = {
    "group_128": weight(1024, 512, experts=(8,)),
    "group_32_asymmetric": weight(512, 512, group=32, symmetric=False, experts=(8,)),
    "tensor": weight(1024, 512, group=None, per_tensor=True, experts=(8,)),
    "int8_channel": weight(1024, 512, bits=8, group=None, experts=(8,)),
}


@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("m", [1, 300])
@pytest.mark.parametrize("name", EXPERTS)
def test_tokens_times_the_codes_of_their_experts_compile(name, m, chip):
    w = jax.eval_shape(lambda w: prepare(w, CHIPS[chip]), EXPERTS[name])
    x, sizes = S((m, w.in_ch), jnp.bfloat16), S((8,), jnp.int32)
    f = functools.partial(grouped_quant_matmul, out_dtype=x.dtype, chip=CHIPS[chip])
    assert "grouped_quant_matmul" in compile_for(chip, f, x, w, sizes).executable.as_text()


@pytest.mark.parametrize("chip", TPUS)
def test_float32_canonical_and_mapped_calls_compile(chip):
    w = weight(1024, 512, symmetric=False)
    f = functools.partial(quant_matmul, out_dtype=jnp.float32, chip=CHIPS[chip])
    compile_for(chip, f, S((8, 1024), jnp.float32), w)
    two = jax.tree.map(lambda a: S((2, *a.shape), a.dtype), w)
    compile_for(chip, jax.vmap(f), S((2, 8, 1024), jnp.bfloat16), two)
