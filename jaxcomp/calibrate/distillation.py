"""Offline distillation: a smaller or coarser student learns what the model it came from says.

    teacher, windows ─▶ top words on disk                     once          (`calibrate.teacher`)
    student ─▶ what is trained | what is frozen                              (`calibrate.trainable`)
    windows ─▶ hidden states before the first trained block   once
    for each step: batch, teacher's words ─▶ loss ─▶ gradients ─▶ update     (`calibrate.descent`)
    student ─▶ blocks with what was learned folded in, in their stored dtypes

The student is in memory as a whole. With a store, the teacher's words, those hidden states and,
every so many steps, masters and optimiser are on disk; a killed run continues from the last of them
and gets what an uninterrupted one would have, to the bit.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from jaxcomp.calibrate.descent import (
    Descent,
    Student,
    loss_and_gradients,
    loss_of,
    optimiser,
    step_programs,
    update,
)
from jaxcomp.calibrate.losses import Targets, TopKLoss
from jaxcomp.calibrate.plan import ModelPlan, Program, tree_bytes
from jaxcomp.calibrate.stream import (
    BlockStep,
    Calibration,
    Metrics,
    Result,
    Run,
    blockwise,
    check_text,
    write_whole,
)
from jaxcomp.calibrate.teacher import TeacherCache, teacher_cache
from jaxcomp.calibrate.trainable import ENDS, Trainable, finished, split
from jaxcomp.core.metrics import Row
from jaxcomp.core.tree import named_leaves
from jaxcomp.models.decoder import Block, Decoder, block_struct
from jaxcomp.models.stream import block_step, embed_batches, run_blocks

log = logging.getLogger(__name__)

CURVE = 200  # points of a loss curve in the report


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What is learned from: windows, which positions count, and the teacher's words.

    Attributes:
      tokens: `[windows, time]`.
      counts: True where a position has a part in the loss; padding, to the right, and prompts have
        none.
      cache: of the same windows.
    """

    tokens: Int[np.ndarray, "windows time"]
    counts: Bool[np.ndarray, "windows time"]
    cache: TeacherCache

    def targets(self, windows: np.ndarray) -> Targets:
        """What these windows are compared with."""
        following = np.roll(self.tokens[windows], -1, axis=1)
        return Targets(*self.cache.read(windows), following, self.counts[windows])


def distil(
    name: str,
    model: Decoder,
    calib: Calibration | None,
    run: Run,
    *,
    train: Trainable,
    loss: TopKLoss,
    fit: Descent,
    k: int,
    cache: str | None = None,
    counts: Bool[np.ndarray, "windows time"] | None = None,
) -> Result:
    """The model after training against `run.original`, its blocks as they were stored before.

    Args:
      name: the method's, in rows and messages.
      model: the student; its blocks may be behind handles.
      calib: the windows; the last `fit.validation` are set aside.
      k: words of the teacher that are kept.
      cache: a directory for them that other runs may share; by default with unfinished work.
      counts: positions that have a part in the loss; all by default.

    Raises:
      ValueError: no text or no teacher; a mesh; settings that do not fit the model; a batch of
        which no position counts; a loss that is not finite.
    """
    check_text(name, calib)
    check_teacher(name, model, run)
    train.check(model)
    tokens = calib.tokens
    counts = np.ones(tokens.shape, bool) if counts is None else counts
    if counts.shape != tokens.shape:
        raise ValueError(f"counts of shape {counts.shape} for windows of shape {tokens.shape}")
    order = fit.order(len(tokens) - fit.validation)
    _check_counts(name, order, counts)
    with workplace(run) as work:

        def told(done: int, total: int) -> None:
            if run.progress:
                run.progress(name, done, total, [])

        place = pathlib.Path(cache) if cache else work / "teacher"
        words = teacher_cache(place, run.original, tokens, k, calib.batch, told)
        lesson = Lesson(tokens, counts, words)
        started = time.perf_counter()
        masters, rows = train_student(name, model, lesson, order, work, run, train, loss, fit)
        seconds = time.perf_counter() - started
    rows[0] = dataclasses.replace(rows[0], seconds=seconds)

    def visit(step: BlockStep) -> tuple[Block, Metrics]:
        learned = masters.get(f"blocks.{step.index}", {})
        if not learned:
            return step.block, {}
        block = finished(step.block, learned)
        return block, {"": {"change": _change(block, step.block)}}

    learned = blockwise(name, model, None, visit, None, run)
    new = learned.model
    if ENDS in masters:
        ends = finished(new.replace(blocks=()), masters[ENDS])
        new = ends.replace(blocks=new.blocks)
    return Result(new, rows + learned.rows)


def plan_distillation(
    model: Decoder,
    hidden: Any,
    batches: int,
    train: Trainable,
    loss: TopKLoss,
    fit: Descent,
    k: int,
) -> ModelPlan:
    """The programs of `distil` for a dry run, the teacher's pass taken for one of the student.

    Args:
      hidden, batches: the struct of a batch of hidden states, and how many the text has.
    """
    rows, time, _ = hidden.shape
    steps = len(fit.order(max(rows * batches - fit.validation, 0)))
    structs = model.replace(blocks=tuple(map(block_struct, model.blocks)))
    config = dataclasses.replace(model.config, compute_dtype=fit.dtype)
    making = lambda m: split(train, m.replace(config=config), fit.dtype)  # noqa: E731
    student = Student(*jax.eval_shape(making, structs))
    at = lambda shape, dtype: jax.ShapeDtypeStruct((fit.batch, time, *shape), dtype)  # noqa: E731
    words = at((k,), jnp.int32), at((k,), jnp.float32), at((), jnp.float32)
    targets = Targets(*words, at((), jnp.int32), at((), jnp.bool_))
    x = at((hidden.shape[-1],), jnp.dtype(fit.dtype))
    programs = [Program(block_step, (structs.blocks[0], hidden), batches * len(model.blocks))]
    programs += [Program(*p) for p in step_programs(student, x, targets, loss, fit, steps)]
    inputs = len(model.blocks) * tree_bytes(x)
    kept = tree_bytes(student.frozen) + 4 * tree_bytes(student.masters) + inputs
    return ModelPlan(programs, kept, model)


def train_student(
    name: str,
    model: Decoder,
    lesson: Lesson,
    order: Int[np.ndarray, "steps batch"],
    work: pathlib.Path,
    run: Run,
    train: Trainable,
    loss: TopKLoss,
    fit: Descent,
) -> tuple[dict[str, dict[str, Any]], list[Row]]:
    """The trained masters, and a row about the whole.

    Args:
      order: the windows of each step.
      work: a directory for what a killed run continues from.

    Raises:
      ValueError: a loss is NaN or infinite; the message names the step and the last finite one.
    """
    config = dataclasses.replace(model.config, compute_dtype=fit.dtype)
    student = Student(*split(train, model.replace(config=config), fit.dtype))
    start = jax.tree.map(np.asarray, student.masters) if fit.decay_to_init else None
    hidden = None if student.learns_embedding else _prefix(work, model, student, lesson, fit)
    steps = len(order)
    inner = optimiser(fit, steps).init(student.masters)
    done, losses, checks, state = _resume(work, (student.masters, inner))
    student, inner = student._replace(masters=state[0]), state[1]
    held_out = np.arange(len(lesson.tokens) - fit.validation, len(lesson.tokens))
    end = student.end()

    def inputs(windows: np.ndarray) -> np.ndarray:
        return lesson.tokens[windows] if hidden is None else hidden[windows]

    def look() -> None:
        if len(held_out) and (not checks or checks[-1][0] != done):
            total, n = 0.0, 0.0
            for i in range(0, len(held_out), fit.batch):
                here = held_out[i : i + fit.batch]
                value, count = loss_of(student, end, inputs(here), lesson.targets(here), loss)
                total, n = total + float(value) * float(count), n + float(count)
            checks.append((done, total / max(n, 1.0)))
            log.info("%s step %d/%d: held out %.4f", name, done, steps, checks[-1][1])

    def tell() -> None:
        if run.progress:
            newest = {"loss": losses[-1]} if losses else {}
            run.progress(name, done, steps, [Row(name, None, None, newest)])

    tell()
    for windows in order[done:]:
        if done % fit.every == 0:
            look()
        value, grads = loss_and_gradients(
            student, end, inputs(windows), lesson.targets(windows), loss, fit.remat
        )
        masters, inner = update(student.masters, inner, grads, start, fit=fit, steps=steps)
        student = student._replace(masters=masters)
        end = student.end() if ENDS in masters else end
        if not np.isfinite(float(value)):
            last = f"the last finite one was {losses[-1]:.6g}" if losses else "it is the first one"
            raise ValueError(
                f"{name}, step {done} of {steps}: the loss is {float(value)}, {last}; use less "
                f"than lr={fit.lr:g}, or dtype='float32'"
            )
        losses.append(float(value))
        done += 1
        if done % fit.every == 0 or done == steps:
            _save(work, done, losses, checks, (student.masters, inner))
        tell()
    look()
    return student.masters, [
        Row(name, None, None, _summary(student, losses, checks, lesson, order))
    ]


def check_teacher(name: str, model: Decoder, run: Run) -> None:
    """Refuses to begin without a teacher that speaks the student's language.

    Raises:
      ValueError: there is none, it has another vocabulary, or there is a mesh.
    """
    teacher, student = (m.config.vocab_size for m in (run.needs_original(name), model))
    if student != teacher:
        raise ValueError(
            f"{name}: the student's vocabulary has {student} words and the teacher's {teacher}; "
            "they must be the same"
        )
    if run.mesh is not None:
        raise ValueError(f"{name} trains on one device; leave the mesh (--data-parallel) out")


def _check_counts(name: str, order: np.ndarray, counts: np.ndarray) -> None:
    empty = ~counts[order].any(axis=(1, 2))
    if empty.any():
        step = int(np.argmax(empty))
        raise ValueError(
            f"{name}, step {step}: none of the positions of windows {order[step].tolist()} counts; "
            "leave these windows out"
        )


@contextlib.contextmanager
def workplace(run: Run) -> Iterator[pathlib.Path]:
    """A directory for unfinished work: in the store, or gone at the end."""
    if run.store:
        yield run.store.part("fit").path
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield pathlib.Path(scratch)


def _prefix(
    work: pathlib.Path, model: Decoder, student: Student, lesson: Lesson, fit: Descent
) -> np.ndarray:
    """Hidden states of all windows before the first trained block, in a file that is mapped."""
    place = work / "prefix.npy"
    if not place.exists():
        config = student.frozen.config
        before = model.replace(config=config, blocks=model.blocks[: student.first])
        states = run_blocks(before, embed_batches(before, lesson.tokens, fit.batch))
        words = np.concatenate(states).view(f"u{jnp.dtype(fit.dtype).itemsize}")  # npy: no bfloat16
        write_whole(place, lambda file: np.save(file, words))
    return np.load(place, mmap_mode="r").view(jnp.dtype(fit.dtype))


def _resume(work: pathlib.Path, fresh: Any) -> tuple[int, list[float], list, Any]:
    """Steps done, their losses, what was seen of held-out windows, and masters and optimiser."""
    place = work / "state.json"
    if not place.exists():
        return 0, [], [], fresh
    state = json.loads(place.read_text())
    with np.load(work / f"masters.{state['done']}.npz") as stored:
        leaves = [jnp.asarray(stored[f"{i}"]) for i in range(len(stored.files))]
    tree = jax.tree.unflatten(jax.tree.structure(fresh), leaves)
    return state["done"], state["losses"], [tuple(c) for c in state["checks"]], tree


def _save(work: pathlib.Path, done: int, losses: list, checks: list, tree: Any) -> None:
    """`state.json` is written last; what it names is complete."""
    leaves = {f"{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    write_whole(work / f"masters.{done}.npz", lambda file: np.savez(file, **leaves))
    state = json.dumps({"done": done, "losses": losses, "checks": checks}).encode()
    write_whole(work / "state.json", lambda file: file.write(state))
    for old in work.glob("masters.*.npz"):
        if old.name != f"masters.{done}.npz":
            old.unlink()


def _summary(
    student: Student, losses: list, checks: list, lesson: Lesson, order: np.ndarray
) -> dict[str, Any]:
    """What the report says of a training."""
    numbers: dict[str, Any] = {
        "trained": sum(int(a.size) for a in jax.tree.leaves(student.masters)),
        "steps": len(order),
        "tokens": int(order.size * lesson.tokens.shape[1]),
        "teacher_bytes_per_token": lesson.cache.bytes_per_token,
        "teacher_bytes": lesson.cache.bytes,
        "loss_curve": _curve(losses),
    }
    if checks:
        numbers |= {"held_out_before": checks[0][1], "held_out_after": checks[-1][1]}
        numbers |= {"held_out_steps": [float(s) for s, _ in checks]}
        numbers |= {"held_out_curve": [v for _, v in checks]}
    return numbers


def _curve(losses: list[float]) -> list[float]:
    """At most `CURVE` means of equal stretches."""
    parts = np.array_split(np.asarray(losses), min(CURVE, len(losses)))
    return [float(f"{part.mean():.6g}") for part in parts]


def _change(new: Block, old: Block) -> float:
    """‖new − old‖² / ‖old‖² over the leaves that differ."""
    before, after = named_leaves(old), named_leaves(new)
    moved = [n for n in before if n in after and after[n] is not before[n]]
    energy = lambda a: float(np.sum(np.square(a), dtype=np.float64))  # noqa: E731
    wide = lambda a: np.asarray(a, np.float32)  # noqa: E731
    gap = sum(energy(wide(after[n]) - wide(before[n])) for n in moved)
    return gap / max(sum(energy(wide(before[n])) for n in moved), 1e-30)
