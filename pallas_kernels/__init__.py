"""Kernels for compressed models. Arrays in, arrays out; depends on jax alone."""

from pallas_kernels.kron_matmul import kron_matmul
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.quant_matmul_int import quant_matmul_int

__all__ = ["kron_matmul", "quant_matmul", "quant_matmul_int"]
