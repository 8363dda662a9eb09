"""`prepare`: a quantized weight in the form that the kernels of a chip read, made once at load."""

from typing import Literal

from pallas_kernels.chips import Chip
from pallas_kernels.dispatch import tell_once
from pallas_kernels.weight import Weight

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
