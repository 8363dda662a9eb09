"""A model made ready to run: every weight in the form that the kernels of a chip read, once.

Linears that read one activation become one, so that a token costs fewer calls and the activation is
read once. What is computed stays the same up to the order of sums.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.linear import Linear, weight_of
from jaxcomp.core.quantize import QTensor
from jaxcomp.core.site import CONSUMER_SITES
from jaxcomp.core.tree import get_at, replace_many
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import Block, Decoder, iter_blocks
from jaxcomp.models.execution import integer_linears
from pallas_kernels import DenseWeight, Weight, current_chip, prepare_dense
from pallas_kernels import prepare as prepare_weight
from pallas_kernels.prepare import Activations

# Where one linear stands in place of several.
FUSED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "ffn.gate_up": ("ffn.gate", "ffn.up")}


def prepare(model: Decoder) -> Decoder:
    """The model on the default device, its weights in the form that the kernels there read.

    Blocks behind handles are loaded, one after another. A form is for one chip, and nothing but
    running the model is meant for it. A prepared model comes back as it is.
    """
    blocks = tuple(jax.device_put(prepare_block(block)) for block in iter_blocks(model))
    model = jax.device_put(model.replace(blocks=blocks))
    table = model.embed.weight
    if isinstance(table, QTensor):
        table = prepare_linear(Linear(table)).w
    if model.lm_head is not None:
        head = prepare_linear(model.lm_head)
    else:  # one table, held once
        if not isinstance(table, Weight | DenseWeight):
            table = prepare_dense(DenseWeight(table, transposed=True), current_chip())
        head = Linear(table)
    return model.replace(embed=model.embed.replace(weight=table), lm_head=head)


def prepare_block(block: Block) -> Block:
    """One block with its linears prepared, those of `FUSED` as one where they are alike."""
    if isinstance(block.attn.o.w, Weight | DenseWeight):
        return block
    codes, linears = integer_linears(block), anatomy(block).linears

    def activations(path: str) -> Activations:
        if path not in codes:
            return "floats"
        return "codes" if codes[path].spec.symmetric else "shifted codes"

    new = {path: get_at(block, path) for path in linears}
    kinds = {path: activations(path) for path in linears}
    for fused, paths in FUSED.items():
        own_site = any(CONSUMER_SITES[path] in block.sites for path in paths)
        if not own_site and (joined := join([new[path] for path in paths])) is not None:
            new |= dict.fromkeys(paths) | {fused: joined}
            kinds[fused] = kinds[paths[0]]
    new = {path: p and prepare_linear(p, kinds[path]) for path, p in new.items()}
    return replace_many(block, new)


def prepare_linear(p: Linear, activations: Activations = "floats") -> Linear:
    """The linear for the kernels of the current chip; a weight in any other form is left alone."""
    if isinstance(p.w, QTensor):
        return p.replace(w=prepare_weight(weight_of(p.w), current_chip(), activations))
    if isinstance(p.w, jax.Array | np.ndarray) and p.w.ndim == 2:
        return p.replace(w=prepare_dense(DenseWeight(jnp.asarray(p.w)), current_chip()))
    return p


def join(linears: Sequence[Linear]) -> Linear | None:
    """One linear with the output channels of several, in their order; None where they differ."""
    ws = [p.w for p in linears]
    kinds = {_kind(w) for w in ws}
    if len(kinds) > 1 or None in kinds:
        return None
    if isinstance(ws[0], QTensor):
        grid = lambda a, w: np.broadcast_to(a, (a.shape[0], w.shape[-1]))  # noqa: E731
        zero = None
        if ws[0].zero_point is not None:
            zero = _beside([grid(w.zero_point, w) for w in ws])
        scale = _beside([grid(w.scale, w) for w in ws])
        w = ws[0].replace(packed=_beside([w.packed for w in ws]), scale=scale, zero_point=zero)
    else:
        w = _beside(ws)
    if all(p.b is None for p in linears):
        return Linear(w)
    biases = [np.zeros(p.w.shape[-1], np.float32) if p.b is None else p.b for p in linears]
    return Linear(w, _beside(biases))


def _kind(w: object) -> tuple | None:
    """Equal for weights that can stand side by side; None for those that never can."""
    if isinstance(w, QTensor) and w.packed.ndim == 2:
        return w.bits, w.in_ch, w.scale.shape[0], w.zero_point is None
    if isinstance(w, jax.Array | np.ndarray) and w.ndim == 2:
        return w.dtype, w.shape[0]
    return None


def _beside(arrays: Sequence) -> np.ndarray:
    return np.concatenate([np.asarray(a) for a in arrays], axis=-1)
