"""How quantized activations are executed: simulated in floats, or as integers.

Simulation rounds an activation to its grid and multiplies floats; integer execution hands the codes
to the linears, which sum in int32. Which of them happens is said by the quantizers of the block
(`ActQuantizer.integer`); `use_integer` switches them. In float32 both compute the same function; in
bfloat16 simulation also rounds each value of the grid.
"""

import dataclasses

from jaxcomp.core.quantize import QTensor
from jaxcomp.core.site import CONSUMER_SITES, ActQuantizer, Site
from jaxcomp.core.tree import get_at
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import Block, BlockHandle, Decoder, block_struct


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
