import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.aot import compile_for, missing
from pallas_kernels.aot.tpu import bundles

MATRIX = jax.ShapeDtypeStruct((256, 256), jnp.float32)


def doubled(x):
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] * 2

    return pl.pallas_call(kernel, out_shape=x, name="doubled")(x)


@pytest.mark.aot
@pytest.mark.skipif(bool(missing("v6e")), reason=str(missing("v6e")))
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_a_kernel_is_compiled_for_a_tpu_that_is_not_there(chip):
    executable, report = compile_for(chip, doubled, MATRIX)
    assert "tpu_custom_call" in executable.as_text()
    assert report.arguments == report.outputs == 256 * 256 * 4


@pytest.mark.aot
@pytest.mark.skipif(bool(missing("v6e")), reason=str(missing("v6e")))
def test_what_a_tpu_refuses_is_refused():
    def lanes(x):
        def kernel(x_ref, y_ref):
            y_ref[...] = x_ref[...].reshape(1024, 64)

        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((1024, 64), x.dtype))(x)

    with pytest.raises(Exception, match=r"reshape|shape.cast"):
        compile_for("v6e", lanes, MATRIX)


def test_a_chip_without_a_compiler_is_refused():
    with pytest.raises(ValueError, match=r"chip_name='cpu' cannot be compiled for; use one of"):
        compile_for("cpu", doubled, MATRIX)


def test_the_table_of_bundles_is_read():
    text = """== CAPACITY:
MXU, XLU, VALU, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    2     2     4     3     3     2     2     2
== UTILIZATION:
1 0 4 0 0 0 0 0
0 0 2 3 1 0 2 0
"""
    found = bundles(text)
    assert (found["bundles"], found["spills"], found["fills"]) == (2, 2, 1)
    assert (found["MXU"], found["VALU"], found["VLOAD"]) == (0.5, 1.5, 1.0)
