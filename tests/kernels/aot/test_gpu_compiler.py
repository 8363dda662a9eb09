import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.aot import compile_for, missing
from pallas_kernels.aot.gpu import figures

MATRIX = jax.ShapeDtypeStruct((128, 128), jnp.float32)
absent = pytest.mark.skipif(bool(missing("h100")), reason=str(missing("h100")))


def doubled(x):
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] * 2

    return plgpu.kernel(kernel, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


@pytest.mark.aot
@absent
def test_a_kernel_is_compiled_for_a_gpu_that_is_not_there(tmp_path):
    _, report = compile_for("h100", doubled, MATRIX, dump=tmp_path)
    assert report.arguments == report.outputs == 128 * 128 * 4
    (kernel,) = report.kernels
    assert kernel.name == "kernel"
    assert 0 < kernel.figures["registers"] <= 255 and kernel.figures["spills"] == 0
    assert compile_for("h200", doubled, MATRIX).report.chip == "h200"


@pytest.mark.aot
@absent
def test_what_hopper_refuses_is_refused():
    def huge(x):
        def kernel(x_ref, y_ref, scratch):
            scratch[...] = x_ref[...]
            y_ref[...] = scratch[...]

        shared = plgpu.SMEM((512, 128), jnp.float32)  # 256 KiB
        return plgpu.kernel(kernel, out_type=x, scratch_types=[shared])(x)

    with pytest.raises(Exception, match=r"(?i)shared memory|smem"):
        compile_for("h100", huge, jax.ShapeDtypeStruct((512, 128), jnp.float32))


def test_the_report_of_ptxas_is_read(tmp_path):
    report = tmp_path / "kernel_0.ptxas"
    report.write_text(
        "ptxas info    : Function properties for k\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 138 registers, used 2 barriers\n"
    )
    report.with_suffix(".mlir-passes.log").write_text("dynamic_shared_memory_size %c4096_i32 args")
    report.with_suffix(".sass").write_text(
        "        /*0000*/   @P0 HGMMA.64x8x16.F32 R4, R8 ;\n        /*0010*/   I2F R1, R2 ;\n"
    )
    found = figures(report)
    assert (found["registers"], found["spills"], found["shared"]) == (138, 8, 4096)
    assert (found["HGMMA"], found["I2F"], found["IGMMA"]) == (1, 1, 0)
