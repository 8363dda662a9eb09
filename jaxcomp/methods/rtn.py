"""RTN: round every weight to the nearest code of its group's grid. Needs no data.

Also the plainest way to quantize activations and the KV cache: a dynamic quantizer at each site,
measured at run time, whatever made the weights.

Source: Jacob et al., arXiv 1712.05877; the clip search is `jaxcomp.solvers.clipping`.
"""

import dataclasses
import functools
from typing import Any

import jax

from jaxcomp.calibrate.plan import BlockPlan, Program, tree_bytes
from jaxcomp.calibrate.stream import BlockStep, Calibration, Metrics, Result, Run, blockwise
from jaxcomp.core.metrics import relative_error
from jaxcomp.core.quantize import QTensor, QuantSpec, dequantize, fit_range, quantize_with
from jaxcomp.core.site import ActQuantizer, Site
from jaxcomp.core.tree import get_at, replace_at
from jaxcomp.models.anatomy import anatomy, check_grid
from jaxcomp.models.decoder import Block, Decoder
from jaxcomp.solvers.clipping import search_range


@dataclasses.dataclass(frozen=True)
class RTN:
    """Settings of round-to-nearest.

    Attributes:
      weight: grid of every linear in the blocks; None leaves the weights as they are.
      act: dynamic grid of the linears' inputs; None leaves them alone.
      kv: dynamic grid of the cached keys and values; None leaves them alone.
      clip: search each group's range instead of taking min and max.
    """

    weight: QuantSpec | None = QuantSpec(bits=4)
    act: QuantSpec | None = None
    kv: QuantSpec | None = None
    clip: bool = False

    def __post_init__(self):
        for name, spec in (("act", self.act), ("kv", self.kv)):
            if spec is not None and not spec.dynamic:
                raise ValueError(
                    f"{name}={spec} is static, and RTN sees no data to fix its range; "
                    "use QuantSpec(…, granularity='token' or 'head', dynamic=True)"
                )

    def __call__(
        self, model: Decoder, calib: Calibration | None = None, run: Run = Run()
    ) -> Result:
        self.check(model)
        return blockwise("RTN", model, calib, functools.partial(round_block, self), None, run)

    def check(self, model: Decoder) -> None:
        """Raises ValueError where the settings do not fit the model; reads no block."""
        if self.weight is not None:
            check_grid(model, self.weight)

    def plan_block(self, block: Block, hidden: Any, batches: int) -> BlockPlan:
        """The programs of one block, for a dry run."""
        programs = []
        for path in anatomy(block).linears if self.weight else ():
            w = get_at(block, path).w
            if not isinstance(w, QTensor):
                programs.append(Program(_round, (w,), 1, dict(spec=self.weight, clip=self.clip)))
        return BlockPlan(programs, kept_bytes=tree_bytes(block))


def round_block(cfg: RTN, step: BlockStep) -> tuple[Block, Metrics]:
    """Quantizes one block's weights and puts quantizers at its sites."""
    block, metrics = step.block, {}
    parts = anatomy(block)
    for path in parts.linears:
        w = get_at(step.block, path).w
        if cfg.weight is None or isinstance(w, QTensor):
            continue
        quantized, error = _round(w, spec=cfg.weight, clip=cfg.clip)
        block = replace_at(block, f"{path}.w", quantized)
        metrics[path] = {"weight_error": float(error), "bits": cfg.weight.bits}
    sites = {name: cfg.act for name in parts.sites} | {"k_cache": cfg.kv, "v_cache": cfg.kv}
    added = {name: Site(ActQuantizer(spec)) for name, spec in sites.items() if spec is not None}
    return block.replace(sites={**block.sites, **added}), metrics


@functools.partial(jax.jit, static_argnames=("spec", "clip"))
def _round(w, spec, clip):
    scale, zero_point = (search_range if clip else fit_range)(w, spec)
    quantized = quantize_with(w, scale, zero_point, spec)
    return quantized, relative_error(dequantize(quantized), w)
