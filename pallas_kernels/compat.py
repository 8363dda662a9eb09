"""One source for several versions of JAX; each shim says when it can go.

The backends of Pallas are imported where they are used: a machine needs those of its own alone.
"""

from typing import Any

import jax
from jaxtyping import Array


def load_with_layout(ref: Any, layout: Any, optimized: bool = True) -> Array:
    """`plgpu.load`, which wants an index in 0.10 and takes none from 0.11 on."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # Until 0.10, the last for Python 3.11, is dropped.
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def store_line(ref: Any, values: Array) -> None:
    """Writes a line of less than 128 bytes to the card's memory, which 0.12 wants to be told."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if hasattr(plgpu, "store"):  # until 0.11 is dropped
        plgpu.store(ref, values, optimized=False)
    else:
        ref[...] = values


def gpu_interpreter(**settings: Any) -> Any:
    """What a kernel for GPUs takes as `interpret`; 0.10 has it, and keeps it to itself."""
    if jax.__version_info__ < (0, 11):
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    else:
        from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
    return InterpretGPUParams(**settings)
