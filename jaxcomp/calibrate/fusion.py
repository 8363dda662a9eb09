"""Blocks that take over the weights of a removed one: what is added, when it fits, how it folds.

    terms = attach(spec, block, seed)           zero additions to one block
    fused_block(block, donor, terms)            the block that computes, differentiated through
    folded_block(block, donor, terms)           the block that is kept, in its stored dtypes

The formula of one weight is `solvers.fusion`, the fit of a group `calibrate.group_fit`.
"""

import dataclasses
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.quantize import QTensor
from jaxcomp.core.tree import get_at, named_leaves, replace_many
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import Block
from jaxcomp.models.layers import RMSNorm
from jaxcomp.solvers.fusion import Coefficient, GroupLoss, fused, init_coefficient, init_lora

# Group of parameters → path of a weight, bias or norm → its parts in float32.
Terms = dict[str, dict[str, Any]]
Dtype = Literal["float32", "bfloat16"]
Seed = tuple[int, ...]
RATES = {"coefficients": "lr", "lora": "lora_lr", "norms": "norm_lr"}  # group → its setting


@dataclasses.dataclass(frozen=True)
class Fusion:
    """What is added to the blocks of a group and how it is fitted; `FuseGPT` explains the settings.

    Attributes:
      donors: whether the removed block's weights enter; without them LoRA and norms are left.
    """

    donors: bool = True
    coefficient: Coefficient = "low_rank"
    rank: int = 128
    lora_rank: int = 128
    lr: float = 1e-3
    lora_lr: float = 9.65e-6
    norm_lr: float = 9.65e-6
    loss: GroupLoss = "mse"
    token_limit: float | None = 10.0
    epochs: int = 20
    batch: int = 8
    dtype: Dtype = "float32"

    def __post_init__(self):
        for name, kind in (("coefficient", Coefficient), ("loss", GroupLoss), ("dtype", Dtype)):
            if getattr(self, name) not in typing.get_args(kind):
                known = ", ".join(typing.get_args(kind))
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {known}")
        for name, least in (("rank", 1), ("lora_rank", 0), ("epochs", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is below {least}")
        for name in ("lr", "lora_lr", "norm_lr"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} is not a rate from 0")
        if self.token_limit is not None and not self.token_limit > 0:
            raise ValueError(f"token_limit={self.token_limit} is not positive; None is no limit")
        if self.loss == "batch_kl" and self.batch < 2:
            raise ValueError(
                f"batch={self.batch}: batch_kl compares the windows of a batch with each other and "
                "is 0 for a single one; use batch=2 or more, or loss='mse'"
            )
        if not self.rates:
            raise ValueError(
                "nothing would be learned: every rate is 0, or lora_rank is; remove blocks alone "
                "with PruneBlocks"
            )

    @property
    def rates(self) -> dict[str, float]:
        """First learning rates of the groups of parameters that there are."""
        there = {"coefficients": self.donors, "lora": self.lora_rank > 0, "norms": True}
        rates = {name: getattr(self, setting) for name, setting in RATES.items() if there[name]}
        return {name: rate for name, rate in rates.items() if rate > 0}

    def steps(self, windows: int) -> int:
        """Updates in all; an incomplete batch of an epoch is left out.

        Raises:
          ValueError: fewer windows than a batch.
        """
        if windows < self.batch:
            raise ValueError(
                f"{windows} calibration windows are fewer than batch={self.batch}, so there would "
                "be no step; draw more (calib.samples), or use a smaller batch"
            )
        return self.epochs * (windows // self.batch)

    def check(self, blocks: list[Block]) -> None:
        """Refuses blocks that cannot take each other's weights; leaves may be structs.

        Raises:
          ValueError: names the block and the leaf.
        """
        for i, block in enumerate(blocks):
            for path in anatomy(block).linears:
                linear = get_at(block, path)
                if isinstance(linear.w, QTensor):
                    raise ValueError(
                        f"block {i}, {path} is quantized already, and weights are fused entry by "
                        "entry; fuse before the step that quantizes, or dequantize the model"
                    )
                self._check_ranks(f"block {i}, {path}", linear.w.shape)
            if self.donors:
                check_matching(block, blocks[0], f"block {i}", "block 0")

    def _check_ranks(self, where: str, shape: tuple[int, ...]) -> None:
        for name in ("rank", "lora_rank"):
            used = name != "rank" or (self.donors and self.coefficient == "low_rank")
            if used and getattr(self, name) > min(shape):
                raise ValueError(
                    f"{name}={getattr(self, name)} is above {min(shape)}, the smaller side of "
                    f"{where} {shape}; use at most that"
                )


def check_matching(survivor: Block, donor: Block, name: str, donor_name: str) -> None:
    """Refuses a donor whose weights do not fit entry by entry.

    Raises:
      ValueError: a linear or a bias that one of them lacks, or another shape.
    """
    ours, theirs = (
        {
            f"{path}.{part}": getattr(get_at(block, path), part).shape
            for path in anatomy(block).linears
            for part in ("w", "b")
            if getattr(get_at(block, path), part) is not None
        }
        for block in (survivor, donor)
    )
    for leaf in {**ours, **theirs}:
        if ours.get(leaf) != theirs.get(leaf):
            raise ValueError(
                f"{leaf} is {ours.get(leaf, 'not there')} in {name} and "
                f"{theirs.get(leaf, 'not there')} in {donor_name}; weights of unlike blocks do not "
                "fuse, use control='lora'"
            )


def attach(spec: Fusion, block: Block, seed: Seed) -> Terms:
    """Additions to one block that change nothing yet."""
    generator = np.random.default_rng(seed)
    terms: Terms = {name: {} for name in spec.rates}
    for path in anatomy(block).linears:
        linear = get_at(block, path)
        shape = linear.w.shape
        if "coefficients" in terms:
            parts = init_coefficient(spec.coefficient, generator, shape, spec.rank)
            terms["coefficients"][f"{path}.w"] = parts
            if linear.b is not None:
                row = init_coefficient("row", generator, shape, spec.rank)
                terms["coefficients"][f"{path}.b"] = row
        if "lora" in terms:
            terms["lora"][f"{path}.w"] = init_lora(generator, shape, spec.lora_rank)
    if "norms" in terms:
        terms["norms"] = {path: get_at(block, path) for path in _norms(block)}
    # Copied, because the updates donate them.
    return jax.tree.map(lambda a: jnp.array(a, jnp.float32), terms)


def fused_block(block: Block, donor: Block, terms: Terms) -> Block:
    """The block with its additions in place; what they touch is float32, the rest as it was."""
    parts, lora = terms.get("coefficients", {}), terms.get("lora", {})
    new = dict(terms.get("norms", {}))
    for path in dict.fromkeys((*parts, *lora)):
        theirs = get_at(donor, path) if path in parts else None
        new[path] = fused(get_at(block, path), theirs, parts.get(path), lora.get(path))
    return replace_many(block, new)


def folded_block(block: Block, donor: Block, terms: Terms) -> Block:
    """The same as plain weights in the dtypes of `block`."""
    return jax.tree.map(lambda a, b: a.astype(b.dtype), fused_block(block, donor, terms), block)


def _norms(block: Block) -> list[str]:
    is_norm = lambda p: isinstance(p, RMSNorm)  # noqa: E731
    return [f"{n}.weight" for n, p in named_leaves(block, is_norm).items() if is_norm(p)]
