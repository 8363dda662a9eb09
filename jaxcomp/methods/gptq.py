"""GPTQ: quantize weights so that each site's consumers keep their outputs on calibration text.

Per block, site by site in execution order: the Hessian of the site is taken with everything before
it already quantized, all consumers of the site are solved at once (`jaxcomp.solvers.gptq`), and the
next block sees what this one now produces.

Source: Frantar et al., arXiv 2210.17323, and the authors' code: act-order, static groups with it,
damping 0.01, the order {q, k, v}, {o}, {gate, up}, {down}. Default here, not there: act-order on.

Two settings are ours, off by default, and matter in models with an attention sink and outlier
channels; `python benchmarks/quality.py --published` measures both against the published method.
- `first_token_weight`: most heads look at the first token, whose value vector is nearly zero on
  purpose. As one token of a window it counts next to nothing in the Hessian, so GPTQ lets its error
  grow to many times that of rounding to nearest, and every later token collects it.
- `clip="output"`: ranges are searched with the Hessian's diagonal. The usual search ("weight")
  cuts just those large weights on which an outlier channel relies.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxcomp.calibrate.capture import capture, capture_batch
from jaxcomp.calibrate.plan import BlockPlan, Program, tree_bytes
from jaxcomp.calibrate.stats import hessian_finish, hessian_init, hessian_update
from jaxcomp.calibrate.stream import BlockStep, Calibration, Metrics, Result, Run, blockwise
from jaxcomp.core.quantize import QTensor, QuantSpec, dequantize
from jaxcomp.core.tree import get_at, replace_at, replace_many
from jaxcomp.models.anatomy import anatomy, check_grid
from jaxcomp.models.decoder import Block, Decoder
from jaxcomp.models.stream import block_step
from jaxcomp.solvers.gptq import Clip, gptq


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """Settings of GPTQ.

    Attributes:
      weight: grid of every linear in the blocks.
      act_order: round the channels with the largest activations first.
      damp: share of the Hessian's mean diagonal added to its diagonal, in (0, 1].
      clip: how a group's range is fitted: "none" takes min and max, "weight" and "output" search
        the range with the least error of the weights, or of the outputs as the diagonal of the
        Hessian sees them.
      first_token_weight: weight in the Hessians of the first token of each window, the others
        having 1; 1.0 is the published method, 16 protects an attention sink.
      sequential: take a site's Hessian after the sites before it in the block are quantized, as
        the authors do; False takes all of a block at once, for less than half the time.
    """

    weight: QuantSpec = QuantSpec(bits=4)
    act_order: bool = True
    damp: float = 0.01
    clip: Clip = "none"
    first_token_weight: float = 1.0
    sequential: bool = True

    def __post_init__(self):
        if self.first_token_weight <= 0:
            raise ValueError(
                f"first_token_weight={self.first_token_weight} is not positive; 1.0 treats all "
                "tokens alike"
            )
        if self.clip not in typing.get_args(Clip):
            raise ValueError(f"clip={self.clip!r} is none of {', '.join(typing.get_args(Clip))}")
        if not 0 < self.damp <= 1:
            raise ValueError(f"damp={self.damp} is outside (0, 1]; the usual value is 0.01")

    def __call__(self, model: Decoder, calib: Calibration | None, run: Run = Run()) -> Result:
        self.check(model)
        return blockwise("GPTQ", model, calib, functools.partial(solve_block, self), run=run)

    def check(self, model: Decoder) -> None:
        """Raises ValueError where the settings do not fit the model; reads no block."""
        check_grid(model, self.weight)

    def plan_block(self, block: Block, hidden: Any, batches: int) -> BlockPlan:
        """The programs of one block, for a dry run."""
        dense, programs = jax.eval_shape(lambda b: jax.tree.map(_as_float32, b), block), []
        sites = anatomy(block).sites
        for wave in _waves(self, sites):
            states = jax.eval_shape(lambda wave=wave: _init(self, block, wave))
            captured = Program(
                capture_batch, (states, dense, hidden), batches, dict(update=hessian_update)
            )
            programs.append(captured)
            for name in wave:
                weights = {path: get_at(dense, path).w for path in sites[name].consumers}
                hessian = states[name].total
                programs.append(Program(_solve_jit, (weights, hessian), 1, dict(cfg=self)))
        programs.append(Program(block_step, (dense, hidden), batches))
        return BlockPlan(programs, kept_bytes=tree_bytes(dense))


def solve_block(cfg: GPTQ, step: BlockStep) -> tuple[Block, Metrics]:
    """Quantizes the linears of one block against its inputs."""
    sites = anatomy(step.block).sites
    # Every pass sees float32 weights, quantized or not, so that all of them share a compilation.
    block = jax.tree.map(_as_float32, step.block)
    solved, metrics = {}, {}
    for wave in _waves(cfg, sites):
        hessians = _hessians(cfg, step, block, wave)
        for name in wave:
            weights = {}
            for path in sites[name].consumers:
                weights[path] = get_at(block, path).w
                if isinstance(weights[path], QTensor):
                    raise ValueError(
                        f"block {step.index}, {path} is already quantized to "
                        f"{weights[path].bits} bits; GPTQ needs the weight as it was"
                    )
            solutions = _solve(cfg, weights, hessians[name])
            for path in weights:
                quantized, values, numbers = solutions[path]
                where = f"block {step.index}, {path} (site {name})"
                metrics[path] = _checked(numbers, cfg, where)
                block = replace_at(block, f"{path}.w", values)
                solved[f"{path}.w"] = quantized
    return replace_many(step.block, solved), metrics


def _as_float32(a):
    return a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a


def _waves(cfg: GPTQ, sites: Iterable[str]) -> list[list[str]]:
    """Which sites are solved from one pass over the inputs."""
    return [[name] for name in sites] if cfg.sequential else [list(sites)]


def _init(cfg: GPTQ, block: Block, names: list[str]) -> dict:
    parts = anatomy(block).sites
    channels = {name: get_at(block, parts[name].consumers[0]).w.shape[-2] for name in names}
    return {name: hessian_init(n, cfg.first_token_weight) for name, n in channels.items()}


def _hessians(cfg: GPTQ, step: BlockStep, block: Block, names: list[str]) -> dict:
    states = capture(block, step.hidden, _init(cfg, block, names), hessian_update)
    for name, state in states.items():
        if not bool(jnp.isfinite(state.total).all()):
            raise ValueError(
                f"block {step.index}, site {name}: the activations hold NaN or infinity or their "
                "squares overflow float32; evaluate the model first, its own output is affected"
            )
    return {name: hessian_finish(state) for name, state in states.items()}


def _solve(cfg: GPTQ, weights: dict, hessian: Array) -> dict:
    """One solve for all consumers of a site: the output channels do not interact."""
    if cfg.weight.granularity == "tensor":  # one scale a weight: no shared solve
        return {p: _solve_jit({p: w}, hessian, cfg=cfg)[p] for p, w in weights.items()}
    return _solve_jit(weights, hessian, cfg=cfg)


@functools.partial(jax.jit, static_argnames="cfg")
def _solve_jit(weights: dict, hessian: Array, cfg: GPTQ) -> dict:
    joined = jnp.concatenate(list(weights.values()), axis=-1)
    solution = gptq(
        joined, hessian, cfg.weight, act_order=cfg.act_order, damp=cfg.damp, clip=cfg.clip
    )
    out, start = {}, 0
    for path, w in weights.items():
        part = slice(start, start := start + w.shape[-1])
        cut = lambda a: a[..., part] if a.shape[-1] > 1 else a  # noqa: B023, E731
        weight = jax.tree.map(cut, solution.weight)
        energy = jnp.maximum(jnp.sum(solution.energy[part]), 1e-30)
        numbers = {
            "error_before": jnp.sum(solution.error_before[part]) / energy,
            "error_after": jnp.sum(solution.error_after[part]) / energy,
            "damp": solution.damp,
        }
        out[path] = weight, dequantize(weight), numbers
    return out


def _checked(numbers: dict, cfg: GPTQ, where: str) -> dict:
    numbers = {k: float(v) for k, v in numbers.items()} | {"bits": cfg.weight.bits}
    if math.isnan(numbers["damp"]):
        raise ValueError(
            f"{where}: the Hessian stays singular with damping up to 1; "
            "calibrate on more text, or text of more kinds"
        )
    return numbers
