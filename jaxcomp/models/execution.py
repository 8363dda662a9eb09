"""How a model is executed: on which kernels, and quantized activations in floats or as integers.

`prepare` puts every weight into the form that the kernels of a chip read, once, for generation.

Simulation rounds an activation to its grid and multiplies floats; integer execution hands the codes
to the linears, which sum in int32. Which of them happens is said by the quantizers of the block
(`ActQuantizer.integer`); `use_integer` switches them. In float32 both compute the same function; in
bfloat16 simulation also rounds each value of the grid.
"""

import dataclasses

import jax
import numpy as np

from jaxcomp.core.linear import Linear, weight_of
from jaxcomp.core.quantize import QTensor
from jaxcomp.core.site import CONSUMER_SITES, ActQuantizer, Site
from jaxcomp.core.tree import get_at, replace_many
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import Block, BlockHandle, Decoder, block_struct, iter_blocks
from pallas_kernels import DenseWeight, current_chip
from pallas_kernels import prepare as prepare_weight
from pallas_kernels.prepare import Activations


def prepare(model: Decoder) -> Decoder:
    """The model on the default device, its weights in the form that the kernels there read.

    Blocks behind handles are loaded, one after another. What it computes is the same up to the
    order of sums; a form is for one chip, and nothing but running the model is meant for it.
    """
    blocks = tuple(jax.device_put(prepare_block(block)) for block in iter_blocks(model))
    model = jax.device_put(model.replace(blocks=blocks))
    if model.lm_head is None:
        tied = DenseWeight(model.embed.weight, transposed=True)
        return model.replace(lm_head=Linear(tied))
    return model.replace(lm_head=prepare_linear(model.lm_head))


def prepare_block(block: Block) -> Block:
    """One block with all its linears prepared."""
    codes, new = integer_linears(block), {}
    for path in anatomy(block).linears:
        quantizer = codes.get(path)
        if quantizer is None:
            activations = "floats"
        else:
            activations = "codes" if quantizer.spec.symmetric else "shifted codes"
        new[path] = prepare_linear(get_at(block, path), activations)
    return replace_many(block, new)


def prepare_linear(p: Linear, activations: Activations = "floats") -> Linear:
    """The linear for the kernels of the current chip; a weight in any other form is left alone."""
    if isinstance(p.w, QTensor):
        return p.replace(w=prepare_weight(weight_of(p.w), current_chip(), activations))
    if isinstance(p.w, jax.Array | np.ndarray) and p.w.ndim == 2:
        return p.replace(w=DenseWeight(p.w))
    return p


@dataclasses.dataclass(frozen=True)
class IntegerBlock:
    """A block behind a handle that runs in integers once it is read."""

    handle: BlockHandle

    def load(self) -> Block:
        """See `BlockHandle`."""
        return integer_block(self.handle.load())

    def struct(self) -> Block:
        """See `BlockHandle`."""
        return integer_block(self.handle.struct())


def use_integer(model: Decoder) -> Decoder:
    """The model with every quantized input of a linear handed over as codes; reads no block.

    Queries and caches are left alone: attention is computed in floats. A linear whose input is not
    quantized stays as it is.

    Raises:
      ValueError: no linear reads a quantized activation, or one does that cannot run in integers;
        the message names the block, the linear and the reason.
    """
    any_site = False
    for i, block in enumerate(map(block_struct, model.blocks)):
        try:
            any_site |= bool(integer_sites(block))
        except ValueError as error:
            raise ValueError(f"block {i}, {error}; use simulated execution") from None
    if not any_site:
        raise ValueError(
            "no linear of the model reads a quantized activation, so there is nothing to run in "
            "integers; compress with a grid for activations, or use simulated execution"
        )
    switch = lambda b: IntegerBlock(b) if isinstance(b, BlockHandle) else integer_block(b)  # noqa: E731
    return model.replace(blocks=tuple(map(switch, model.blocks)))


def integer_block(block: Block) -> Block:
    """The block with the quantizers of `integer_sites` switched to integers."""
    sites = {name: block.sites[name] for name in integer_sites(block)}
    on = {n: s.replace(quantizer=s.quantizer.replace(integer=True)) for n, s in sites.items()}
    return block.replace(sites=block.sites | on)


def integer_sites(block: Block) -> tuple[str, ...]:
    """Sites whose quantizer is the last thing before some linear, in execution order.

    Raises:
      ValueError: one of them cannot run in integers; the message begins with the linear's path.
    """
    found = {}
    for path, (site, quantizer) in _quantized_inputs(block).items():
        shared, own = anatomy(block).linears[path], CONSUMER_SITES.get(path, "")
        spec = quantizer.spec
        if site == shared and block.sites.get(own, Site()).transforms:
            raise ValueError(f"{path}: what {own} transforms after {shared} rounded it is no code")
        if not spec.dynamic and spec.granularity != "tensor":
            raise ValueError(
                f"{path}: the grid of {site} is {spec} and static, and only one scale for all "
                "channels of a token can be taken out of a sum of integers"
            )
        if not isinstance(get_at(block, path).w, QTensor):
            raise ValueError(f"{path}: its input {site} is quantized and its weight is dense")
        found[site] = None
    return tuple(found)


def integer_linears(block: Block) -> dict[str, ActQuantizer]:
    """Linears that are handed codes → the quantizer that makes them."""
    inputs = _quantized_inputs(block)
    return {path: quantizer for path, (_, quantizer) in inputs.items() if quantizer.integer}


def _quantized_inputs(block: Block) -> dict[str, tuple[str, ActQuantizer]]:
    """Linears with a quantized input → the site whose quantizer comes last, and that."""
    found = {}
    for path, shared in anatomy(block).linears.items():
        own = CONSUMER_SITES.get(path, "")
        last = own if block.sites.get(own, Site()).quantizer is not None else shared
        quantizer = block.sites.get(last, Site()).quantizer
        if quantizer is not None:
            found[path] = (last, quantizer)
    return found
