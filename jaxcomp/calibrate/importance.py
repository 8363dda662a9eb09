"""Which blocks a model would miss least: a metric, a number to remove, and a plan comes out.

    metric            what it measures                                     how blocks are chosen
    bi                change of direction over a block                     the smallest
    relative_change   size of the change over a block                      the smallest
    block_cos         change of direction over a span                      the smallest span
    channel_cos       the same along time, channel by channel              the smallest span
    angular           the same as an angle, at the last token alone        the smallest span
    ppl               loss without a block                                 the smallest
    sleb              loss without a block                                 one by one, measured anew
    macro_influence   change of the final states without a block           one by one, measured anew
    taylor            first-order change of the loss                       the smallest
    taylor+           the same, but none of the first 4 and the last 2     the smallest
    magnitude         sum of |w|; a negative control                       the smallest
    random, every_other, deepest   controls that look at nothing

Similarities are in `calibrate.similarity`, losses in `calibrate.removal`, the rest in
`calibrate.saliency`, with their sources. Importance does not add up: the best set of n + 1 blocks
need not hold the best set of n.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcomp.calibrate.plan import ModelPlan, Program, tree_bytes
from jaxcomp.calibrate.removal import Tick, influences, losses_without
from jaxcomp.calibrate.saliency import backward, check_weights, magnitude, taylor
from jaxcomp.calibrate.similarity import outlier_blocks, peaks, similarity
from jaxcomp.calibrate.stream import Calibration, Run, check_one_process, check_text, first_windows
from jaxcomp.core.metrics import Row
from jaxcomp.models.decoder import Decoder, block_struct
from jaxcomp.models.depth import DepthPlan, drop, model_digest, plan_from_json, plan_to_json
from jaxcomp.models.stream import block_step
from jaxcomp.solvers import selection
from jaxcomp.solvers.selection import Choice

log = logging.getLogger(__name__)

SPANS = {"block_cos": "cosine", "channel_cos": "channel_cosine", "angular": "angle"}
SINGLE = {"bi": "influence", "relative_change": "change"}
GREEDY = {"sleb": losses_without, "macro_influence": influences}
CONTROLS = ("random", "every_other", "deepest")
METRICS = (*SINGLE, *SPANS, "ppl", *GREEDY, "taylor", "taylor+", "magnitude", *CONTROLS)
TAYLOR_PLUS = (4, 2)  # first and last blocks that taylor+ never removes
CLOSE = 0.01  # a margin below this is within what other text would change


@dataclasses.dataclass(frozen=True)
class Selection:
    """How blocks are chosen; see the top of the file.

    Attributes:
      remove: how many.
      metric: one of METRICS.
      contiguous: neighbours only; metrics of spans always choose so, the others by the sum of the
        scores. Not with metrics that choose one by one.
      protect: how many first and last blocks stay in any case.
      avoid_outliers: keep blocks that create or undo a massive activation.
      seed: of "random".
      windows: measure on the first so many of the calibration windows; None for all.
    """

    remove: int
    metric: str = "bi"
    contiguous: bool = False
    protect: tuple[int, int] = (1, 1)
    avoid_outliers: bool = False
    seed: int = 0
    windows: int | None = None

    def __post_init__(self):
        if self.metric not in METRICS:
            raise ValueError(f"metric={self.metric!r} is none of {', '.join(METRICS)}")
        if self.contiguous and (self.metric in GREEDY or self.metric in CONTROLS):
            raise ValueError(f"metric={self.metric!r} does not choose neighbours; leave contiguous")
        if self.windows is not None and self.windows < 1:
            raise ValueError(f"windows={self.windows} is below 1; None takes all there are")
        selection.candidates(1, self.protect)

    @property
    def needs_text(self) -> bool:
        """Whether the metric looks at text."""
        return self.avoid_outliers or self.metric not in ("magnitude", *CONTROLS)

    def allowed(self, n_blocks: int, avoid: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The blocks that may go.

        Raises:
          ValueError: fewer than are to be removed.
        """
        protect = self.protect
        if self.metric == "taylor+":
            protect = tuple(map(max, protect, TAYLOR_PLUS))
        allowed = selection.candidates(n_blocks, protect, avoid)
        selection.check_remove(self.remove, allowed, n_blocks)
        return allowed

    def check(self, model: Decoder) -> None:
        """Raises ValueError where the settings do not fit the model; reads no block."""
        n_blocks, allowed = len(model.blocks), self.allowed(len(model.blocks), patched(model))
        if self.metric in SPANS or self.contiguous:
            selection.smallest_span(np.zeros(n_blocks - self.remove + 1), self.remove, allowed)
        if self.metric in ("taylor", "taylor+", "magnitude"):
            check_weights(model, self.metric)


def patched(model: Decoder) -> tuple[int, ...]:
    """Blocks that carry the patch of others that were removed, and so have to stay."""
    structs = map(block_struct, model.blocks)
    return tuple(i for i, block in enumerate(structs) if block.patch is not None)


class Chosen(NamedTuple):
    """A plan, and what its user should know."""

    plan: DepthPlan
    warnings: tuple[str, ...]


def choose_blocks(
    name: str, model: Decoder, calib: Calibration | None, how: Selection, run: Run = Run()
) -> Chosen:
    """Measures `model`, whose blocks may be handles, and chooses.

    Args:
      name: of the step, in messages and for progress.
      run: with a store, what is found is kept there, and greedy choices after each removal.

    Raises:
      ValueError: the settings do not fit; no text where it is needed; a number that is not finite,
        with the block and the batch.
    """
    how.check(model)
    if how.needs_text:
        check_text(name, calib)
    check_one_process(name, run.place)
    if calib is not None:
        calib = first_windows(calib, how.windows, run.place)
    make = lambda: _choose(name, model, calib, how, run)  # noqa: E731
    kept = run.store.keep("plan", make) if run.store else make()
    return Chosen(plan_from_json(kept["plan"]), tuple(kept["warnings"]))


def plan_rows(name: str, plan: DepthPlan, warnings: Iterable[str] = ()) -> list[Row]:
    """A plan as rows: of every block whether it is removed and its score, then of the whole."""
    spans = len(plan.scores) < plan.n_blocks
    rows = []
    for i in range(plan.n_blocks):
        metrics: dict[str, Any] = {"removed": int(i in plan.removed)}
        if not spans and plan.scores[i] is not None:
            metrics["score"] = plan.scores[i]
        rows.append(Row(name, i, None, metrics))
    whole: dict[str, Any] = {
        "metric": plan.metric,
        "removed_blocks": ", ".join(map(str, plan.removed)),
    }
    if plan.margin is not None:
        whole["margin"] = plan.margin
    whole |= {f"warning {k}": text for k, text in enumerate(warnings, 1)}
    return [*rows, Row(name, None, None, whole)]


def text_digest(tokens: np.ndarray) -> str:
    """sha256 of the shape and the tokens, as the report has it of the calibration windows."""
    shape = np.asarray(tokens.shape, "<i8").tobytes()
    return hashlib.sha256(shape + tokens.astype("<i4").tobytes()).hexdigest()


def plan_selection(model: Decoder, hidden: Any, batches: int, how: Selection) -> ModelPlan:
    """The programs of a choice for a dry run, and a model of the right depth.

    The last blocks that may go stand for those that will be chosen, the very last only if it must:
    then no block is behind the cut.
    """
    n, structs = len(model.blocks), [block_struct(block) for block in model.blocks]
    allowed = how.allowed(n, patched(model))
    inner = tuple(i for i in allowed if i < n - 1)
    guess = drop(model, (inner if len(inner) >= how.remove else allowed)[-how.remove :])
    if how.windows is not None and hidden is not None:
        batches = min(batches, -(-how.windows // hidden.shape[0]))
    if not how.needs_text:
        return ModelPlan([], 0, guess)
    passes, streams = n, 1
    if how.metric in (*SINGLE, *SPANS):
        streams = how.remove + 1 if how.metric in SPANS else 2
    elif how.metric == "ppl" or how.metric in GREEDY:
        rounds = how.remove if how.metric in GREEDY else 1
        passes = sum((n - r) * (n - r + 1) // 2 for r in range(rounds))
        streams = n
    elif how.metric in ("taylor", "taylor+"):
        streams = n
    programs = [Program(block_step, (structs[0], hidden), passes * batches)]
    if how.metric in ("taylor", "taylor+"):
        programs.append(Program(backward, (structs[0], hidden, _float32(hidden)), n * batches))
    return ModelPlan(programs, streams * batches * tree_bytes(hidden), guess)


def _float32(struct: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(struct.shape, np.float32)


def _choose(
    name: str, model: Decoder, calib: Calibration | None, how: Selection, run: Run
) -> dict[str, Any]:
    """The plan and the warnings as JSON values."""
    n_blocks = len(model.blocks)
    top = None if calib is None else peaks(model, calib)
    outliers = () if top is None else outlier_blocks(top)
    avoid = (*patched(model), *(outliers if how.avoid_outliers else ()))
    allowed = how.allowed(n_blocks, avoid)
    scores, choice = _measure(name, model, calib, how, allowed, run)
    plan = DepthPlan(
        n_blocks,
        choice.removed,
        model_digest(model),
        how.metric,
        text_digest(calib.tokens) if how.needs_text else "",
        calib.tokens.size if how.needs_text else 0,
        tuple(None if s is None else float(s) for s in scores),
        choice.margin,
        importlib.metadata.version("jaxcomp"),
    )
    return {"plan": plan_to_json(plan), "warnings": _warnings(plan, how, top, outliers)}


def _measure(
    name: str,
    model: Decoder,
    calib: Calibration | None,
    how: Selection,
    allowed: tuple[int, ...],
    run: Run,
) -> tuple[list[float | None], Choice]:
    """Scores of blocks, or of spans by their first block, and the choice that they give."""
    n, remove = len(model.blocks), how.remove
    tick = functools.partial(_told, run, name, 2 * n if "taylor" in how.metric else n)
    if how.metric in GREEDY:
        return _one_by_one(name, model, calib, how, allowed, run)
    tick(0)
    if how.metric in SPANS:
        found = similarity(model, calib, remove, run.place, tick)
        scores = getattr(found, SPANS[how.metric])
        return list(scores), selection.smallest_span(scores, remove, allowed)
    if how.metric in CONTROLS:
        pick = {
            "random": functools.partial(selection.at_random, seed=how.seed),
            "every_other": selection.every_other,
            "deepest": selection.deepest,
        }
        choice = pick[how.metric](remove, allowed, n)
        tick(n)
        return [], choice
    if how.metric in SINGLE:
        scores = getattr(similarity(model, calib, 1, run.place, tick), SINGLE[how.metric])
    elif how.metric == "magnitude":
        scores = magnitude(model, tick)
    elif how.metric == "ppl":
        losses = losses_without(model, calib, allowed, run.place, tick)
        scores = np.array([losses.get(i, np.nan) for i in range(n)])
    else:
        scores = taylor(model, calib, tick)
    listed = [float(s) if np.isfinite(s) else None for s in scores]
    if how.contiguous:
        sums = selection.span_sums(scores, remove)
        return listed, selection.smallest_span(sums, remove, allowed)
    return listed, selection.smallest(scores, remove, allowed)


def _one_by_one(
    name: str,
    model: Decoder,
    calib: Calibration,
    how: Selection,
    allowed: tuple[int, ...],
    run: Run,
) -> tuple[list[float | None], Choice]:
    """The block that is missed least goes, the rest is measured anew; scores are the last ones."""
    n, removed, margins = len(model.blocks), [], []
    scores: list[float | None] = [None] * n
    walks = [n - r for r in range(how.remove)]
    _told(run, name, sum(walks), 0)
    for r in range(how.remove):
        tick = functools.partial(_told, run, name, sum(walks), before=sum(walks[:r]))
        left = tuple(i for i in allowed if i not in removed)
        make = functools.partial(_round, model, calib, how, tuple(removed), left, run, tick)
        found = dict(run.store.keep(f"round.{r}", make) if run.store else make())
        for i, score in found.items():
            scores[i] = score
        now = np.array([found.get(i, np.nan) for i in range(n)])
        choice = selection.smallest(now, 1, left)
        removed += choice.removed
        margins += [] if choice.margin is None else [choice.margin]
        tick(walks[r])
    return scores, Choice(tuple(sorted(removed)), min(margins, default=None))


def _round(
    model: Decoder,
    calib: Calibration,
    how: Selection,
    removed: tuple[int, ...],
    left: tuple[int, ...],
    run: Run,
    tick: Tick,
) -> list[list[float]]:
    """(block, score) of the blocks in `left`, in the model without those that are gone."""
    rest = [i for i in range(len(model.blocks)) if i not in removed]
    places = [rest.index(i) for i in left]
    found = GREEDY[how.metric](drop(model, removed), calib, places, run.place, tick)
    return [[rest[i], score] for i, score in found.items()]


def _warnings(
    plan: DepthPlan, how: Selection, top: np.ndarray | None, outliers: tuple[int, ...]
) -> list[str]:
    said = []
    for i in set(outliers) & set(plan.removed):
        said.append(
            f"block {i} is removed, and over it the largest activation goes from {top[i]:.3g} to "
            f"{top[i + 1]:.3g}: later blocks rely on it, and no patch was seen to repair that; "
            "keep it with avoid_outliers=True"
        )
    if plan.margin is not None and plan.margin < CLOSE:
        said.append(
            f"the next best choice is {100 * plan.margin:.2g} % away: other text may choose "
            "otherwise; calibrate on more"
        )
    if {0, plan.n_blocks - 1} & set(plan.removed):
        ends = "first" if 0 in plan.removed else "last"
        said.append(f"the {ends} block is removed, which protect=(0, 0) allowed")
    for warning in said:
        log.warning(warning)
    return said


def _told(run: Run, name: str, total: int, done: int, before: int = 0) -> None:
    if run.progress:
        run.progress(name, before + done, total, [])
