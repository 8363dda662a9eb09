"""Kernels for Hopper as they were compiled, run by an emulator: layouts, descriptors and copies."""

import functools
import importlib

import numpy as np
import pytest

from pallas_kernels.aot import missing
from pallas_kernels.chips import CHIPS
from tests.kernels import cases
from tests.kernels.hopper_emulator import emulated, swizzled

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(bool(missing("h100")), reason=str(missing("h100"))),
]
KRON = "kron_matmul"
# operation → package, that of the kernel it calls, cases with kernels that differ
CASES = {
    "quant_matmul": (
        *("quant_matmul", "quant_matmul"),
        "m1 m16 m130 group_32 asymmetric_group_32 channel asymmetric w8_group w8_asymmetric",
    ),
    "quant_matmul_int": (
        *("quant_matmul_int", "quant_matmul_int"),
        "m2 m130 w8_group exact_w8_asymmetric both_asymmetric asymmetric x4_channel",
    ),
    "grouped_quant_matmul": ("grouped_quant_matmul", "quant_matmul", "ragged w8_asymmetric"),
    "kron_matmul": (KRON, KRON, "64x64 no_left no_right 128x128"),
    "kron_quantize": (KRON, KRON, "int8_32x128 int8_no_left int4_64x64 int4_clip int6"),
    "hadamard": ("hadamard", KRON, "order_4096 heads base_12"),
    "quant_decode_attention": (
        *("quant_decode_attention", "quant_decode_attention"),
        "int8 int8_asymmetric int4 int4_asymmetric floats dim_64 many_slots seven_queries_a_head",
    ),
}
ALL = [(op, name) for op, (*_, names) in CASES.items() for name in names.split()]


@pytest.mark.parametrize(("op", "name"), ALL)
def test_the_compiled_kernel_gives_the_right_numbers(op, name, tmp_path, monkeypatch):
    package, called, _ = CASES[op]
    module, caller = (
        importlib.import_module(f"pallas_kernels.{p}.mosaic_gpu") for p in (package, called)
    )
    case = cases.build(op, name)
    f = functools.partial(getattr(module, op), **case.static, chip=CHIPS["h100"])
    case.check(emulated(caller, f, case.args, tmp_path, monkeypatch))


def test_memory_is_swizzled_as_the_ptx_manual_draws_it():
    """In 128 bytes the 16-byte units of row i change places by i."""
    at = np.arange(1024).reshape(8, 8, 16)
    rows = swizzled(at, 128)[:, :, 0] % 128 // 16
    np.testing.assert_array_equal(rows, [[unit ^ row for unit in range(8)] for row in range(8)])
    assert np.array_equal(swizzled(at, 16), at) and len(set(swizzled(at, 64).reshape(-1))) == 1024
