"""RTN: round every weight to the nearest code of its group's grid. Weights need no data.

Also the plainest way to quantize activations and the KV cache, whatever made the weights: a
quantizer at each site, with its range measured at run time (dynamic) or on calibration text
(static). And the way to round the embedding and the head, `RTN(weight=None, ends=QuantSpec(8))`. A
static range is that of the block with its weights rounded, in two forms: one for a whole
activation, or one for each channel of each key head ("channel"), which is how keys with outlier
channels are usually held.

Source: Jacob et al., arXiv 1712.05877; the clip search is `jaxcomp.solvers.clipping`; fixed clip
ratios as in QuaRot, arXiv 2404.00456 (0.9 for activations, 0.95 for the cache).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.calibrate.capture import capture, capture_batch
from jaxcomp.calibrate.plan import BlockPlan, Program, tree_bytes
from jaxcomp.calibrate.stats import Range, range_init, range_update
from jaxcomp.calibrate.stream import BlockStep, Calibration, Metrics, Result, Run, blockwise
from jaxcomp.core.metrics import Row, relative_error
from jaxcomp.core.quantize import (
    QTensor,
    QuantSpec,
    dequantize,
    fit_range,
    n_groups,
    quantize_with,
    range_to_grid,
)
from jaxcomp.core.scheme import Override, Scheme, settings_in_block
from jaxcomp.core.site import CONSUMER_SITES, ActQuantizer, Site
from jaxcomp.core.tree import get_at, replace_at
from jaxcomp.models.anatomy import anatomy, channels, check_grid
from jaxcomp.models.decoder import Block, Decoder, block_struct
from jaxcomp.models.stream import block_step
from jaxcomp.solvers.clipping import search_range

CACHE_SITES = ("k_cache", "v_cache")
# What may share a range, dynamic or not.
ACT_GRIDS = (("token", True), ("tensor", True), ("tensor", False))
# A cache grows token by token: no range can span all of its tokens but a fixed one.
CACHE_GRIDS = (("head", True), ("tensor", False), ("channel", False))


@dataclasses.dataclass(frozen=True)
class RTN:
    """Settings of round-to-nearest.

    Attributes:
      weight: grid of every linear in the blocks; None leaves the weights as they are, and so are
        weights that are quantized already.
      act: grid of the linears' inputs, per token or per tensor; None leaves them alone.
      kv: grid of the cached keys and values: "head" is one range for each token and head.
      k, v: grids of the keys and of the values where they differ from `kv`.
      clip: search each weight group's range instead of taking min and max.
      act_clip, kv_clip: share of the range that is kept, in (0, 1]; what is beyond saturates.
      overrides: other widths at some sites of some blocks.
      ends: grid of the embedding and of the head, along d_model, with a range for every token of
        the vocabulary or for groups of its channels; one table where the model ties them. None
        leaves them as they are, and so are those that are quantized already.
    """

    weight: QuantSpec | None = QuantSpec(bits=4)
    act: QuantSpec | None = None
    kv: QuantSpec | None = None
    k: QuantSpec | None = None
    v: QuantSpec | None = None
    clip: bool = False
    act_clip: float = 1.0
    kv_clip: float = 1.0
    overrides: tuple[Override, ...] = ()
    ends: QuantSpec | None = None

    def __post_init__(self):
        for name, grids in (("act", ACT_GRIDS), *((n, CACHE_GRIDS) for n in ("kv", "k", "v"))):
            _check_site_grid(name, getattr(self, name), grids)
        for name in ("act_clip", "kv_clip"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} is outside (0, 1]; 1.0 keeps the whole range"
                )

    @property
    def scheme(self) -> Scheme:
        """The grids of the whole model."""
        return Scheme(self.weight, self.act, self.k or self.kv, self.v or self.kv, self.overrides)

    @property
    def needs_text(self) -> bool:
        """Whether some range has to be measured on calibration text."""
        grids = (self.scheme.act, self.scheme.k, self.scheme.v)
        return any(spec is not None and not spec.dynamic for spec in grids)

    def __call__(
        self, model: Decoder, calib: Calibration | None = None, run: Run = Run()
    ) -> Result:
        self.check(model)

        def visit(step: BlockStep) -> tuple[Block, Metrics]:
            return round_block(settings_in_block(self, step.index, len(model.blocks)), step)

        inputs = "compressed" if self.needs_text else None
        result = blockwise("RTN", model, calib, visit, inputs, run)
        if self.ends is None:
            return result
        model, rows = round_ends(self, result.model)
        return Result(model, result.rows + rows)

    def check(self, model: Decoder) -> None:
        """Raises ValueError where the settings do not fit the model; reads no block."""
        self.scheme.check(len(model.blocks))
        if self.weight is not None:
            check_grid(model, self.weight, self.scheme.linears)
        if self.ends is not None:
            _check_ends(self.ends, model.config.d_model)
        for i, block in enumerate(map(block_struct, model.blocks)):
            for site in site_grids(settings_in_block(self, i, len(model.blocks)), block):
                part = anatomy(block).sites.get(site)
                views = [CONSUMER_SITES.get(path) for path in part.consumers] if part else []
                for name in (site, *views):
                    if name in block.sites and block.sites[name].quantizer is not None:
                        raise ValueError(
                            f"block {i} has a quantizer at {name} already, and RTN would add one "
                            f"at {site}; leave that grid out, or start from the model without it"
                        )

    def plan_block(self, block: Block, hidden: Any, batches: int, n_blocks: int) -> BlockPlan:
        """The programs of one block and what they make of it, for a dry run."""
        programs, rounded = [], block
        for path, site in anatomy(block).linears.items():
            spec, w = self.scheme.at(site, 0, 1, path).weight, get_at(block, path).w
            if spec is None or isinstance(w, QTensor):
                continue
            program = Program(_round, (w,), 1, dict(spec=spec, clip=self.clip))
            programs.append(program)
            rounded = replace_at(rounded, f"{path}.w", program.result()[0])
        grids = site_grids(self, block)
        states = jax.eval_shape(lambda: _range_init(block, grids))
        if states:
            update = dict(update=range_update, stage="transformed")
            programs.append(Program(capture_batch, (states, rounded, hidden), batches, update))
        if self.needs_text:
            programs.append(Program(block_step, (rounded, hidden), batches))
        put = functools.partial(put_quantizers, self, grids)
        result = jax.eval_shape(
            lambda block, states: put(block, _shared(grids, states)), rounded, states
        )
        return BlockPlan(programs, tree_bytes(block), result)


def round_block(cfg: RTN, step: BlockStep) -> tuple[Block, Metrics]:
    """Quantizes one block's weights and puts quantizers at its sites; `cfg` has its overrides."""
    block, metrics = step.block, {}
    for path, site in anatomy(block).linears.items():
        spec, w = cfg.scheme.at(site, 0, 1, path).weight, get_at(block, path).w
        if cfg.weight is None:
            continue
        if isinstance(w, QTensor):
            metrics[path] = {"skipped": f"already quantized to {w.bits} bits"}
        elif spec is None:
            metrics[path] = {"skipped": "an override leaves it at 16 bits"}
        else:
            quantized, error = _round(w, spec=spec, clip=cfg.clip)
            block = replace_at(block, f"{path}.w", quantized)
            metrics[path] = {"weight_error": float(error), "bits": spec.bits}
    grids = site_grids(cfg, block)
    dynamic = {name: spec for name, spec in grids.items() if spec.dynamic}
    block = put_quantizers(cfg, dynamic, block, {})
    ranges = measure_ranges(block, grids, step)
    return put_quantizers(cfg, grids, block, ranges), metrics


def round_ends(cfg: RTN, model: Decoder) -> tuple[Decoder, list[Row]]:
    """Quantizes the embedding, and the head unless it is the same table."""
    rows, tied = [], model.lm_head is None

    def rounded(name: str, w: Any) -> Any:
        if isinstance(w, QTensor):
            metrics = {"skipped": f"already quantized to {w.bits} bits"}
        else:
            w, error = _round(w, spec=cfg.ends, clip=cfg.clip)
            metrics = {"weight_error": float(error), "bits": cfg.ends.bits}
        rows.append(Row("RTN", None, name, metrics))
        return w

    table = model.embed.weight
    table = table if isinstance(table, QTensor) else jnp.asarray(table).T
    table = rounded("embed and head" if tied else "embed", table)
    head = model.lm_head if tied else model.lm_head.replace(w=rounded("head", model.lm_head.w))
    return model.replace(embed=model.embed.replace(weight=table), lm_head=head), rows


def site_grids(cfg: RTN, block: Block) -> dict[str, QuantSpec]:
    """Site → grid, for the sites of a block that get a quantizer."""
    grids = {name: cfg.scheme.at(name, 0, 1).act for name in anatomy(block).sites}
    for name, which in (("k_cache", "k"), ("v_cache", "v")):
        grids[name] = getattr(cfg.scheme.at(name, 0, 1), which)
    return {name: spec for name, spec in grids.items() if spec is not None}


def put_quantizers(
    cfg: RTN, grids: dict[str, QuantSpec], block: Block, ranges: dict[str, Range]
) -> Block:
    """The block with a quantizer at each site of `grids`; the sites' transforms stay.

    Args:
      ranges: of the sites with a static grid.
    """
    sites = dict(block.sites)
    for name, spec in grids.items():
        clip = cfg.kv_clip if name in CACHE_SITES else cfg.act_clip
        if spec.dynamic:
            factors = None if clip == 1 else jnp.full(2, clip, jnp.float32)
            quantizer = ActQuantizer(spec, clip=factors)
        else:
            low, high = ranges[name]
            quantizer = ActQuantizer(spec, *range_to_grid(low * clip, high * clip, spec))
        sites[name] = sites.get(name, Site()).replace(quantizer=quantizer)
    return block.replace(sites=sites)


def measure_ranges(block: Block, grids: dict[str, QuantSpec], step: BlockStep) -> dict[str, Range]:
    """Site with a static grid → least and greatest value on the text, in the shape they share."""
    init = _range_init(block, grids)
    if not init:
        return {}
    states = capture(block, step.hidden, init, range_update, "transformed", step.place)
    for name, state in states.items():
        if not all(bool(jnp.isfinite(edge).all()) for edge in state):
            raise ValueError(
                f"block {step.index}, site {name}: the activations hold NaN or infinity; "
                "evaluate the model first, its own output is affected"
            )
    return _shared(grids, states)


def _shared(grids: dict[str, QuantSpec], states: dict[str, Range]) -> dict[str, Range]:
    """Ranges of channels as ranges of what shares a grid."""
    return {
        name: Range(jnp.min(state.low), jnp.max(state.high))
        if grids[name].granularity == "tensor"
        else state
        for name, state in states.items()
    }


def _range_init(block: Block, grids: dict[str, QuantSpec]) -> dict[str, Range]:
    states = {}
    for name, spec in grids.items():
        if spec.dynamic:
            continue
        if name in CACHE_SITES:
            states[name] = range_init(block.attn.n_kv_heads, block.attn.head_dim)
        else:
            states[name] = range_init(channels(block, name))
    return states


def _check_ends(spec: QuantSpec, d_model: int) -> None:
    """Refuses a grid that the embedding cannot have."""
    if spec.granularity != "channel":
        raise ValueError(
            f"ends has granularity={spec.granularity!r}; the embedding takes 'channel', a range "
            "for every token, if need be with a group_size"
        )
    try:
        n_groups(d_model, spec)
    except ValueError as error:
        raise ValueError(f"ends: {error}") from None


def _check_site_grid(name: str, spec: QuantSpec | None, grids: tuple) -> None:
    """Refuses a grid that an activation cannot have."""
    if spec is None:
        return
    if spec.group_size is not None:
        raise ValueError(
            f"{name} has group_size={spec.group_size}, and only weights have groups; in the cache "
            "granularity='head' is one range for each token and head_dim channels"
        )
    if (spec.granularity, spec.dynamic) not in grids:
        ways = ", ".join(f"granularity={g!r} with dynamic={d}" for g, d in grids)
        raise ValueError(
            f"{name} has granularity={spec.granularity!r} with dynamic={spec.dynamic}; use {ways}"
        )


@functools.partial(jax.jit, static_argnames=("spec", "clip"))
def _round(w, spec, clip):
    scale, zero_point = (search_range if clip else fit_range)(w, spec)
    quantized = quantize_with(w, scale, zero_point, spec)
    return quantized, relative_error(dequantize(quantized), w)
