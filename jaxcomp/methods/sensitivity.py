"""Sensitivity: which weights can bear few bits; the model is left as it is.

Linears, sites or blocks are quantized alone, one after the other, and what that does to the
model's next-token distribution is in the rows: `kl:<what>:<bits>` in the row of a block is
KL(p ‖ p′) in nats, the mean over the calibration text. How is in `calibrate.sensitivity`.

Source: the measure of Cai et al., ZeroQ, arXiv 2001.00281, Eq. 2, taken on a language model's next
token, on text instead of distilled data.
"""

import dataclasses
from typing import Any, ClassVar

from jaxcomp.calibrate.plan import BlockPlan, tree_bytes
from jaxcomp.calibrate.sensitivity import By, check_probes, check_windows, measure, plan_probes
from jaxcomp.calibrate.stream import Calibration, Result, Run
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.models.anatomy import check_grid
from jaxcomp.models.decoder import Block, Decoder


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Settings of the measurement.

    Attributes:
      weight: grid of the weights that are quantized.
      bits: widths that it is tried with; () for its own alone.
      by: what is quantized at a time: a "linear", all linears that read one "site", or a "block".
      windows: the first so many of the calibration windows; None for all.
    """

    weight: QuantSpec = QuantSpec(bits=4)
    bits: tuple[int, ...] = ()
    by: By = "linear"
    windows: int | None = None
    needs_text: ClassVar[bool] = True

    def __post_init__(self):
        check_windows(self.windows)
        assert self.grids  # builds each, and refuses widths that no grid has

    @property
    def grids(self) -> tuple[QuantSpec, ...]:
        """The grids that are tried."""
        widths = self.bits or (self.weight.bits,)
        return tuple(dataclasses.replace(self.weight, bits=bits) for bits in widths)

    def __call__(self, model: Decoder, calib: Calibration | None, run: Run = Run()) -> Result:
        self.check(model)
        return measure("Sensitivity", model, calib, self.grids, self.by, self.windows, run)

    def check(self, model: Decoder) -> None:
        """Raises ValueError where the settings do not fit the model; reads no block."""
        check_probes(model, self.by)
        check_grid(model, self.weight)

    def plan_block(self, block: Block, hidden: Any, batches: int, n_blocks: int) -> BlockPlan:
        """The programs of one block and what they make of it, for a dry run."""
        how = self.grids, self.by, self.windows
        programs, streams = plan_probes(block, hidden, batches, n_blocks, *how)
        return BlockPlan(programs, tree_bytes(block) + streams, block)
