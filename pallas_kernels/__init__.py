"""Kernels for compressed models. Arrays in, arrays out; depends on jax alone."""

from pallas_kernels.quant_matmul import quant_matmul

__all__ = ["quant_matmul"]
