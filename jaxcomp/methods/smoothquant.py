"""SmoothQuant: move activation outliers into the weights with a scale per channel.

At a site with input x and consumers W:
    s = amax|x|^α / amax|W|^(1−α),    x ← x / s,   W ← s W
The division folds into the site's producer: the function stays what it was, nothing runs online
and nothing is quantized. A recipe composes it with a method that quantizes, such as
`(SmoothQuant(), RTN(weight=…, act=…))`.

Source: Xiao et al., arXiv 2211.10438, Eq. 4. α = 0.5 is the paper's; "Quantization Hurts
Reasoning?" (arXiv 2504.04823) runs 0.85, the default of its code. With several consumers amax|W| is
the largest among them, and the sites are the inputs of attention and feed-forward unit, as in the
authors' code. Departures: `attn_out` and `ffn_mid` can be asked for; under grouped heads both
maxima are taken over the repeats of a value head, since the scale must be equal there.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxcomp.calibrate.capture import capture, capture_batch
from jaxcomp.calibrate.plan import BlockPlan, Program, tree_bytes
from jaxcomp.calibrate.stats import Magnitude, magnitude_init, magnitude_update
from jaxcomp.calibrate.stream import BlockStep, Calibration, Metrics, Result, Run, blockwise
from jaxcomp.models.anatomy import anatomy, channels
from jaxcomp.models.decoder import Block, Decoder
from jaxcomp.models.scaling import check_scalable, consumer_amax, divide_sites, even_repeats
from jaxcomp.models.stream import block_step
from jaxcomp.solvers.smoothing import smoothing_scale


@dataclasses.dataclass(frozen=True)
class SmoothQuant:
    """Settings of SmoothQuant.

    Attributes:
      alpha: share of the difficulty moved from the activations to the weights, in [0, 1].
      sites: where; also possible are "attn_out" and "ffn_mid".
    """

    alpha: float = 0.5
    sites: tuple[str, ...] = ("attn_in", "ffn_in")
    needs_text: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} is outside [0, 1]; the paper's value is 0.5")
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise ValueError(f"sites={self.sites} must name at least one site, and none twice")

    def __call__(self, model: Decoder, calib: Calibration | None, run: Run = Run()) -> Result:
        self.check(model)
        visit = functools.partial(smooth_block, self)
        return blockwise("SmoothQuant", model, calib, visit, run=run)

    def check(self, model: Decoder) -> None:
        """Raises ValueError where the settings do not fit the model; reads no block."""
        check_scalable(model, self.sites)

    def plan_block(self, block: Block, hidden: Any, batches: int, n_blocks: int) -> BlockPlan:
        """The programs of one block and what they make of it, for a dry run."""
        states = jax.eval_shape(lambda: _init(self, block))
        static = dict(update=magnitude_update, stage="raw")
        programs = [
            Program(capture_batch, (states, block, hidden), batches, static),
            Program(_smooth, (block, states), 1, dict(cfg=self)),
            Program(block_step, (block, hidden), batches),
        ]
        return BlockPlan(programs, tree_bytes(block), block)


def smooth_block(cfg: SmoothQuant, step: BlockStep) -> tuple[Block, Metrics]:
    """Smooths the chosen sites of one block, which computes the same as before."""
    init = _init(cfg, step.block)
    seen = capture(step.block, step.hidden, init, magnitude_update, "raw", step.place)
    for site, state in seen.items():
        if not bool(jnp.isfinite(state.amax).all()):
            raise ValueError(
                f"block {step.index}, site {site}: the activations hold NaN or infinity; "
                "evaluate the model first, its own output is affected"
            )
    block, numbers = _smooth(step.block, seen, cfg=cfg)
    return block, {"": {name: float(value) for name, value in numbers.items()}}


def _init(cfg: SmoothQuant, block: Block) -> dict[str, Magnitude]:
    return {site: magnitude_init(channels(block, site)) for site in cfg.sites}


@functools.partial(jax.jit, static_argnames="cfg")
def _smooth(block: Block, seen: dict[str, Magnitude], cfg: SmoothQuant) -> tuple[Block, dict]:
    scales, numbers = {}, {}
    for site in cfg.sites:
        even = functools.partial(even_repeats, block, anatomy(block)[site])
        x_amax, w_amax = seen[site].amax, consumer_amax(block, site)
        scales[site] = smoothing_scale(even(x_amax), even(w_amax), cfg.alpha)
        numbers[f"{site}_amax_before"] = jnp.max(x_amax)
        numbers[f"{site}_amax_after"] = jnp.max(x_amax / scales[site])
        numbers[f"{site}_weight_amax_before"] = jnp.max(w_amax)
        numbers[f"{site}_weight_amax_after"] = jnp.max(w_amax * scales[site])
    return divide_sites(block, scales), numbers
