"""GPTQ: quantize weights so that each site's consumers keep their outputs on calibration text.

Per block, site by site in execution order: the Hessian of the site, behind its transforms, is taken
with everything before it already quantized, all consumers of the site are solved at once
(`jaxcomp.solvers.gptq`), and the next block sees what this one now produces.

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
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxcomp.calibrate.capture import Stage, capture, capture_batch
from jaxcomp.calibrate.plan import BlockPlan, Program, tree_bytes
from jaxcomp.calibrate.stats import hessian_finish, hessian_init, hessian_update
from jaxcomp.calibrate.stream import BlockStep, Calibration, Metrics, Result, Run, blockwise
from jaxcomp.core.quantize import QTensor, QuantSpec, dequantize
from jaxcomp.core.scheme import Override, Scheme, settings_in_block
from jaxcomp.core.site import CONSUMER_SITES, Site
from jaxcomp.core.tree import get_at, replace_at, replace_many
from jaxcomp.models.anatomy import anatomy, channels, check_grid
from jaxcomp.models.decoder import Block, Decoder, block_struct
from jaxcomp.models.scaling import as_float32
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
      quantized_activations: False takes the Hessians with the block's activation and cache
        quantizers off, as the authors of QuaRot do; True takes them on and solves for what the
        weights will meet. With 4-bit tokens and a few loud channels that takes 2 to 9 % off the
        output error of a linear, and nothing without loud channels. What enters a block is what
        the finished blocks give, quantizers on: to calibrate without any, add them in a later step.
      overrides: other widths at some sites of some blocks; 16 leaves a linear as it is.
    """

    weight: QuantSpec = QuantSpec(bits=4)
    act_order: bool = True
    damp: float = 0.01
    clip: Clip = "none"
    first_token_weight: float = 1.0
    sequential: bool = True
    quantized_activations: bool = False
    overrides: tuple[Override, ...] = ()
    needs_text: ClassVar[bool] = True

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

        def visit(step: BlockStep) -> tuple[Block, Metrics]:
            return solve_block(settings_in_block(self, step.index, len(model.blocks)), step)

        return blockwise("GPTQ", model, calib, visit, run=run)

    @property
    def scheme(self) -> Scheme:
        """The grids of the whole model."""
        return Scheme(self.weight, overrides=self.overrides)

    def check(self, model: Decoder) -> None:
        """Raises ValueError where the settings do not fit the model; reads no block."""
        self.scheme.check(len(model.blocks))
        check_grid(model, self.weight, self.scheme.linears)
        for i, block in enumerate(map(block_struct, model.blocks)):
            here = settings_in_block(self, i, len(model.blocks))
            for path, site in anatomy(block).linears.items():
                w = get_at(block, path).w
                if isinstance(w, QTensor) and here.scheme.at(site, 0, 1, path).weight:
                    raise ValueError(
                        f"block {i}, {path} is already quantized to {w.bits} bits; GPTQ needs the "
                        "weight as it was"
                    )

    def plan_block(self, block: Block, hidden: Any, batches: int, n_blocks: int) -> BlockPlan:
        """The programs of one block and what they make of it, for a dry run."""
        dense = jax.eval_shape(functools.partial(_for_calibration, self), block)
        programs, solved = [], {}
        for wave in _waves(self, dense):
            if not (wave := [read for read in wave if read.grid]):
                continue
            states = jax.eval_shape(lambda wave=wave: _init(self, dense, wave))
            static = dict(update=hessian_update, stage=_stage(self))
            programs.append(Program(capture_batch, (states, dense, hidden), batches, static))
            for read in wave:
                weights = {path: get_at(dense, path).w for path in read.paths}
                args = weights, states[read.place].total
                program = Program(_solve_jit, args, 1, dict(cfg=_with_grid(self, read.grid)))
                programs.append(program)
                solved |= {f"{path}.w": new[0] for path, new in program.result().items()}
        programs.append(Program(block_step, (dense, hidden), batches))
        return BlockPlan(programs, tree_bytes(dense), replace_many(block, solved))


class Read(NamedTuple):
    """Linears on one grid that read one activation, which are solved together.

    Attributes:
      site: the one that all consumers share.
      place: the site behind which these read, "q_in" say where something happens there.
      grid: None where exceptions leave them as they are.
    """

    site: str
    place: str
    grid: QuantSpec | None
    paths: tuple[str, ...]


def solve_block(cfg: GPTQ, step: BlockStep) -> tuple[Block, Metrics]:
    """Quantizes the linears of one block against its inputs; `cfg` has the block's overrides."""
    block = _for_calibration(cfg, step.block)
    solved, metrics = {}, {}
    for wave in _waves(cfg, block):
        hessians = _hessians(cfg, step, block, [read for read in wave if read.grid])
        for _, place, grid, paths in wave:
            if grid is None:
                reason = {"skipped": "an override leaves it at 16 bits"}
                metrics |= {path: dict(reason) for path in paths}
                continue
            here, weights = _with_grid(cfg, grid), {path: get_at(block, path).w for path in paths}
            solutions = _solve(here, weights, hessians[place])
            for path in paths:
                quantized, values, numbers = solutions[path]
                where = f"block {step.index}, {path} (site {place})"
                metrics[path] = _checked(numbers, here, where)
                block = replace_at(block, f"{path}.w", values)
                solved[f"{path}.w"] = quantized
    return replace_many(step.block, solved), metrics


def _for_calibration(cfg: GPTQ, block: Block) -> Block:
    """The block that calibration text goes through: in float32, its quantizers on or off.

    Every pass sees float32 weights, quantized or not, so that all of them share a compilation.
    """
    block = as_float32(block)
    if cfg.quantized_activations:
        return block
    return block.replace(sites={k: site.replace(quantizer=None) for k, site in block.sites.items()})


def _stage(cfg: GPTQ) -> Stage:
    return "quantized" if cfg.quantized_activations else "transformed"


def _with_grid(cfg: GPTQ, grid: QuantSpec) -> GPTQ:
    """The settings for linears on one grid."""
    return dataclasses.replace(cfg, weight=grid, overrides=())


def _waves(cfg: GPTQ, block: Block) -> list[list[Read]]:
    """What is solved from one pass over the inputs."""
    waves = []
    for name, part in anatomy(block).sites.items():
        reads: dict[tuple, tuple[str, ...]] = {}
        for path in part.consumers:
            own = CONSUMER_SITES.get(path)
            place = own if block.sites.get(own, Site()) != Site() else name
            key = place, cfg.scheme.at(name, 0, 1, path).weight
            reads[key] = (*reads.get(key, ()), path)
        waves.append([Read(name, *key, paths) for key, paths in reads.items()])
    return waves if cfg.sequential else [[read for wave in waves for read in wave]]


def _init(cfg: GPTQ, block: Block, wave: list[Read]) -> dict:
    weight = cfg.first_token_weight
    return {read.place: hessian_init(channels(block, read.site), weight) for read in wave}


def _hessians(cfg: GPTQ, step: BlockStep, block: Block, wave: list[Read]) -> dict:
    if not wave:
        return {}
    init = _init(cfg, block, wave)
    states = capture(block, step.hidden, init, hessian_update, _stage(cfg), step.place)
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
