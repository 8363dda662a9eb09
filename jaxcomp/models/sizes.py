"""How large a model is, from its structure alone, and how much memory the process has used."""

import pathlib
import resource
from typing import Any

import jax
import numpy as np

from jaxcomp.core.linear import Linear
from jaxcomp.core.quantize import QTensor
from jaxcomp.models.decoder import Decoder, block_struct


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
