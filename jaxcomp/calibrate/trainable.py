"""Which parameters of a whole model are trained: a partition of its tree, and the way back.

    split(cfg, model) ─▶ masters, frozen          masters: "blocks.3" or "ends" → path → float32
    merged(frozen.blocks[3], masters["blocks.3"])  the block that computes
    finished(block, masters["blocks.3"])           the block that is kept: additions folded, dtypes
                                                   as they were stored

A path is relative to its group; where a leaf is trained the frozen tree holds None. LoRA turns the
weights of linears into `core.linear.LowRank`, whose two factors are trained, and folds w + a b.
"""

import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxcomp.core.linear import Linear, LowRank, folded
from jaxcomp.core.quantize import QTensor
from jaxcomp.core.struct import static_value
from jaxcomp.core.tree import get_at, named_leaves, replace_many
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import Block, Decoder, block_struct, load_block
from jaxcomp.models.layers import RMSNorm

Kind = Literal["all", "blocks", "lora", "norms", "patches"]
Masters = dict[str, dict[str, Array]]
ENDS = "ends"  # embedding, final norm, head
UNTRAINED = ("sites", "gate")  # of a block: ranges and transforms of other methods, masks


@static_value
class Trainable:
    """What is trained.

    Attributes:
      kind: "all" weights; those of the "blocks" alone, without embedding, final norm and head;
        low-rank additions to linears ("lora"); the "norms"; or the "patches" at cuts.
      blocks: places of the blocks whose parameters are trained, without the parts outside the
        blocks; None for all. What precedes the first of them is computed once.
      linears: which linears get an addition, as `attn.q`; none given means all.
      rank: of the additions.
      seed: of their first factor; the second begins at zero.
    """

    kind: Kind = "all"
    blocks: tuple[int, ...] | None = None
    linears: tuple[str, ...] = ()
    rank: int = 16
    seed: int = 0

    def __post_init__(self):
        if self.kind not in typing.get_args(Kind):
            known = ", ".join(typing.get_args(Kind))
            raise ValueError(f"kind={self.kind!r} is none of {known}")
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} is below 1")
        if self.blocks is not None and (
            not self.blocks or min(self.blocks) < 0 or len(set(self.blocks)) < len(self.blocks)
        ):
            raise ValueError(
                f"blocks={self.blocks} are no places of blocks, each once; None means all"
            )

    @property
    def trains_ends(self) -> bool:
        """Whether parts outside the blocks are trained."""
        return self.blocks is None and self.kind in ("all", "norms")

    def check(self, model: Decoder) -> None:
        """Refuses a model in which this cannot be trained; reads no block.

        Raises:
          ValueError: a block that is not there, a quantized weight that would have to move, an
            unknown linear, or nothing to train.
        """
        total = len(model.blocks)
        if self.blocks and max(self.blocks) >= total:
            raise ValueError(f"there is no block {max(self.blocks)} to train among {total}")
        if self.trains_ends and self.kind == "all":
            _check_dense(model.embed.weight, "the embedding")
            if model.lm_head is not None:
                _check_dense(model.lm_head.w, "lm_head")
        names = 0
        for i in range(total):
            if self.blocks is None or i in self.blocks:
                names += len(trained_paths(self, block_struct(model.blocks[i]), i))
        if not names:
            raise ValueError(
                f"kind={self.kind!r}, blocks={self.blocks}: none of these blocks has any; patches "
                "are made by a step before this one"
            )


def trained_paths(cfg: Trainable, block: Block, index: int) -> list[str]:
    """Paths of the trained leaves of a block; of a LoRA, of the weights that get an addition.

    Raises:
      ValueError: one of them is quantized, or a linear is named that the block does not have.
    """
    linears = anatomy(block).linears
    if cfg.kind == "lora":
        if unknown := [path for path in cfg.linears if path not in linears]:
            raise ValueError(
                f"block {index} has no linear {unknown[0]!r}; there is: {', '.join(linears)}"
            )
        chosen = [path for path in linears if not cfg.linears or path in cfg.linears]
        for path in chosen:
            _check_dense(get_at(block, path).w, f"block {index}, {path}")
        return [f"{path}.w" for path in chosen]
    if cfg.kind in ("all", "blocks"):
        for path in linears:
            _check_dense(get_at(block, path).w, f"block {index}, {path}")
        return [n for n in named_leaves(block) if n.split(".")[0] not in UNTRAINED]
    if cfg.kind == "norms":
        return _norms(block)
    return [n for n in named_leaves(block) if n.split(".")[0] == "patch"]


def split(cfg: Trainable, model: Decoder, dtype: str) -> tuple[Masters, Decoder]:
    """The trained parameters in float32, and the model without them.

    Args:
      model: its blocks may be behind handles; those of the result are in memory.
      dtype: of products: dense weights that stay frozen are cast to it once.
    """
    masters, blocks = {}, []
    for i, block in enumerate(model.blocks):
        block = jax.device_put(load_block(block))
        trained = {}
        if cfg.blocks is None or i in cfg.blocks:
            paths = trained_paths(cfg, block, i)
            if cfg.kind == "lora":
                block, paths = _with_additions(cfg, block, paths, i)
            trained = {path: _master(get_at(block, path)) for path in paths}
            block = replace_many(block, dict.fromkeys(trained))
        if trained:
            masters[f"blocks.{i}"] = trained
        blocks.append(cast_frozen(block, dtype))
    ends = model.replace(blocks=())
    if cfg.trains_ends:
        paths = list(named_leaves(ends)) if cfg.kind == "all" else _norms(ends)
        masters[ENDS] = {path: _master(get_at(ends, path)) for path in paths}
        ends = replace_many(ends, dict.fromkeys(paths))
    return masters, ends.replace(blocks=tuple(blocks))


def merged(frozen: Any, masters: dict[str, Array]) -> Any:
    """A block, or the ends, with its trained parameters in place."""
    return replace_many(frozen, masters)


def finished(original: Any, masters: dict[str, Array]) -> Any:
    """`original`, a block or the ends, with what was learned: folded, in its stored dtypes.

    A leaf that was not trained is the very array it was.
    """
    new, additions = {}, {}
    for path, value in masters.items():
        linear, _, factor = path.rpartition(".w.")
        if linear:
            additions.setdefault(linear, {})[factor] = value
        else:
            new[path] = value.astype(get_at(original, path).dtype)
    for path, factors in additions.items():
        w = jnp.asarray(get_at(original, path).w)
        new[f"{path}.w"] = folded(LowRank(w=w, **factors))
    return replace_many(original, new)


def first_block(masters: Masters) -> int:
    """The first block through which a gradient must go; all of them where the embedding learns."""
    if "embed.weight" in masters.get(ENDS, {}):
        return 0
    return min((int(g.split(".")[1]) for g in masters if g != ENDS), default=0)


def _master(leaf: Array) -> Array:
    """A float32 copy: an update donates it."""
    return jnp.array(leaf, jnp.float32, copy=True)


def _with_additions(
    cfg: Trainable, block: Block, paths: list[str], index: int
) -> tuple[Block, list[str]]:
    """The block with a zero addition at every weight, and the paths of all factors."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(cfg.seed), index), len(paths))
    for key, path in zip(keys, paths, strict=True):
        w = get_at(block, path)
        bound = 1 / np.sqrt(w.shape[0])  # Kaiming's uniform with a = √5, as LoRA's code
        a = jax.random.uniform(key, (w.shape[0], cfg.rank), jnp.float32, -bound, bound)
        block = replace_many(block, {path: LowRank(w, a, jnp.zeros((cfg.rank, w.shape[1])))})
    return block, [f"{path}.{factor}" for path in paths for factor in ("a", "b")]


def cast_frozen(block: Block, dtype: str) -> Block:
    """The block with its dense weights in `dtype`; what is trained or quantized is left alone."""

    def cast(p: Any) -> Any:
        if not isinstance(p, Linear) or p.w is None or isinstance(p.w, QTensor):
            return p
        if isinstance(p.w, LowRank):
            return p.replace(w=p.w.replace(w=p.w.w.astype(dtype)))
        return p.replace(w=p.w.astype(dtype))

    return jax.tree.map(cast, block, is_leaf=lambda p: isinstance(p, Linear))


def _norms(tree: Any) -> list[str]:
    is_norm = lambda p: isinstance(p, RMSNorm)  # noqa: E731
    found = named_leaves(tree, is_leaf=is_norm)
    return [f"{path}.weight" for path, p in found.items() if is_norm(p)]


def _check_dense(w: Any, where: str) -> None:
    if isinstance(w, QTensor):
        raise ValueError(
            f"{where} is quantized already; train the weights before the step that quantizes, or "
            "train kind='norms'"
        )
