"""Shapes and dtypes are checked in tests: in the numeric layers annotations hold at every call.

Functions that take JAX arrays take numpy's as well, so for the checks `Array` is either.
"""

import jax
import jaxtyping
import numpy as np

NUMERIC = (
    "pallas_kernels",
    "jaxcomp.core.activation",
    "jaxcomp.core.linear",
    "jaxcomp.core.quantize",
    "jaxcomp.core.site",
    "jaxcomp.core.transforms",
    "jaxcomp.kv",
    "jaxcomp.solvers",
    "jaxcomp.calibrate.stats",
    "jaxcomp.models.attention",
    "jaxcomp.models.decoder",
    "jaxcomp.models.ffn",
    "jaxcomp.models.fold",
    "jaxcomp.models.generate",
    "jaxcomp.models.layers",
    "jaxcomp.models.rope",
    "jaxcomp.models.stream",
)

jaxtyping.Array = jax.Array | np.ndarray
jaxtyping.install_import_hook(list(NUMERIC), "beartype.beartype")
