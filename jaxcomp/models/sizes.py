"""How large a model is, from its structure alone, and how much memory the process has used."""

import pathlib
import resource
from typing import Any

import jax
import numpy as np

from jaxcomp.core.linear import Linear
from jaxcomp.core.quantize import QTensor
from jaxcomp.models.decoder import Decoder, block_struct, empty_cache


def sizes(model: Decoder) -> dict[str, int | float]:
    """Bytes by part and bits per weight; nothing is read from blocks behind handles.

    Returns:
      `embed_bytes`, `head_bytes` (final norm and untied head), `blocks_bytes`, `total_bytes`: as
      stored, with scales and zero points; `bits_per_weight`: stored bits of the blocks' linears
      over their weights, biases aside; `total_bits_per_weight`: of everything over everything;
      `parameters`; `dense16_bytes`: the same parameters at 16 bits.
    """
    blocks = [block_struct(b) for b in model.blocks]
    linears = [p for b in blocks for p in _find(b, Linear)]
    stored = sum(_bytes(p.w) for p in linears)
    weights = sum(_count(p.w) for p in linears)
    embed, head = _bytes(model.embed), _bytes((model.norm, model.lm_head))
    in_blocks = sum(map(_bytes, blocks))
    total = embed + head + in_blocks
    parameters = sum(map(_count, (model.embed, model.norm, model.lm_head, *blocks)))
    return {
        "embed_bytes": embed,
        "head_bytes": head,
        "blocks_bytes": in_blocks,
        "total_bytes": total,
        "dense16_bytes": 2 * parameters,
        "parameters": parameters,
        "bits_per_weight": 8 * stored / weights if weights else 0.0,
        "total_bits_per_weight": 8 * total / parameters,
    }


def cache_sizes(model: Decoder, tokens: int) -> dict[str, int | float]:
    """What the KV cache of one sequence of `tokens` tokens takes; nothing is computed or read.

    Returns:
      `cache_bytes`: keys and values of all blocks, with the grids kept beside codes;
      `bits_per_cached_value`: the same over the numbers that it stands for.
    """
    layers = jax.eval_shape(lambda: empty_cache(model, 1, tokens).layers)
    attns = [block_struct(b).attn for b in model.blocks]
    values = sum(2 * tokens * a.n_kv_heads * a.head_dim for a in attns)
    stored = _bytes(layers)
    return {"cache_bytes": stored, "bits_per_cached_value": 8 * stored / values if values else 0.0}


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes (VmHWM)."""
    return _status("VmHWM")


def rss() -> int:
    """Resident memory of this process now, in bytes (VmRSS); the peak where that is unknown."""
    return _status("VmRSS")


def _status(field: str) -> int:
    try:
        status = pathlib.Path("/proc/self/status").read_text()
    except OSError:  # not Linux; there ru_maxrss is in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _find(tree: Any, kind: type) -> list:
    found = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in found if isinstance(x, kind)]


def _bytes(tree: Any) -> int:
    return sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _count(tree: Any) -> int:
    """Parameters that `tree` stands for: codes count as the weights they encode."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, QTensor))
    return sum(int(np.prod(a.shape)) for a in leaves)
