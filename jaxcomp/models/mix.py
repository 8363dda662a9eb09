"""A block whose weights are a weighted sum of several blocks' weights."""

from collections.abc import Iterable

import jax.numpy as jnp

from jaxcomp.core.linear import Linear
from jaxcomp.core.tree import get_at, replace_many
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import Block, Decoder, block_struct
from jaxcomp.models.fold import check_dense


def weighted_sum(first: Block, others: Iterable[Block], weights: tuple[float, ...]) -> Block:
    """`first` with every linear, weight and bias, the weighted sum over all blocks.

    Sums are float32, results have the dtype of the first block, and so has all that is not a
    linear.

    Args:
      others: the blocks behind it, one in memory at a time.
      weights: of the first block and of the others.
    """
    paths = anatomy(first).linears
    sums = {path: _scaled(get_at(first, path), weights[0]) for path in paths}
    for block, weight in zip(others, weights[1:], strict=True):
        for path in paths:
            more = _scaled(get_at(block, path), weight)
            pairs = zip(sums[path], more, strict=True)
            sums[path] = [None if s is None else s + m for s, m in pairs]
    done = {}
    for path, (w, b) in sums.items():
        old = get_at(first, path)
        bias = None if b is None else b.astype(old.b.dtype)
        done[path] = Linear(w.astype(old.w.dtype), bias)
    return replace_many(first, done)


def check_mixable(model: Decoder) -> None:
    """Raises ValueError where blocks cannot be summed: other linears, shapes or biases; weights
    that are quantized; transforms, quantizers or patches made for the blocks as they are."""
    structs = [block_struct(block) for block in model.blocks]
    expected = _shapes(structs[0])
    for i, block in enumerate(structs):
        if block.patch is not None or block.sites:
            where = "its input" if block.patch is not None else next(iter(block.sites))
            raise ValueError(
                f"block {i} has a patch, a transform or a quantizer at {where}, made for its "
                "weights as they are; merge blocks before the step that adds it"
            )
        for path in anatomy(block).linears:
            check_dense(get_at(block, path), f"block {i}, {path}")
        shapes = _shapes(block)
        for path in {**shapes, **expected}:
            if (here := shapes.get(path)) != (there := expected.get(path)):
                raise ValueError(
                    f"{path} of block {i} is {here or 'absent'} and of block 0 "
                    f"{there or 'absent'}; blocks of different shapes have no sum"
                )


def _scaled(p: Linear, weight: float) -> list:
    return [None if x is None else weight * x.astype(jnp.float32) for x in (p.w, p.b)]


def _shapes(block: Block) -> dict[str, str]:
    """The shape of every linear and whether it has a bias, as a message says it."""
    parts = ((path, get_at(block, path)) for path in anatomy(block).linears)
    return {path: f"{p.w.shape}{'' if p.b is None else ' with a bias'}" for path, p in parts}
