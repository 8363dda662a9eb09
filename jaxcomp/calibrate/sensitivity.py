"""Sensitivity: what the next token loses when a few weights are quantized and all others are not.

A probe is a set of linears of one block on one grid. Its price is the mean over calibration tokens
of KL(p ‖ p′) in nats between the next-token distributions of the model as it came and of the model
with that probe alone, rounded to nearest within searched ranges.

Every probe of block i starts from what enters block i and goes through all blocks behind it, so a
model of n blocks with m probes a block costs m (n + 1)/2 passes through all blocks.
"""

import dataclasses
import functools
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcomp.calibrate.plan import Program, tree_bytes
from jaxcomp.calibrate.stream import BlockStep, Calibration, Metrics, Result, Run, blockwise
from jaxcomp.core.metrics import Row
from jaxcomp.core.quantize import QTensor, QuantSpec, dequantize, quantize_with
from jaxcomp.core.tree import get_at, replace_many
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import Block, Decoder, block_struct, iter_blocks
from jaxcomp.models.head import Head, next_token_gap, open_head
from jaxcomp.models.stream import Hidden, block_step, embed_batches, run_blocks, step_batches
from jaxcomp.solvers.clipping import search_range

By = Literal["linear", "site", "block"]
TOGETHER = 4  # probes whose predictions are compared with the original's in one walk


class Reference(NamedTuple):
    """What the model as it came says about the calibration text.

    Attributes:
      head: final norm and output layer.
      final: hidden states after the last block, a batch each.
      targets: the tokens that follow, a batch each.
    """

    head: Head
    final: Hidden
    targets: list[Int[np.ndarray, "batch time"]]


def measure(
    name: str,
    model: Decoder,
    calib: Calibration | None,
    grids: Iterable[QuantSpec],
    by: By,
    windows: int | None = None,
    run: Run = Run(),
) -> Result:
    """The model as it came, and the price of every probe in the rows of its blocks.

    Args:
      name: of the step, in rows and messages.
      grids: what each probe is tried with; they differ in their bits.
      by: what is one probe, a "linear", all linears that read one "site", or a "block".
      windows: the first so many of the calibration windows; None for all.
      run: on one process.

    Returns:
      `kl:<what>:<bits>` in the row of each block, in nats a token; see `prices`.
    """
    if run.place.processes > 1:
        raise ValueError(
            f"{name} looks at the whole text, and {run.place.processes} processes hold a part "
            "each; give it a mesh over the devices of one process"
        )
    grids = tuple(grids)
    if calib is not None:
        calib = dataclasses.replace(calib, tokens=calib.tokens[:windows])
    known = functools.cache(lambda: _reference(model, calib))

    def visit(step: BlockStep) -> tuple[Block, Metrics]:
        streams = {}
        for what, paths in probes(step.block, by).items():
            for spec in grids:
                probe = rounded(step.block, paths, spec)
                streams[f"kl:{what}:{spec.bits}"] = step_batches(
                    probe, step.hidden, place=step.place
                )
        for block in iter_blocks(model.replace(blocks=model.blocks[step.index + 1 :])):
            there = jax.device_put(block)
            streams = {
                key: step_batches(there, hidden, place=step.place)
                for key, hidden in streams.items()
            }
        return step.block, {"": _prices(known(), streams)}

    return blockwise(name, model, calib, visit, "original", run)


def prices(rows: Iterable[Row], step: str) -> Iterator[tuple[int, str, int, float]]:
    """(block, what, bits, KL) of every probe in the rows of a step named `step`."""
    for row in rows:
        for key, value in row.metrics.items() if row.step == step else ():
            if key.startswith("kl:"):
                _, what, bits = key.split(":")
                yield row.block, what, int(bits), value


def probes(block: Block, by: By) -> dict[str, tuple[str, ...]]:
    """What is quantized at a time → its linears."""
    parts = anatomy(block)
    if by == "site":
        return {site: part.consumers for site, part in parts.sites.items()}
    if by == "block":
        return {"block": tuple(parts.linears)}
    return {path: (path,) for path in parts.linears}


def check_probes(model: Decoder, by: str) -> None:
    """Refuses a word for `by` that there is not, and weights that are quantized already.

    Raises:
      ValueError: names the block and the linear.
    """
    if by not in typing.get_args(By):
        raise ValueError(f"by={by!r} is none of {', '.join(typing.get_args(By))}")
    for i, block in enumerate(map(block_struct, model.blocks)):
        for path in anatomy(block).linears:
            if isinstance(w := get_at(block, path).w, QTensor):
                raise ValueError(
                    f"block {i}, {path} is already quantized to {w.bits} bits, and its sensitivity "
                    "is that of the weight as it was"
                )


def check_windows(windows: int | None) -> None:
    """Refuses a number of windows on which nothing can be measured.

    Raises:
      ValueError: it is below 1.
    """
    if windows is not None and windows < 1:
        raise ValueError(f"windows={windows} is below 1; None takes all there are")


def plan_probes(
    block: Block,
    hidden: Any,
    batches: int,
    n_blocks: int,
    grids: Iterable[QuantSpec],
    by: By,
    windows: int | None = None,
) -> tuple[list[Program], int]:
    """The programs of `measure` for a block in the middle, and the bytes of all probes' streams.

    The programs of the head are not among them.
    """
    grids = tuple(grids)
    if windows is not None:
        batches = min(batches, -(-windows // hidden.shape[0]))
    paths = [path for group in probes(block, by).values() for path in group]
    weights = [get_at(block, path).w for path in paths]
    rounding = [Program(_round, (w,), 1, dict(spec=spec)) for w in weights for spec in grids]
    streams = batches * len(probes(block, by)) * len(grids)
    steps = streams * (n_blocks + 1) // 2 + 2 * batches
    return [*rounding, Program(block_step, (block, hidden), steps)], streams * tree_bytes(hidden)


def rounded(block: Block, paths: Iterable[str], spec: QuantSpec) -> Block:
    """The block with some weights on their grid, in their stored dtypes."""
    return replace_many(block, {f"{p}.w": _round(get_at(block, p).w, spec=spec) for p in paths})


@functools.partial(jax.jit, static_argnames="spec")
def _round(w: Float[Array, "in_ch out_ch"], spec: QuantSpec) -> Float[Array, "in_ch out_ch"]:
    values = w.astype(jnp.float32)
    codes = quantize_with(values, *search_range(values, spec), spec)
    return dequantize(codes).astype(w.dtype)


def _reference(model: Decoder, calib: Calibration) -> Reference:
    tokens = [calib.tokens[i : i + calib.batch] for i in range(0, len(calib.tokens), calib.batch)]
    hidden = [x for t in tokens for x in embed_batches(model, t, len(t))]
    return Reference(open_head(model), run_blocks(model, hidden), [t[:, 1:] for t in tokens])


def _prices(known: Reference, streams: dict[str, Hidden]) -> dict[str, float]:
    """Mean KL of every stream; the teacher's logits serve `TOGETHER` streams at a time."""
    names, totals = list(streams), dict.fromkeys(streams, 0.0)
    for b, (x, targets) in enumerate(zip(known.final, known.targets, strict=True)):
        for start in range(0, len(names), TOGETHER):
            group = names[start : start + TOGETHER]
            spare = [group[-1]] * (TOGETHER - len(group))  # one shape, one compilation
            y = np.stack([streams[name][b][:, :-1] for name in group + spare])
            gaps = _gaps(known.head, known.head, x[:, :-1], y, targets)
            for name, kl in zip(group, gaps.kl, strict=False):
                totals[name] += float(jnp.sum(kl))
    count = sum(targets.size for targets in known.targets)
    return {name: total / count for name, total in totals.items()}


_gaps = jax.jit(jax.vmap(next_token_gap, in_axes=(None, None, None, 0, None)))
