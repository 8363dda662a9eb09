"""Depth: a model with fewer blocks, blocks behind gates, and the plan that says which ones go.

drop(model, removed)        the blocks are gone; the rest is the model's own, nothing is read
with_gates(model, gates)    a gate of 0 computes what `drop` gives; gates are data, so that one
                            compiled program serves every choice of a search
DepthPlan                   the choice with its reasons, as a small JSON file to read and edit
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from jaxcomp.core.plain import check_fields
from jaxcomp.core.tree import named_leaves
from jaxcomp.models.decoder import Decoder, block_struct, load_block, map_blocks

FORMAT = "jaxcomp-depth-plan"


def drop(model: Decoder, removed: Iterable[int]) -> Decoder:
    """The model without some of its blocks, which may be handles; `kept` says what is left.

    Args:
      removed: places of blocks, from 0, in any order; none leaves the model as it is.

    Raises:
      ValueError: a place that is not there or named twice; no block would be left; a block that
        goes carries a patch, which stands for blocks removed before.
    """
    removed = check_removed(removed, len(model.blocks))
    if not removed:
        return model
    for i in removed:
        if block_struct(model.blocks[i]).patch is not None:
            raise ValueError(
                f"block {i} carries the patch of blocks that were removed before it; remove blocks "
                "first and patch the cuts afterwards"
            )
    rest = [i for i in range(len(model.blocks)) if i not in set(removed)]
    places = range(len(model.blocks)) if model.kept is None else model.kept
    left = lambda values: tuple(values[i] for i in rest)  # noqa: E731
    stream = None if model.stream is None else left(model.stream)
    return model.replace(blocks=left(model.blocks), kept=left(places), stream=stream)


def with_gates(model: Decoder, gates: Float[Array, " blocks"]) -> Decoder:
    """The model with `gates[i]` as the gate of block i, in place of any it had.

    Blocks behind handles are loaded and stay in memory. Gates may be traced.

    Raises:
      ValueError: there is not one gate for each block.
    """
    if gates.shape != (len(model.blocks),):
        raise ValueError(f"gates of shape {gates.shape} for {len(model.blocks)} blocks")
    return map_blocks(model, lambda i, block: block.replace(gate=gates[i]))


def check_removed(removed: Iterable[int], n_blocks: int) -> tuple[int, ...]:
    """`removed` in order, if these blocks can go.

    Raises:
      ValueError: a place that is not there or named twice; or no block would be left.
    """
    removed = tuple(removed)
    for i in removed:
        if isinstance(i, bool) or not isinstance(i, int | np.integer) or not 0 <= i < n_blocks:
            raise ValueError(f"there is no block {i!r}; the model has blocks 0..{n_blocks - 1}")
        if removed.count(i) > 1:
            raise ValueError(f"block {i} is named twice in {removed}")
    if len(removed) == n_blocks:
        raise ValueError(f"all {n_blocks} blocks would be removed; leave at least one")
    return tuple(sorted(map(int, removed)))


def cuts(model: Decoder, original: Decoder | None = None) -> dict[int, tuple[int, int]]:
    """Where blocks are missing: index of the block behind the cut → [start, end) in the original.

    Blocks missing at the very end have no block behind them and are not among the cuts.

    Args:
      original: which model the places are counted in and what is missing is missing from; None for
        the one that was first pruned.

    Raises:
      ValueError: the model has blocks that the original lacks.
    """
    places = _places(model, original)
    before = [-1, *places]
    return {i: (before[i] + 1, at) for i, at in enumerate(places) if at > before[i] + 1}


def missing_at_end(model: Decoder, original: Decoder) -> range:
    """Blocks of the original behind the last that is left; see `cuts`."""
    return range(_places(model, original)[-1] + 1, len(original.blocks))


def _places(model: Decoder, original: Decoder | None) -> list[int]:
    """Where the blocks of the model stood in the original, or in the model first pruned."""
    if original is None or model.kept is None:
        return list(model.kept or range(len(model.blocks)))
    theirs = original.kept or tuple(range(len(original.blocks)))
    if absent := [i for i in model.kept if i not in theirs]:
        raise ValueError(
            f"the model keeps block {absent[0]} of the one that was first pruned, which the "
            "original given lacks; it was made from another model"
        )
    return [theirs.index(i) for i in model.kept]


def model_digest(model: Decoder) -> str:
    """What a plan knows its model by: sha256 of embedding, final norm, head, the first and the last
    block, and the number of blocks; two blocks are read."""
    ends = [load_block(model.blocks[i]) for i in {0: 0, len(model.blocks) - 1: 0}]
    digest = hashlib.sha256(str(len(model.blocks)).encode())
    for part in (model.embed, model.norm, model.lm_head, *ends):
        for name, leaf in named_leaves(part).items():
            array = np.ascontiguousarray(leaf)
            digest.update(f"{name} {array.shape} {array.dtype}".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class DepthPlan:
    """Which blocks go, and why.

    Attributes:
      n_blocks: of the model that it was made for.
      removed: places of the blocks that go.
      parent: `model_digest` of that model; "" for a plan written by hand, which fits any.
      metric: how blocks were chosen.
      text_sha256: of the calibration windows; "" where none were needed.
      tokens: in those windows.
      scores: what was measured of each block, or of each span by its first block, None where it was
        not; low ones go.
      margin: relative gap between the chosen and the next best; None where there is no such number.
      version: of the library.
    """

    n_blocks: int
    removed: tuple[int, ...]
    parent: str = ""
    metric: str = "by hand"
    text_sha256: str = ""
    tokens: int = 0
    scores: tuple[float | None, ...] = ()
    margin: float | None = None
    version: str = ""

    def __post_init__(self):
        if type(self.n_blocks) is not int or self.n_blocks < 1:
            raise ValueError(f"n_blocks={self.n_blocks!r} is no number of blocks")
        object.__setattr__(self, "removed", check_removed(self.removed, self.n_blocks))
        if bad := [s for s in self.scores if s is not None and not math.isfinite(s)]:
            raise ValueError(f"a score is {bad[0]}; a plan holds finite numbers")

    def check(self, model: Decoder, weights: bool = True) -> None:
        """Refuses another model than the one the plan was made for; see `model_digest`.

        Args:
          weights: read them; without it only the number of blocks is compared.

        Raises:
          ValueError: it has another number of blocks, or other weights.
        """
        if (n := len(model.blocks)) != self.n_blocks:
            raise ValueError(f"the plan is for a model of {self.n_blocks} blocks, this one has {n}")
        if weights and self.parent and self.parent != (found := model_digest(model)):
            raise ValueError(
                f"the plan was made for another model (parent {self.parent[:12]}…, this one is "
                f"{found[:12]}…); make it again, or empty its `parent` to use it anyway"
            )


def plan_to_json(plan: DepthPlan) -> dict[str, Any]:
    """The plan as JSON values."""
    values = dataclasses.asdict(plan)
    return {"format": FORMAT} | {k: list(v) if type(v) is tuple else v for k, v in values.items()}


def plan_from_json(data: Any) -> DepthPlan:
    """The inverse of `plan_to_json`; absent fields take their default.

    Raises:
      ValueError: it is no plan, or holds something unknown.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"this is no plan: its `format` is not {FORMAT!r}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "format"}
    check_fields(DepthPlan, values, "")
    return DepthPlan(**values)


def save_plan(plan: DepthPlan, path: os.PathLike | str) -> None:
    """Writes the plan as a JSON file."""
    text = json.dumps(plan_to_json(plan), indent=1, ensure_ascii=False)
    pathlib.Path(path).write_text(text + "\n", encoding="utf-8")


def load_plan(path: os.PathLike | str) -> DepthPlan:
    """Reads what `save_plan` wrote, perhaps edited since.

    Raises:
      ValueError: there is no such file, or it is no plan; the message names it.
    """
    path = pathlib.Path(path)
    try:
        return plan_from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"there is no plan {path}; make one with PruneBlocks") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
