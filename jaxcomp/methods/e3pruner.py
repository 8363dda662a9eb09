"""E³-Pruner: search which blocks go by descent through random masks, then distil what is left.

Three parts, one after another:
    search     one score a block; masks of exactly K ones drawn by the scores; the divergence from
               the original's top words, and its gradient straight through the mask
    drop       the blocks whose removal cost least on windows set aside
    recover    the rest learns the original's top words, tokens weighted by the teacher's entropy

    E3Pruner(5)                      both stages
    E3Pruner(5, recover=None)        the search alone; weights are left as they are
    E3Pruner(blocks=(13, 14))        the second stage for blocks that are known

The search is `calibrate.mask_search` over `solvers.subset`, the recovery `calibrate.distillation`.
What a run chose is in its rows, in `found_recipe.json` as `blocks`, and in the file `save_plan`.

Source: Yuan et al., E³-Pruner, arXiv 2511.17205. Only its abstract and what its reviews say was at
hand, no code and no formula. From there: the Gumbel-TopK mask with a straight-through gradient, the
start by divergences, the growing number of removed blocks, a falling temperature, the ten offline
words and weights by entropy. Reconstructed by us: the soft mask of the gradient, the shape of every
schedule and every rate, the formula of the start, weights that do not move while the search goes
on, the choice by windows set aside, the formula of the weights by entropy, and what is trained in
the second stage.
"""

import dataclasses
import importlib.metadata
import logging
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.calibrate.descent import Descent, step_programs
from jaxcomp.calibrate.distillation import (
    Lesson,
    check_teacher,
    distil,
    plan_distillation,
    workplace,
)
from jaxcomp.calibrate.importance import plan_rows, text_digest
from jaxcomp.calibrate.losses import Targets, TopKLoss
from jaxcomp.calibrate.mask_record import Mask
from jaxcomp.calibrate.mask_search import MaskSearch, check_search, masked_student, search_mask
from jaxcomp.calibrate.plan import ModelPlan, Program, tree_bytes
from jaxcomp.calibrate.saliency import check_weights
from jaxcomp.calibrate.start_scores import passes, start_scores
from jaxcomp.calibrate.stream import Calibration, Result, Run, check_text
from jaxcomp.calibrate.teacher import teacher_cache
from jaxcomp.calibrate.trainable import Trainable
from jaxcomp.core.metrics import Row
from jaxcomp.core.struct import static_value
from jaxcomp.models.decoder import Decoder, block_struct
from jaxcomp.models.depth import DepthPlan, check_removed, drop, model_digest, save_plan
from jaxcomp.models.stream import block_step
from jaxcomp.solvers import selection

NAME = "E3Pruner"
CHOICE = "E3Pruner choice"  # the step's name in rows about what is removed

log = logging.getLogger(__name__)


@static_value
class Recovery:
    """The second stage.

    Attributes:
      train: what is trained; see `Distill`.
      loss: how the model is compared with the original's words.
      fit: epochs, rates, batch, dtype.
    """

    train: Trainable = Trainable()
    loss: TopKLoss = TopKLoss(entropy="up")
    fit: Descent = Descent(lr=5e-5, weight_decay=0.1)


@dataclasses.dataclass(frozen=True)
class E3Pruner:
    """Settings: one of `remove` and `blocks`.

    Attributes:
      remove: how many blocks to search for.
      blocks: which blocks, from 0; nothing is searched.
      search: how; its steps, rates, schedules and windows.
      loss: of the search; the divergence from the original's words.
      recover: the second stage; None leaves it out.
      k: words of the original that are kept at every position, for both stages.
      protect: how many first and last blocks stay in any case.
      cache: a directory for the words that several runs may share; None keeps them with the run's
        unfinished work and removes them with it.
      save_plan: path where the plan is written, whoever made it.
    """

    remove: int | None = None
    blocks: tuple[int, ...] = ()
    search: MaskSearch = MaskSearch()
    loss: TopKLoss = TopKLoss()
    recover: Recovery | None = Recovery()
    k: int = 10
    protect: tuple[int, int] = (1, 1)
    cache: str | None = None
    save_plan: str | None = None

    def __post_init__(self):
        if (self.remove is None) == (not self.blocks):
            raise ValueError(
                f"remove={self.remove}, blocks={self.blocks}: give one of the two, a number of "
                "blocks to search for, or the blocks"
            )
        if self.k < 2:
            raise ValueError(f"k={self.k} is below 2; one word has no distribution")
        selection.candidates(1, self.protect)

    @property
    def needs_text(self) -> bool:
        """Whether a stage looks at text."""
        return self.remove is not None or self.recover is not None

    def check(self, model: Decoder) -> None:
        """Raises ValueError where the settings do not fit the model; reads no block."""
        if self.k > model.config.vocab_size:
            raise ValueError(
                f"k={self.k} exceeds the vocabulary of {model.config.vocab_size} words; use less"
            )
        if self.remove is not None:
            check_search(self.remove, self._free(model))
            check_weights(model, NAME)
            for i, block in enumerate(map(block_struct, model.blocks)):
                if block.gate is not None or block.patch is not None:
                    part = "gate" if block.gate is not None else "patch"
                    raise ValueError(f"block {i} carries a {part}; search before it gets one")
        small = drop(model, self.blocks or self._free(model)[-self.remove :])
        if self.recover is not None:
            self.recover.train.check(small)

    def __call__(
        self, model: Decoder, calib: Calibration | None = None, run: Run = Run()
    ) -> Result:
        self.check(model)
        run = dataclasses.replace(run, original=run.original or model)
        with workplace(run) as work:
            cache = self.cache or str(work / "teacher")
            if self.needs_text:
                check_text(NAME, calib)
                check_teacher(NAME, model, run)
            plan, rows = DepthPlan(len(model.blocks), self.blocks or (0,)), []
            if self.remove is not None:
                found = self._search(model, calib, run, work, cache)
                plan = self._plan(model, calib, found)
                rows = [Row(CHOICE, None, None, found.metrics)]
                rows += plan_rows(CHOICE, plan, found.warnings)
            else:
                rows = plan_rows(CHOICE, plan)
            if self.save_plan is not None:
                save_plan(plan, self.save_plan)
            small = drop(model, plan.removed)
            if self.recover is None:
                return Result(small, rows)
            inner = dataclasses.replace(run, store=run.store and run.store.part("recover"))
            how = {f.name: getattr(self.recover, f.name) for f in dataclasses.fields(Recovery)}
            result = distil(NAME, small, calib, inner, k=self.k, cache=cache, **how)
        return Result(result.model, rows + result.rows)

    def found(self, rows: Iterable[Row]) -> "E3Pruner":
        """The same with the blocks by hand, from the rows of a run."""
        gone = (r.block for r in rows if r.step == CHOICE and r.metrics.get("removed") == 1)
        return dataclasses.replace(self, remove=None, blocks=tuple(gone))

    def plan_model(self, model: Decoder, hidden: Any, batches: int) -> ModelPlan:
        """The programs of both stages for a dry run; the last that may go stand for the chosen."""
        removed, programs, kept = self.blocks, [], 0
        if self.remove is not None:
            removed = self._free(model)[-self.remove :]
            programs, kept = self._plan_search(model, hidden, batches)
        small = drop(model, check_removed(removed, len(model.blocks)))
        if self.recover is None:
            return ModelPlan(programs, kept, small)
        how = self.recover
        more = plan_distillation(small, hidden, batches, how.train, how.loss, how.fit, self.k)
        return ModelPlan(programs + more.programs, max(kept, more.kept_bytes), more.result)

    def _free(self, model: Decoder) -> tuple[int, ...]:
        return selection.candidates(len(model.blocks), self.protect)

    def _search(
        self, model: Decoder, calib: Calibration, run: Run, work: pathlib.Path, cache: str
    ) -> Mask:
        how, free, n = self.search, self._free(model), len(model.blocks)
        tokens = calib.tokens[: how.windows]
        if len(tokens) < how.needed_windows:
            raise ValueError(
                f"{len(tokens)} windows of text, and a search with batch={how.batch} and "
                f"validation={how.validation} needs {how.needed_windows}; draw more, or use less"
            )

        def told(total: int):
            return lambda done, *_: run.progress and run.progress(NAME, done, total, [])

        total = passes(how.init, n, self.remove)
        some = dataclasses.replace(calib, tokens=tokens[: how.init_windows])

        def begin() -> list[float]:
            if total:
                told(total)(0)
            start = (some, free, self.remove, how.spread, how.seed, told(total))
            return [float(s) for s in start_scores(how.init, model, *start)]

        scores = run.store.keep("start", begin) if run.store else begin()
        # The words of all windows, where the second stage will want them.
        whole = tokens if self.recover is None else calib.tokens
        tick = lambda done, shards: run.progress and run.progress(NAME, done, shards, [])  # noqa: E731
        place = pathlib.Path(cache)
        words = teacher_cache(place, run.original, whole, self.k, calib.batch, tick)
        lesson = Lesson(tokens, np.ones(tokens.shape, bool), words)
        start = np.array(scores, np.float32)
        where = (lesson, start, free, self.remove, how, self.loss, work)
        return search_mask(NAME, model, *where, run)

    def _plan(self, model: Decoder, calib: Calibration, found: Mask) -> DepthPlan:
        tokens = calib.tokens[: self.search.windows]
        scores: list[float | None] = [None] * len(model.blocks)
        for i, score in zip(self._free(model), found.scores, strict=True):
            scores[i] = score
        text = text_digest(tokens)
        version = importlib.metadata.version("jaxcomp")
        known = model_digest(model), "e3", text, tokens.size, tuple(scores), None, version
        return DepthPlan(len(model.blocks), found.removed, *known)

    def _plan_search(self, model: Decoder, hidden: Any, batches: int) -> tuple[list[Program], int]:
        """The start, the teacher's pass, the steps and the looks between them."""
        how, n = self.search, len(model.blocks)
        structs = model.replace(blocks=tuple(map(block_struct, model.blocks)))
        rows, time, width = hidden.shape
        some = min(-(-how.init_windows // rows), batches)
        walked = {"kl": n * (n + 1) // 2, "bi": n}.get(how.init, 0)
        if how.init == "sleb":
            walked = sum((n - r) * (n - r + 1) // 2 for r in range(self.remove))
        passed = walked * some + n * batches
        programs = [Program(block_step, (structs.blocks[0], hidden), passed)]
        student = jax.eval_shape(lambda m: masked_student(m, self._free(m), how.dtype), structs)
        at = lambda shape, dtype: jax.ShapeDtypeStruct((how.batch, time, *shape), dtype)  # noqa: E731
        words = at((self.k,), jnp.int32), at((self.k,), jnp.float32), at((), jnp.float32)
        targets = Targets(*words, at((), jnp.int32), at((), jnp.bool_))
        x = at((width,), jnp.dtype(how.dtype))
        fit = Descent(dtype=how.dtype, remat=how.remat)
        steps = step_programs(student, x, targets, self.loss, fit, how.steps)
        programs += [Program(*p) for p in steps[:-1]]  # the last is the update of weights
        saved = 1 if how.remat else 40
        return programs, tree_bytes(student) + saved * n * tree_bytes(x)
