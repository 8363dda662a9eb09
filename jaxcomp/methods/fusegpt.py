"""FuseGPT: remove blocks one by one, and let their neighbours take over their weights.

In every round one block goes:

    p = the block without which the final states turn least (Macro Influence, measured anew)
    x, y = what enters and leaves the `group_size` neighbours around p
    W ← W + C ∘ W_p + a b    for every linear of the other neighbours, zero at first
    fit C, a, b and the norms so that the neighbours without p map x to y; fold

W_p is frozen, C of low rank, ∘ entry by entry, a b an ordinary LoRA. What is left has plain weights
and fewer blocks, which stock classes load. `control="lora"` is the same without C, on the same text
for as many steps, so that the difference is the fusion's.

Source: Pei et al., arXiv 2411.14507, and the authors' code, whose settings are the defaults where
nothing else is said. Departures: additions are folded after every round, not at the end, so that
later rounds do not move the coefficients of earlier ones; a bias of the donor enters with a
coefficient a channel; the loss is the squared error (`loss="batch_kl"` is the authors', which sees
only how the windows of a batch differ); parameters are float32, in which their small rates are not
rounded away; groups may have any size, and near an end of the model are shifted.
"""

import dataclasses
import functools
import logging
import math
import time
import typing
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.calibrate.fusion import Dtype, Fusion
from jaxcomp.calibrate.group_fit import fit_group, fit_programs, group_states, states_before
from jaxcomp.calibrate.importance import Selection, plan_selection
from jaxcomp.calibrate.plan import ModelPlan, Program, tree_bytes
from jaxcomp.calibrate.removal import Tick, influences
from jaxcomp.calibrate.stream import (
    Calibration,
    Result,
    Run,
    check_finite,
    check_one_process,
    check_text,
)
from jaxcomp.core.metrics import Row
from jaxcomp.models.decoder import Block, Decoder, block_struct, load_block
from jaxcomp.models.depth import check_removed, drop
from jaxcomp.models.stream import block_step
from jaxcomp.solvers import selection
from jaxcomp.solvers.fusion import Coefficient, GroupLoss, neighbourhood

log = logging.getLogger(__name__)

NAME = "FuseGPT"
CURVE = 100  # points of a loss curve in the report

Metrics = dict[str, float | int | str | list[float]]


@dataclasses.dataclass(frozen=True)
class FuseGPT:
    """Settings: one of `remove`, `rate` and `blocks`.

    Attributes:
      remove: how many blocks to choose and remove.
      rate: the same as a share of the blocks, rounded up.
      blocks: which blocks to remove, from 0 in the model as it is given, in this order.
      group_size: neighbours that a block is removed from, itself among them; of a model with fewer
        blocks, all.
      control: "lora" leaves the donor's weights out.
      coefficient: C as the product of two factors ("low_rank"), one number an output channel
        ("row") or one an entry ("full").
      rank: of C.
      lora_rank: of a b; 0 for none.
      lr: first learning rate of C; all fall to 0 along a cosine, Adam without weight decay.
      lora_lr: of a b.
      norm_lr: of the weights of the norms; 0 leaves them.
      loss: "mse", "cosine" a token, or "batch_kl".
      token_limit: in mse, a token with more than so many times the energy of the median token's
        counts for less in proportion, as attention sinks would else decide it; None for no limit.
      targets: what the group gave in the "current" model, or what the "original" one, as this step
        is given it, has at that place, so that the errors of earlier rounds are made good.
      epochs: passes over the calibration text a round.
      batch: windows an update.
      windows: measure influence on the first so many windows; None for all.
      protect: how many first and last blocks stay in any case.
      dtype: of products in the fit, "float32" or "bfloat16"; parameters stay float32.
      seed: of first factors and of the order of windows.
    """

    remove: int | None = None
    rate: float | None = None
    blocks: tuple[int, ...] = ()
    group_size: int = 8
    control: Literal["none", "lora"] = "none"
    coefficient: Coefficient = "low_rank"
    rank: int = 128
    lora_rank: int = 128
    lr: float = 1e-3
    lora_lr: float = 9.65e-6
    norm_lr: float = 9.65e-6
    loss: GroupLoss = "mse"
    token_limit: float | None = 10.0
    targets: Literal["current", "original"] = "current"
    epochs: int = 20
    batch: int = 8
    windows: int | None = 32
    protect: tuple[int, int] = (0, 0)
    dtype: Dtype = "float32"
    seed: int = 0

    needs_text: typing.ClassVar[bool] = True

    def __post_init__(self):
        if (self.remove is not None) + (self.rate is not None) + bool(self.blocks) != 1:
            raise ValueError(
                f"remove={self.remove}, rate={self.rate}, blocks={self.blocks}: give one of the "
                "three, a number of blocks, their share, or the blocks"
            )
        if self.rate is not None and not 0 < self.rate < 1:
            raise ValueError(f"rate={self.rate} is outside (0, 1); it is a share of the blocks")
        if self.group_size < 2:
            raise ValueError(
                f"group_size={self.group_size} is below 2, which leaves no neighbour to learn"
            )
        for name, known in (("control", ("none", "lora")), ("targets", ("current", "original"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(known)}")
        assert self.fusion and self.choice(1)  # refuse what means nothing

    @property
    def fusion(self) -> Fusion:
        """What is added and how it is fitted."""
        shared = {f.name for f in dataclasses.fields(Fusion)} - {"donors"}
        settings = {name: getattr(self, name) for name in shared}
        return Fusion(donors=self.control == "none", **settings)

    def choice(self, remove: int) -> Selection:
        """How blocks are chosen."""
        return Selection(remove, "macro_influence", protect=self.protect, windows=self.windows)

    def count(self, n_blocks: int) -> int:
        """How many blocks go."""
        if self.remove is not None:
            return self.remove
        # A product such as 30 · 0.1 must not be rounded up to 4 for its last bit.
        return len(self.blocks) if self.blocks else math.ceil(round(n_blocks * self.rate, 9))

    def check(self, model: Decoder) -> None:
        """Raises ValueError where the settings do not fit the model; reads no block."""
        structs = [block_struct(block) for block in model.blocks]
        if self.blocks:
            check_removed(self.blocks, len(structs))
        else:
            self.choice(self.count(len(structs))).check(model)
        self.fusion.check(structs)
        for i, block in enumerate(structs):
            if block.patch is not None:
                raise ValueError(
                    f"block {i} carries a patch, which was made for the blocks as they are; put "
                    "FuseGPT before the step that patches cuts"
                )
            if block.sites:
                raise ValueError(
                    f"block {i} has a transform or a quantizer at {next(iter(block.sites))}, made "
                    "for its weights as they are; put FuseGPT before the step that adds it"
                )

    def __call__(self, model: Decoder, calib: Calibration | None, run: Run = Run()) -> Result:
        self.check(model)
        check_text(NAME, calib)
        self._check_run(model, calib, run)
        steps, original = self.fusion.steps(len(calib.tokens)), model
        places = list(range(len(model.blocks)))  # of the blocks that are left, in the original
        looks = [0 if self.blocks else len(places) - r for r in range(self.count(len(places)))]
        ends = np.cumsum([look + steps for look in looks])
        told = functools.partial(run.progress or (lambda *args: None), NAME)
        metrics: list[Metrics] = [{"removed": 0} for _ in places]
        seconds, gone = [0.0] * len(places), []
        for r, look in enumerate(looks):
            start = int(ends[r]) - look - steps
            tick = lambda done, start=start: told(start + done, int(ends[-1]), [])  # noqa: E731
            inner = dataclasses.replace(run, store=run.store and run.store.part(f"round.{r}"))
            task = Round(r, model, original, tuple(places), calib, inner)
            model, removed, scores = fuse_round(self, task, tick, look)
            for place, score in scores.items():
                metrics[place].setdefault("influence", []).append(score)
            metrics[removed.block] |= removed.metrics
            seconds[removed.block] = removed.seconds
            places.remove(removed.block)
            gone.append(removed.block)
        rows = [Row(NAME, i, None, metrics[i], seconds[i]) for i in range(len(metrics))]
        whole: Metrics = {"removed_blocks": ", ".join(map(str, gone)), "control": self.control}
        return Result(model, [*rows, Row(NAME, None, None, whole | {"steps": steps * len(gone)})])

    def _check_run(self, model: Decoder, calib: Calibration, run: Run) -> None:
        """What only the text and the devices can tell."""
        check_one_process(NAME, run.place)
        run.place.check_batch(self.batch, "batch", "choose a multiple")
        largest, vocab = int(calib.tokens.max()), model.embed.table_shape[0]
        if largest >= vocab:
            raise ValueError(
                f"the calibration text has the token {largest}, and the model knows {vocab}; "
                "tokenize with the model's own tokenizer"
            )

    def plan_model(self, model: Decoder, hidden: Any, batches: int) -> ModelPlan:
        """The programs of the choice and of the fits, and a model of the right depth."""
        n, rounds = len(model.blocks), self.count(len(model.blocks))
        windows = hidden.shape[0] * batches  # or fewer, where the last batch is not full
        steps, block = self.fusion.steps(windows) * rounds, block_struct(model.blocks[0])
        programs, kept, result = [], 0, drop(model, self.blocks)
        if not self.blocks:
            programs, kept, result = plan_selection(model, hidden, batches, self.choice(rounds))
        size = min(self.group_size, n)
        in_fit = jax.ShapeDtypeStruct(hidden.shape, jnp.dtype(self.dtype))
        programs = [*programs, Program(block_step, (block, hidden), rounds * n // 2 * batches)]
        programs += [Program(block_step, (block, in_fit), rounds * size * batches)]
        window = jax.ShapeDtypeStruct((self.batch, *hidden.shape[1:]), hidden.dtype)
        fits = fit_programs(self.fusion, block, size - 1, window, steps)
        states = batches * (tree_bytes(hidden) + tree_bytes(in_fit))
        trained = 3 * tree_bytes(fits[-1][1][0])  # with both moments
        held = states + trained + size * (tree_bytes(block) + tree_bytes(window))
        return ModelPlan([*programs, *(Program(*f) for f in fits)], max(kept, held), result)

    def found(self, rows: Iterable[Row]) -> "FuseGPT":
        """The same with the blocks that were chosen, from the rows of a run."""
        told = [r.metrics["removed_blocks"] for r in rows if r.step == NAME and r.block is None]
        gone = tuple(int(word) for word in told[-1].split(", "))
        return dataclasses.replace(self, remove=None, rate=None, blocks=gone)


class Round(NamedTuple):
    """One block to remove.

    Attributes:
      number: of rounds before.
      model: as the rounds before left it.
      original: as the step was given it.
      places: of the model's blocks in the original.
      run: with the store of this round.
    """

    number: int
    model: Decoder
    original: Decoder
    places: tuple[int, ...]
    calib: Calibration
    run: Run


def fuse_round(
    cfg: FuseGPT, task: Round, tick: Tick, look: int
) -> tuple[Decoder, Row, dict[int, float]]:
    """The smaller model, the row of the block that went, and the influences that were measured.

    Args:
      tick: told the work done: `look` blocks looked at for the choice, then the steps.

    Returns:
      Places in the row and of the influences are those in the original.
    """
    store, n_left = task.run.store, len(task.places) - 1
    done, rows = store.resume() if store else (0, [])
    if done < n_left and not task.number:
        tick(0)
    choose = functools.partial(_choose, cfg, task, tick)
    block, scores = store.keep("choice", choose) if store else choose()
    smaller = drop(task.model, (block,))
    if done < n_left:
        started = time.perf_counter()
        new, metrics = _fuse(cfg, task, block, lambda done: tick(look + done))
        seconds = time.perf_counter() - started
        rows = [Row(NAME, task.places[block], None, metrics, seconds)]
        if store:
            for i in range(n_left):
                store.finish(i, new.get(i), [], rows)
    else:
        new = {}
    if store:
        new = {i: handle for i in range(n_left) if (handle := store.block(i)) is not None}
    blocks = tuple(new.get(i, old) for i, old in enumerate(smaller.blocks))
    found = {task.places[i]: score for i, score in scores}
    return smaller.replace(blocks=blocks), rows[0], found


def _choose(cfg: FuseGPT, task: Round, tick: Tick) -> tuple[int, list[list[float]]]:
    """The block to remove and (block, influence) of all that were looked at, by current places."""
    n = len(task.places)
    if cfg.blocks:
        return task.places.index(cfg.blocks[task.number]), []
    allowed = selection.candidates(n, cfg.protect)
    seen = dataclasses.replace(task.calib, tokens=task.calib.tokens[: cfg.windows])
    found = influences(task.model, seen, allowed, task.run.place, tick)
    scores = np.array([found.get(i, np.nan) for i in range(n)])
    (block,) = selection.smallest(scores, 1, allowed).removed
    return block, [[i, score] for i, score in found.items()]


def _fuse(cfg: FuseGPT, task: Round, block: int, tick: Tick) -> tuple[dict[int, Block], Metrics]:
    """The fused blocks by their place in the smaller model, and the numbers of the round."""
    group = neighbourhood(block, len(task.places), cfg.group_size)
    stay = [i for i in group if i != block]
    donor, *survivors = (jax.device_put(load_block(task.model.blocks[i])) for i in (block, *stay))
    check_finite(donor, f"the weights of block {task.places[block]}")
    where = f"{NAME}, round {task.number + 1}, without block {task.places[block]}"
    try:
        x, y = group_states(task.model, task.calib, group, cfg.dtype, task.run.place)
        if cfg.targets == "original":
            y = _original_states(task, group[-1], cfg.dtype)
        seed, place = (cfg.seed, task.number), task.run.place
        fit = fit_group(cfg.fusion, tuple(survivors), donor, x, y, seed, place, tick)
    except ValueError as error:
        raise ValueError(f"{where}, {error}; finished rounds are kept") from None
    log.info("%s: error %.3g → %.3g", where, fit.before, fit.after)
    new = {i - (i > block): b for i, b in zip(stay, fit.blocks, strict=True)}
    metrics: Metrics = {
        "removed": 1,
        "round": task.number + 1,
        "group": ", ".join(str(task.places[i]) for i in stay),
        "mse_before": fit.before,
        "mse_after": fit.after,
        "loss_curve": _curve(fit.losses, len(x) // cfg.batch),
    }
    return new, metrics


def _original_states(task: Round, last: int, dtype: str) -> np.ndarray:
    """What the original has before the block that follows the group, or at its end."""
    n_original = len(task.original.blocks)
    end = (*task.places, n_original)[last + 1]
    hidden = states_before(task.original, task.calib, end, task.run.place)
    return np.concatenate(hidden).astype(jnp.dtype(dtype))


def _curve(losses: list[float], epoch: int) -> list[float]:
    """The loss by epoch; with fewer than ten epochs, in `CURVE` equal stretches."""
    epochs = len(losses) // epoch
    parts = min(CURVE, epochs if epochs >= 10 else len(losses))
    return [float(np.mean(part)) for part in np.array_split(losses, parts)]
