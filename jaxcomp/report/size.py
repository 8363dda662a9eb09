"""Where the bytes of a model are."""

from typing import Any

import jax
import numpy as np

from jaxcomp.core.quantize import QTensor
from jaxcomp.models import sizes as model_sizes
from jaxcomp.models.decoder import Decoder, block_struct


def sizes(model: Decoder) -> dict[str, Any]:
    """`jaxcomp.models.sizes` and what the quantized weights consist of; nothing is read.

    Returns:
      besides those numbers `quantized_weights`, how many weights are behind codes;
      `codes_bytes`, `scales_bytes`, `zero_points_bytes`, which together are what they take;
      `quantized_bits`, that in bits per weight (0 where nothing is quantized); `block_bits`, the
      same for each block.
    """
    blocks = [_quantized(block_struct(block)) for block in model.blocks]
    quantized = [w for block in blocks for w in block]
    quantized += _quantized((model.embed, model.norm, model.lm_head))
    return {
        **model_sizes.sizes(model),
        "quantized_weights": sum(_count(w) for w in quantized),
        "codes_bytes": sum(_bytes(w.packed) for w in quantized),
        "scales_bytes": sum(_bytes(w.scale) for w in quantized),
        "zero_points_bytes": sum(_bytes(w.zero_point) for w in quantized),
        "quantized_bits": _bits(quantized),
        "block_bits": [_bits(block) for block in blocks],
    }


def _quantized(tree: Any) -> list[QTensor]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, QTensor))
    return [leaf for leaf in leaves if isinstance(leaf, QTensor)]


def _bits(weights: list[QTensor]) -> float:
    return 8 * sum(map(_bytes, weights)) / sum(map(_count, weights)) if weights else 0.0


def _bytes(tree: Any) -> int:
    return sum(int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def _count(weight: QTensor) -> int:
    return int(np.prod(weight.shape))
