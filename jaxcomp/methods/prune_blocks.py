"""PruneBlocks: remove the blocks that the model misses least; nothing else is changed.

    PruneBlocks(remove=5, metric="bi")        measured on the calibration text
    PruneBlocks(blocks=(13, 14))              by hand
    PruneBlocks(plan="plan.json")             the `save_plan` of an earlier run, perhaps edited

What a run chose is in its rows, in `found_recipe.json` as `blocks`, and in the file `save_plan`.
Similarity metrics keep the answers of multiple choice better, loss metrics perplexity: report both.

Source: the metrics are those of `calibrate.importance`; the first block and the last are protected,
which only some of the sources do.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from jaxcomp.calibrate.importance import Selection, choose_blocks, plan_rows, plan_selection
from jaxcomp.calibrate.plan import ModelPlan
from jaxcomp.calibrate.stream import Calibration, Result, Run
from jaxcomp.core.metrics import Row
from jaxcomp.models.decoder import Decoder
from jaxcomp.models.depth import DepthPlan, check_removed, drop, load_plan, save_plan


@dataclasses.dataclass(frozen=True)
class PruneBlocks:
    """Settings: one of `remove`, `blocks` and `plan`.

    Attributes:
      remove: how many blocks to choose by `metric`.
      blocks: which blocks, from 0.
      plan: path of a plan to follow.
      save_plan: path where the plan is written, whoever made it.
      metric, contiguous, protect, avoid_outliers, seed, windows: of the choice; see `Selection`.
    """

    remove: int | None = None
    metric: str = "bi"
    blocks: tuple[int, ...] = ()
    plan: str | None = None
    save_plan: str | None = None
    contiguous: bool = False
    protect: tuple[int, int] = (1, 1)
    avoid_outliers: bool = False
    seed: int = 0
    windows: int | None = None

    def __post_init__(self):
        if (self.remove is not None) + bool(self.blocks) + (self.plan is not None) != 1:
            raise ValueError(
                f"remove={self.remove}, blocks={self.blocks}, plan={self.plan}: give one of the "
                "three, a number of blocks to choose, the blocks, or the path of a plan"
            )
        if self.remove is not None:
            assert self.selection  # refuses what means nothing

    @property
    def selection(self) -> Selection:
        """How blocks are chosen."""
        names = (f.name for f in dataclasses.fields(Selection))
        return Selection(**{name: getattr(self, name) for name in names})

    @property
    def needs_text(self) -> bool:
        """Whether the choice looks at text."""
        return self.remove is not None and self.selection.needs_text

    @property
    def files(self) -> tuple[str, ...]:
        """What the result depends on beside the settings."""
        return () if self.plan is None else (self.plan,)

    def __call__(
        self, model: Decoder, calib: Calibration | None = None, run: Run = Run()
    ) -> Result:
        self.check(model)
        warnings: tuple[str, ...] = ()
        if self.remove is not None:
            plan, warnings = choose_blocks("PruneBlocks", model, calib, self.selection, run)
        else:
            plan = self._given(model)
        plan.check(model)
        if self.save_plan is not None:
            save_plan(plan, self.save_plan)
        return Result(drop(model, plan.removed), plan_rows("PruneBlocks", plan, warnings))

    def check(self, model: Decoder) -> None:
        """Raises ValueError where the settings do not fit the model; reads no block."""
        if self.remove is not None:
            self.selection.check(model)
        else:
            drop(model, self._given(model).removed)

    def plan_model(self, model: Decoder, hidden: Any, batches: int) -> ModelPlan:
        """The programs of the choice, for a dry run; the last that may go stand for the chosen."""
        if self.remove is not None:
            return plan_selection(model, hidden, batches, self.selection)
        return ModelPlan([], 0, drop(model, self._given(model).removed))

    def found(self, rows: Iterable[Row]) -> "PruneBlocks":
        """The same choice by hand, from the rows of a run."""
        gone = (r.block for r in rows if r.step == "PruneBlocks" and r.metrics.get("removed") == 1)
        return PruneBlocks(blocks=tuple(gone))

    def _given(self, model: Decoder) -> DepthPlan:
        n = len(model.blocks)
        if self.plan is None:
            return DepthPlan(n, check_removed(self.blocks, n))
        plan = load_plan(self.plan)
        plan.check(model, weights=False)
        return plan
