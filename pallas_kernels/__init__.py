"""Kernels for compressed models. Arrays in, arrays out; depends on jax alone."""

from pallas_kernels.dense_matmul import DenseWeight, dense_matmul
from pallas_kernels.dispatch import current_chip, use
from pallas_kernels.grouped_quant_matmul import grouped_quant_matmul
from pallas_kernels.hadamard import hadamard
from pallas_kernels.kron_matmul import kron_matmul, kron_quantize
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.prepare import prepare, prepare_dense
from pallas_kernels.quant_decode_attention import quant_decode_attention
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.quant_matmul_int import quant_matmul_int
from pallas_kernels.quantize_tokens import quantize_tokens
from pallas_kernels.weight import Weight, canonical_weight

__all__ = [
    "DenseWeight",
    "Weight",
    "canonical_weight",
    "current_chip",
    "dense_matmul",
    "grouped_quant_matmul",
    "hadamard",
    "kron_matmul",
    "kron_quantize",
    "prefill_attention",
    "prepare",
    "prepare_dense",
    "quant_decode_attention",
    "quant_matmul",
    "quant_matmul_int",
    "quantize_tokens",
    "use",
]
