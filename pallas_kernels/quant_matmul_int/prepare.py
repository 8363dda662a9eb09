"""Weights for integer products in the form that the kernels of a chip read; made once, at load."""

import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.chips import Chip
from pallas_kernels.quant_matmul.prepare import tiled
from pallas_kernels.weight import Weight, codes_of


def prepare(w: Weight, chip: Chip, shifted: bool = False) -> Weight:
    """The weight for the kernels of `chip`; `weight.to_canonical` is the inverse.

    Args:
      shifted: activations will have a zero point, which takes the sums of the weight's columns.

    Raises:
      NotImplementedError: there is no kernel for such a chip or weight.
    """
    if chip.platform == "tpu":
        sums = group_sums(w) if shifted else None
        w = tiled(w)
        return w if sums is None else w.replace(sums=_padded_like(sums, w))
    if chip.platform == "gpu":
        from pallas_kernels.quant_matmul_int import prepare_gpu

        return prepare_gpu.prepare(w, chip)
    raise NotImplementedError(f"no kernel for {chip.name}")


def group_sums(w: Weight) -> Int32[Array, "*experts groups out_ch"]:
    """Σ q over the input channels of each group."""
    codes = codes_of(w)
    grouped = codes.reshape(*codes.shape[:-2], w.groups, w.group_size, w.out_ch)
    return jnp.sum(grouped, axis=-2, dtype=jnp.int32)


def _padded_like(sums: Array, w: Weight) -> Array:
    """With the padding of the scales and codes of a prepared weight."""
    rows = w.scale.shape[-2] - sums.shape[-2]
    cols = w.codes.shape[-1] - sums.shape[-1]
    return jnp.pad(sums, [(0, 0)] * (sums.ndim - 2) + [(0, rows), (0, cols)])
