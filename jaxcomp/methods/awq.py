"""AWQ: scale up the weights that read large activations, clamp the rest, then round.

At a site with input x and consumers W, for r = i/20, i = 0 … 19:
    s = mean|x|^r, normalised to √(max s · min s) = 1,    Ŵ = Q(s W) / s
and the r whose Ŵ changes the output of the unit least is kept; s folds into the site's producer.
What is compared: the whole attention unit behind `attn_in`, the whole feed-forward unit behind
`ffn_in`, the one linear behind `attn_out` and `ffn_mid`. All sites are searched on the block as it
came, and the next block gets what the model without any rounding produces.

Then the range of each group of every linear but queries and keys is clamped
(`jaxcomp.solvers.clamping`) and the weights are rounded to nearest.

Source: Lin et al., arXiv 2306.00978, and the authors' code as configured in "Quantization Hurts
Reasoning?" (arXiv 2504.04823), with its bounds and without the exponent on the weights. Departures:
- outputs are compared on `search_tokens` of the calibration text (there: on all of it);
- asymmetric ranges are widened to contain 0, as everywhere in this library (there they are not);
- `attn_out` is scaled wherever every head has its own value head (there: only if the weights of v
  and o also have equal shapes). Under grouped heads it never is, and the row of the block says so.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.calibrate.capture import capture, capture_batch
from jaxcomp.calibrate.plan import BlockPlan, Program, tree_bytes
from jaxcomp.calibrate.stats import Magnitude, magnitude_init, magnitude_update
from jaxcomp.calibrate.stream import BlockStep, Calibration, Metrics, Result, Run, blockwise
from jaxcomp.core.linear import linear
from jaxcomp.core.metrics import relative_error
from jaxcomp.core.quantize import (
    QTensor,
    QuantSpec,
    dequantize,
    fake_quantize,
    quantize,
)
from jaxcomp.core.site import CONSUMER_SITES, site_tap
from jaxcomp.core.tree import get_at, replace_at, replace_many
from jaxcomp.models.anatomy import anatomy, channels, check_grid, score_linears
from jaxcomp.models.attention import attention, plain_context
from jaxcomp.models.decoder import Block, Decoder, block_forward, block_struct
from jaxcomp.models.ffn import ffn
from jaxcomp.models.scaling import as_float32, divide_sites, unscalable
from jaxcomp.models.stream import Hidden, block_step
from jaxcomp.solvers.clamping import group_gram, search_clamp
from jaxcomp.solvers.smoothing import awq_scale


@dataclasses.dataclass(frozen=True)
class AWQ:
    """Settings of AWQ.

    Attributes:
      weight: grid of every linear in the blocks.
      scale: search the scales.
      clip: search the clamps.
      sites: where to scale; None for all sites of a block that can take a scale.
      grid: exponents tried, i/grid.
      search_tokens: tokens on which candidates are compared, in whole windows spread over the
        calibration text, at least one.
      clip_tokens: evenly spaced tokens out of those, for the clamps and the errors in the report.
    """

    weight: QuantSpec = QuantSpec(bits=4, group_size=128, symmetric=False)
    scale: bool = True
    clip: bool = True
    sites: tuple[str, ...] | None = None
    grid: int = 20
    search_tokens: int = 4096
    clip_tokens: int = 512
    needs_text: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("grid", "search_tokens", "clip_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1")

    def __call__(self, model: Decoder, calib: Calibration | None, run: Run = Run()) -> Result:
        self.check(model)
        if run.place.processes > 1:
            raise ValueError(
                f"AWQ searches on windows of the whole text, and {run.place.processes} processes "
                "hold a part each; give it a mesh over the devices of one process"
            )
        visit = functools.partial(quantize_block, self)
        return blockwise("AWQ", model, calib, visit, inputs="original", run=run)

    def check(self, model: Decoder) -> None:
        """Raises ValueError where the settings do not fit the model; reads no block."""
        check_grid(model, self.weight)
        for i, block in enumerate(map(block_struct, model.blocks)):
            for path in anatomy(block).linears:
                w = get_at(block, path).w
                if isinstance(w, QTensor):
                    raise ValueError(
                        f"block {i}, {path} is already quantized to {w.bits} bits; "
                        "AWQ needs the weight as it was"
                    )
            for site in (self.sites or ()) if self.scale else ():
                if why := _unscalable(block, site):
                    raise ValueError(
                        f"block {i}: {site} cannot be scaled: {why}; leave it out of `sites`"
                    )

    def plan_block(self, block: Block, hidden: Any, batches: int, n_blocks: int) -> BlockPlan:
        """The programs of one block and what they make of it, for a dry run."""
        sites, _ = _sites(self, block)
        windows = min(batches * hidden.shape[0], _windows(self, hidden.shape[1]))
        sample = jax.ShapeDtypeStruct((windows, *hidden.shape[1:]), hidden.dtype)
        states = jax.eval_shape(lambda: _init(block, sites))
        static = dict(sites=tuple(sites), count=self.clip_tokens)
        seen = _observe.eval_shape(block, sample, **static)
        programs = [Program(_observe, (block, sample), 1, static)]
        if sites:
            static = dict(update=magnitude_update, stage="raw")
            programs.append(Program(capture_batch, (states, block, hidden), batches, static))
        scales = {}
        for site in sites:
            args = block, seen.sites[site], states[site]
            static = dict(site=site, spec=self.weight, grid=self.grid)
            programs.append(Program(_search, args, 1, static))
            scales[site] = states[site].amax
        static = dict(spec=self.weight, clip=self.clip)
        rounding = Program(_round, (block, scales, seen.inputs), 1, static)
        programs += [rounding, Program(block_step, (block, hidden), batches)]
        return BlockPlan(programs, tree_bytes((block, seen)), rounding.result()[0])


class Seen(NamedTuple):
    """What passes in a block on the sample.

    Attributes:
      sites: the activation at each site, `[windows, time, channels]`.
      inputs: what each linear reads, on `clip_tokens` of those tokens, `[tokens, in_ch]`.
    """

    sites: dict[str, Float[Array, "windows time channels"]]
    inputs: dict[str, Float[Array, "tokens in_ch"]]


def quantize_block(cfg: AWQ, step: BlockStep) -> tuple[Block, Metrics]:
    """Scales, clamps and rounds the linears of one block against its inputs."""
    seen = observe(cfg, step)
    scales, numbers = search_scales(cfg, step, seen)
    block, metrics = _round(step.block, scales, seen.inputs, spec=cfg.weight, clip=cfg.clip)
    bits = {"bits": cfg.weight.bits}
    rows = {
        path: {k: float(v) for k, v in metrics[path].items()} | bits
        for path in anatomy(block).linears
    }
    return block, rows | {"": numbers}


def observe(cfg: AWQ, step: BlockStep) -> Seen:
    """Runs the block on the sample."""
    sites, _ = _sites(cfg, step.block)
    sample = _sample(cfg, step.hidden)
    return _observe(step.block, sample, sites=tuple(sites), count=cfg.clip_tokens)


def search_scales(
    cfg: AWQ, step: BlockStep, seen: Seen
) -> tuple[dict[str, Float[Array, " channels"]], dict[str, float | str]]:
    """The scale of each site that can take one, and the numbers for the row of the block.

    Raises:
      ValueError: no exponent gives a finite error; names the block and the site.
    """
    sites, reasons = _sites(cfg, step.block)
    numbers: dict[str, float | str] = {f"{s}_skipped": why for s, why in reasons.items()}
    scales = {}
    if not sites:
        return scales, numbers
    init = _init(step.block, sites)
    size = capture(step.block, step.hidden, init, magnitude_update, "raw", step.place)
    for site in sites:
        found = _search(
            step.block, seen.sites[site], size[site], site=site, spec=cfg.weight, grid=cfg.grid
        )
        losses = np.where(np.isfinite(found.losses), found.losses, np.inf)
        if np.isinf(losses).all():
            raise ValueError(
                f"block {step.index}, site {site}: none of the {cfg.grid} exponents gives a finite "
                "error; the activations hold NaN or infinity, evaluate the model first"
            )
        scales[site] = found.scale
        numbers[f"{site}_ratio"] = int(np.argmin(losses)) / cfg.grid
        numbers[f"{site}_error_unscaled"] = float(found.losses[0])
        numbers[f"{site}_error"] = float(np.min(losses))
    return scales, numbers


class Found(NamedTuple):
    """The scale of the best exponent of a site, and the relative error of each exponent."""

    scale: Float[Array, " channels"]
    losses: Float[Array, " grid"]


@functools.partial(jax.jit, static_argnames=("sites", "count"))
def _observe(
    block: Block, x: Float[Array, "windows time d_model"], sites: tuple[str, ...], count: int
) -> Seen:
    records, enter = {}, site_tap(block.sites)

    def tap(name: str, h: Array) -> Array:
        records[name] = enter(name, h)
        return records[name]

    block_forward(block, x, plain_context(*x.shape[:2]), tap)
    inputs, stride = {}, -(-(x.shape[0] * x.shape[1]) // count)
    for path, site in anatomy(block).linears.items():
        read = records[CONSUMER_SITES.get(path, site)]
        inputs[path] = read.reshape(-1, read.shape[-1])[::stride]
    return Seen({site: records[site] for site in sites}, inputs)


@functools.partial(jax.jit, static_argnames=("site", "spec", "grid"))
def _search(
    block: Block, x: Array, size: Magnitude, site: str, spec: QuantSpec, grid: int
) -> Found:
    consumers = anatomy(block)[site].consumers
    weights = {path: get_at(block, path).w.astype(jnp.float32) for path in consumers}
    mean, target = size.total / jnp.maximum(size.count, 1.0), _output(block, site, x)

    def loss(ratio: Array) -> Array:
        s = awq_scale(mean, ratio)[:, None]
        rounded = {f"{p}.w": fake_quantize(w * s, spec) / s for p, w in weights.items()}
        return relative_error(_output(replace_many(block, rounded), site, x), target)

    ratios = jnp.arange(grid) / grid
    losses = jax.lax.map(loss, ratios)  # one at a time: memory for one candidate, one compilation
    best = ratios[jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))]
    return Found(awq_scale(mean, best), losses)


def _output(block: Block, site: str, x: Array) -> Array:
    """What the candidates at a site are compared by, given the activation there."""
    consumers, tap = anatomy(block)[site].consumers, site_tap(block.sites)
    if len(consumers) == 1:
        return linear(get_at(block, consumers[0]), x, jnp.float32)
    if site == "attn_in":
        return attention(block.attn, x, plain_context(*x.shape[:2]), tap)[0]
    return ffn(block.ffn, x, tap)


@functools.partial(jax.jit, static_argnames=("spec", "clip"))
def _round(
    block: Block, scales: dict, inputs: dict, spec: QuantSpec, clip: bool
) -> tuple[Block, dict]:
    scaled, metrics = divide_sites(as_float32(block), scales), {}
    # What keeps its float form is rounded to the stored dtypes; weights go to their codes directly.
    result = jax.tree.map(lambda new, old: new.astype(old.dtype), scaled, block)
    unclamped = score_linears(block.attn)
    for path, site in anatomy(block).linears.items():
        x, w = inputs[path].astype(jnp.float32), get_at(block, path).w.astype(jnp.float32)
        error_before = relative_error(x @ dequantize(quantize(w, spec)), x @ w)
        x, w = x / scales.get(site, 1.0), get_at(scaled, path).w
        clamped = (
            search_clamp(w, group_gram(x, spec), spec) if clip and path not in unclamped else w
        )
        rounded = quantize(clamped, spec)
        error_after = relative_error(x @ dequantize(rounded), x @ w)
        metrics[path] = {"error_before": error_before, "error_after": error_after}
        result = replace_at(result, f"{path}.w", rounded)
    return result, metrics


def _sites(cfg: AWQ, block: Block) -> tuple[list[str], dict[str, str]]:
    """The sites of a block to scale, and why the others cannot be."""
    if not cfg.scale:
        return [], {}
    wanted = [s for s in anatomy(block).sites if cfg.sites is None or s in cfg.sites]
    reasons = {site: why for site in wanted if (why := _unscalable(block, site))}
    return [site for site in wanted if site not in reasons], reasons


def _unscalable(block: Block, site: str) -> str | None:
    why = unscalable(block, site)
    if why is None and (repeats := anatomy(block)[site].repeats) > 1:
        why = f"the anatomy repeats each value head {repeats} times there"
    return why


def _init(block: Block, sites: list[str]) -> dict[str, Magnitude]:
    return {site: magnitude_init(channels(block, site)) for site in sites}


def _windows(cfg: AWQ, time: int) -> int:
    """Windows that make up the sample, if there are so many."""
    return max(1, cfg.search_tokens // time)


def _sample(cfg: AWQ, hidden: Hidden) -> np.ndarray:
    """Windows spread evenly over all batches, however these were cut."""
    total = sum(len(x) for x in hidden)
    count = min(total, _windows(cfg, hidden[0].shape[1]))
    chosen, start, parts = np.arange(count) * total // count, 0, []
    for x in hidden:
        parts.append(x[chosen[(chosen >= start) & (chosen < start + len(x))] - start])
        start += len(x)
    return np.concatenate(parts)
