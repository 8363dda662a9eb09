"""`prepare`: a weight in the form that the kernels of a chip read, made once at load."""

from typing import Literal

import jax.numpy as jnp
import numpy as np

from pallas_kernels.chips import Chip
from pallas_kernels.dense_matmul import DenseWeight
from pallas_kernels.dispatch import tell_once
from pallas_kernels.weight import Weight

MIN_DENSE = 1 << 14  # elements; a call of a kernel costs more than a smaller product

# What the weight is multiplied by: floats, codes, or codes with a zero point.
Activations = Literal["floats", "codes", "shifted codes"]


def prepare(w: Weight, chip: Chip, activations: Activations = "floats") -> Weight:
    """The weight for the kernels of `chip`; `weight.to_canonical` is the inverse.

    A weight that no kernel of the chip takes comes back in the canonical form, which the reference
    multiplies by; the reason is logged once.
    """
    try:
        if chip.platform == "cpu":
            from pallas_kernels.native import library, panels

            library.require()
            return panels.prepare(w, sums=activations == "shifted codes")
        if chip.platform == "gpu":
            from pallas_kernels.quant_matmul import prepare_gpu

            return prepare_gpu.prepare(w, chip, sums=activations == "shifted codes")
        if chip.platform == "tpu":
            from pallas_kernels.quant_matmul_int import prepare as integer

            return integer.prepare(w, chip, shifted=activations == "shifted codes")
        raise NotImplementedError(f"no kernels for {chip.name}")
    except NotImplementedError as refusal:
        tell_once(f"a weight {w.shape} stays in the canonical form ({refusal})")
        return w


def prepare_dense(w: DenseWeight, chip: Chip) -> DenseWeight:
    """A dense weight for the kernels of `chip`: in panels for a CPU, as it is for the others."""
    if chip.platform != "cpu" or w.out_ch or w.array.size < MIN_DENSE:
        return w
    from pallas_kernels.native import library, panels

    if w.array.dtype not in (jnp.float32, jnp.bfloat16) or not library.available():
        return w
    array = np.asarray(w.array)
    made = panels.dense_panels(array.T if w.transposed else array)
    return DenseWeight(jnp.asarray(made), out_ch=w.shape[1])
