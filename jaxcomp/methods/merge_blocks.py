"""MergeBlocks: neighbouring blocks become one by a weighted sum of their weights; a baseline.

    laco        W_0 + Σ_k (W_k − W_0)    a walk from the last to the first tries `span` at a time; a
                                         merge stays where the cosine of the model's answer with
                                         the dense one's is above `threshold`
    laco_code   the last one's weights   the same
    last        α W_0 + (1 − α) W_1      the last two, `remove` times; looks at no text

How many blocks go is what a walk finds, at most `remove`. What is left has plain weights, which
stock classes load; norms, and what else is no linear, are those of the first of the merged.
Channels and heads of neighbours correspond by nothing but the residual stream: expect less than
from removal with a patch. LinearPatch takes what was absorbed for removed, and mends such a place
only with inputs="compressed".

    MergeBlocks("laco", span=3, threshold=0.6)
    MergeBlocks("last", remove=5)
    MergeBlocks("laco", merges=((25, 3), (22, 3)))    by hand: first block and how many, the second
                                                      counted in what the first left

Source: Yang et al., LaCo, arXiv 2402.11187; its code subtracts weights that it has already replaced
and so keeps the last ones ("laco_code"). Liu et al., MKA, 2406.16330, for "last": its manifold
measure enters α alone, which comes out as 0.62 on nearly every input, so a constant stands for it;
the order of merges follows the authors' code, which never applies them. Departures from LaCo: a
score is of whole windows, a mean over `windows`, where the paper takes a few sentences; `remove`
and the last of `protect` are ours. `span` and `threshold` are the paper's for Baichuan2-13B; other
models want their own.
"""

import dataclasses
import functools
import logging
import math
import typing
from collections.abc import Iterable
from typing import Any

import jax

from jaxcomp.calibrate.merging import Found, Walk, find_merges, mixed_block
from jaxcomp.calibrate.plan import ModelPlan, Program, tree_bytes
from jaxcomp.calibrate.stream import (
    BlockStep,
    Calibration,
    Metrics,
    Result,
    Run,
    blockwise,
    check_one_process,
    check_text,
    first_windows,
)
from jaxcomp.core.metrics import Row
from jaxcomp.models.decoder import Block, Decoder, block_struct
from jaxcomp.models.depth import drop
from jaxcomp.models.mix import check_mixable
from jaxcomp.models.stream import block_step
from jaxcomp.solvers import selection
from jaxcomp.solvers.merging import Kind, Merge, Mix, absorbed, merge_all, merges_of_last

log = logging.getLogger(__name__)

NAME = "MergeBlocks"


@dataclasses.dataclass(frozen=True)
class MergeBlocks:
    """Settings.

    Attributes:
      kind: see the top of the file.
      remove: how many blocks go, of "last"; of a walk the most that may go, None for no limit.
      span: how many neighbours a walk merges into one.
      threshold: cosine above which a merge of a walk stays.
      interval: blocks by which a walk goes on after a merge that stays.
      alpha: α of "last", the share of the former of two.
      protect: how many first and last blocks stay as they are.
      windows: a walk looks at the first so many windows; None for all.
      merges: what to merge, in place of a search; as a run found it, or by hand.
    """

    kind: Kind = "laco"
    remove: int | None = None
    span: int = 3
    threshold: float = 0.6
    interval: int = 1
    alpha: float = 0.62
    protect: tuple[int, int] = (1, 0)
    windows: int | None = 8
    merges: tuple[Merge, ...] = ()

    def __post_init__(self):
        if self.kind not in typing.get_args(Kind):
            raise ValueError(f"kind={self.kind!r} is none of {', '.join(typing.get_args(Kind))}")
        if self.merges and self.remove is not None:
            raise ValueError(f"remove={self.remove} and merges={self.merges}: give one of them")
        if self.kind == "last" and not self.merges and self.remove is None:
            raise ValueError("kind='last' merges as often as `remove` says; give a number")
        for name, least in (("remove", 1), ("span", 2), ("interval", 1), ("windows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} is below {least}")
        if not -1 <= self.threshold < 1:
            raise ValueError(f"threshold={self.threshold} is outside [−1, 1); it is a cosine")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} is outside [0, 1]; it is a share")
        for one in self.merges:
            if type(one) is not tuple or [*map(type, one)] != [int, int]:
                raise ValueError(
                    f"merges={self.merges}: {one!r} is no merge; write the first block and how "
                    "many, as ((25, 3), (22, 3))"
                )
        selection.candidates(1, self.protect)

    @property
    def needs_text(self) -> bool:
        """Whether the choice looks at text."""
        return self.kind != "last" and not self.merges

    def __call__(
        self, model: Decoder, calib: Calibration | None = None, run: Run = Run()
    ) -> Result:
        self.check(model)
        n = len(model.blocks)
        found = self._search(model, calib, run) if self.needs_text else Found([], [])
        merges = tuple(found.merges) if self.needs_text else self._given(n)
        mixes = merge_all(n, merges, self.kind, self.alpha)
        put = functools.partial(_put, model, mixes)
        inner = dataclasses.replace(run, store=run.store and run.store.part("put"))
        smaller = blockwise(NAME, drop(model, absorbed(mixes)), None, put, None, inner).model
        rows = self._rows(n, mixes, merges, found)
        if unlike := _unlike(model, mixes):
            why = (
                f"the blocks that became blocks {', '.join(map(str, unlike))} differ in more than "
                "weights, as in windows or rotary bases; what is left has those of the first"
            )
            log.warning(why)
            rows[-1].metrics["warning 2"] = why
        return Result(smaller, rows)

    def check(self, model: Decoder) -> None:
        """Raises ValueError where the settings do not fit the model; reads no block."""
        check_mixable(model)
        n = len(model.blocks)
        if self.merges:
            merge_all(n, self.merges, self.kind, self.alpha)
            return
        allowed = len(selection.candidates(n, self.protect))
        wanted = {} if self.kind == "last" else {f"span={self.span}": self.span}
        if self.remove is not None:
            wanted[f"remove={self.remove}"] = self.remove + 1
        for setting, blocks in wanted.items():
            if blocks > allowed:
                raise ValueError(
                    f"{setting} merges {blocks} blocks, and of the model's {n} protect="
                    f"{self.protect} leaves {allowed}; merge fewer, or protect fewer"
                )

    def plan_model(self, model: Decoder, hidden: Any, batches: int) -> ModelPlan:
        """The programs of the walk, and a model with as many blocks as a first merge leaves, or as
        `remove` says; what a walk finds is not known before."""
        n = len(model.blocks)
        if not self.needs_text:
            left = merge_all(n, self._given(n), self.kind, self.alpha)
            return ModelPlan([], 0, drop(model, absorbed(left)))
        gone = self.remove or self.span - 1
        guess = drop(model, range(n - self.protect[1] - gone, n - self.protect[1]))
        if self.windows is not None:
            batches = min(batches, -(-self.windows // hidden.shape[0]))
        struct = block_struct(model.blocks[0])
        passes = n + n * (n + 1) // 2
        sums = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(struct))
        held = (n + 2) * batches * tree_bytes(hidden) + 2 * tree_bytes(struct) + sums
        return ModelPlan([Program(block_step, (struct, hidden), passes * batches)], held, guess)

    def found(self, rows: Iterable[Row]) -> "MergeBlocks":
        """The same merges by hand, from the rows of a run; the walk again where it kept none."""
        told = [r.metrics["merges"] for r in rows if r.step == NAME and r.block is None][-1]
        merges = tuple(tuple(map(int, one.split("+"))) for one in told.split(", ") if one)
        return dataclasses.replace(self, remove=None, merges=merges) if merges else self

    def _given(self, n_blocks: int) -> tuple[Merge, ...]:
        return self.merges or merges_of_last(n_blocks, self.remove, self.protect[1])

    def _search(self, model: Decoder, calib: Calibration | None, run: Run) -> Found:
        check_text(NAME, calib)
        check_one_process(NAME, run.place)
        calib = first_windows(calib, self.windows, run.place)
        how = Walk(**{name: getattr(self, name) for name in Walk._fields})
        told = functools.partial(run.progress or (lambda *args: None), NAME)
        return find_merges(model, calib, how, run, lambda done: told(done, len(model.blocks), []))

    def _rows(
        self, n_blocks: int, mixes: list[Mix], merges: tuple[Merge, ...], found: Found
    ) -> list[Row]:
        """Of every block of the original, then of the whole."""
        metrics: list[dict[str, Any]] = [{"removed": 0} for _ in range(n_blocks)]
        for i in absorbed(mixes):
            metrics[i]["removed"] = 1
        for mix in mixes:
            if len(mix.weights) > 1:
                metrics[mix.first]["weights"] = ", ".join(f"{w:.4g}" for w in mix.weights)
        for i, score in found.scores:
            metrics[i]["cosine"] = score
        whole: dict[str, Any] = {
            "kind": self.kind,
            "removed_blocks": ", ".join(map(str, absorbed(mixes))),
            "merges": ", ".join(f"{at}+{count}" for at, count in merges),
        }
        if self.needs_text:
            whole["trials"] = len(found.scores)
            if not merges:
                whole["warning 1"] = (
                    f"no merge kept a cosine above {self.threshold}, the best was "
                    f"{max(s for _, s in found.scores):.3g}; nothing is merged"
                )
            elif self.remove and len(absorbed(mixes)) < self.remove:
                whole["warning 1"] = (
                    f"{len(absorbed(mixes))} of {self.remove} blocks are gone: the walk reached "
                    f"the first; lower threshold={self.threshold} or interval={self.interval}, or "
                    "merge more at a time"
                )
        rows = [Row(NAME, i, None, numbers) for i, numbers in enumerate(metrics)]
        return [*rows, Row(NAME, None, None, whole)]


def _unlike(model: Decoder, mixes: list[Mix]) -> list[int]:
    """First blocks of mixes over blocks that differ in windows, heads or rotary bases."""
    kinds = [jax.tree.structure(block_struct(block)) for block in model.blocks]
    spans = {mix.first: kinds[mix.first : mix.first + len(mix.weights)] for mix in mixes}
    return [first for first, found in spans.items() if any(kind != found[0] for kind in found)]


def _put(model: Decoder, mixes: list[Mix], step: BlockStep) -> tuple[Block, Metrics]:
    """The block that a mix stands for, in the place of the first of it."""
    return mixed_block(model, mixes[step.index], step.block), {"": {}}
