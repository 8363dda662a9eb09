"""AutoBits: spend a budget of bits where the model is sensitive.

Every linear, or all linears that read one site, are quantized alone at each of several widths, and
the change of the next-token distribution is measured (`calibrate.sensitivity`). Changes are taken
to add up; the widths with the least sum whose stored size is within the budget are found exactly
(`solvers.budget`). Another method then quantizes the model, with these widths as its exceptions.

Prices are those of rounding within searched ranges, whatever `method` does. On SmolLM2-135M at the
size of uniform W4 that takes RTN from 51.59 to 32.61, and GPTQ, which mends just the linears that
rounding makes dear, from 23.97 to 24.40 (`configs/smollm2_autobits_*.py`).

`AutoBits.found` is that method with its exceptions, which a run also writes as a recipe of its own.

Source: the additive model and its search follow Cai et al., ZeroQ, arXiv 2001.00281, Section 3.2,
with a knapsack in the place of their Pareto front. Left open there: engines that fuse q, k and v,
or gate and up, want one width for all; `by="site"`, the default, gives them one.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from jaxcomp.calibrate.plan import BlockPlan, tree_bytes
from jaxcomp.calibrate.sensitivity import (
    check_probes,
    check_windows,
    measure,
    plan_probes,
    prices,
    probes,
)
from jaxcomp.calibrate.stream import Calibration, Result, Run
from jaxcomp.core.metrics import Row
from jaxcomp.core.quantize import QuantSpec, quantize
from jaxcomp.core.scheme import Override
from jaxcomp.core.tree import get_at
from jaxcomp.models.anatomy import check_grid
from jaxcomp.models.decoder import Block, Decoder, block_struct
from jaxcomp.solvers.budget import choose


@dataclasses.dataclass(frozen=True)
class AutoBits:
    """Settings of the search.

    Attributes:
      method: what quantizes in the end, a method with `weight` and `overrides`, such as
        `GPTQ(weight=QuantSpec(bits=4, group_size=64))`; all widths share its grid's form.
      target_bits: mean stored bits of a weight in the blocks, scales and zero points counted, that
        the result may have; `bits_per_weight` of the report.
      bits: widths to choose from, 2 to 8.
      by: what gets a width: all linears that read one "site", or each "linear".
      windows: measure on the first so many of the calibration windows; None for all. `method` sees
        all of them in any case.
    """

    method: Any
    target_bits: float
    bits: tuple[int, ...] = (2, 3, 4, 6, 8)
    by: Literal["site", "linear"] = "site"
    windows: int | None = None
    needs_text: ClassVar[bool] = True

    def __post_init__(self):
        if not isinstance(getattr(self.method, "weight", None), QuantSpec) or not hasattr(
            self.method, "overrides"
        ):
            raise ValueError(
                f"method={self.method!r:.80} has no weight grid with exceptions; use one with "
                "`weight` and `overrides`, such as GPTQ() or RTN()"
            )
        if self.by not in ("site", "linear"):
            raise ValueError(f"by={self.by!r} is none of site, linear")
        if not self.bits or len(set(self.bits)) < len(self.bits):
            raise ValueError(f"bits={self.bits} must name at least one width, and none twice")
        check_windows(self.windows)
        assert self.grids  # builds each, and refuses widths that no grid has

    @property
    def grids(self) -> tuple[QuantSpec, ...]:
        """The grids that are tried."""
        return tuple(dataclasses.replace(self.method.weight, bits=bits) for bits in self.bits)

    def __call__(self, model: Decoder, calib: Calibration | None, run: Run = Run()) -> Result:
        self.check(model)
        first, second = (
            dataclasses.replace(run, store=run.store and run.store.part(part))
            for part in ("measure", "apply")
        )
        _, rows = measure("AutoBits", model, calib, self.grids, self.by, self.windows, first)
        rows = self.decide(model, rows)
        result = self.found(rows)(model, calib, second)
        return Result(result.model, [*rows, *result.rows])

    def check(self, model: Decoder) -> None:
        """Raises ValueError where the settings do not fit the model; reads no block."""
        check_probes(model, self.by)
        for spec in self.grids:
            check_grid(model, spec)
        self.method.check(model)
        structs = [block_struct(block) for block in model.blocks]
        weights = sum(_count(b, paths) for b in structs for paths in probes(b, self.by).values())
        least = sum(
            min(_bits(b, paths, spec) for spec in self.grids)
            for b in structs
            for paths in probes(b, self.by).values()
        )
        if least > self.target_bits * weights:
            raise ValueError(
                f"target_bits={self.target_bits} is below {least / weights:.3f}, what the smallest "
                f"of bits={self.bits} takes with its scales; allow more, or offer fewer bits"
            )

    def decide(self, model: Decoder, rows: Iterable[Row]) -> list[Row]:
        """The rows of the measurement with the widths chosen: `bits:<what>` in those of blocks."""
        rows, structs = list(rows), [block_struct(block) for block in model.blocks]
        losses: dict[tuple[int, str], dict[int, float]] = {}
        for block, what, bits, kl in prices(rows, "AutoBits"):
            losses.setdefault((block, what), {})[bits] = kl
        paths = {key: probes(structs[key[0]], self.by)[key[1]] for key in losses}
        costs = [[_bits(structs[i], paths[i, w], s) for s in self.grids] for i, w in losses]
        weights = sum(_count(structs[i], p) for (i, _), p in paths.items())
        chosen = choose(
            [np.array(c) for c in costs],
            [np.array([kl[bits] for bits in self.bits]) for kl in losses.values()],
            self.target_bits * weights,
        )
        found: dict[int, dict[str, int]] = {}
        for (block, what), option in zip(losses, chosen, strict=True):
            found.setdefault(block, {})[f"bits:{what}"] = self.bits[option]
        return [
            dataclasses.replace(row, metrics={**row.metrics, **found[row.block]}) for row in rows
        ]

    def found(self, rows: Iterable[Row]) -> Any:
        """`method` with the widths in `rows`, of this step's run, as exceptions after its own."""
        where: dict[tuple[str, int], list[int]] = {}
        for row in rows:
            for key, bits in row.metrics.items() if row.step == "AutoBits" else ():
                if key.startswith("bits:"):
                    where.setdefault((key.removeprefix("bits:"), bits), []).append(row.block)
        kind = f"{self.by}s"
        rules = tuple(
            Override(**{kind: (what,)}, blocks=tuple(blocks), weight_bits=bits)
            for (what, bits), blocks in sorted(where.items())
        )
        return dataclasses.replace(self.method, overrides=(*self.method.overrides, *rules))

    def plan_block(self, block: Block, hidden: Any, batches: int, n_blocks: int) -> BlockPlan:
        """The programs of one block and what they make of it, for a dry run.

        Widths are those of `method`: which ones will be chosen is not known before.
        """
        how = self.grids, self.by, self.windows
        programs, streams = plan_probes(block, hidden, batches, n_blocks, *how)
        inner = self.method.plan_block(block, hidden, batches, n_blocks)
        kept = max(inner.kept_bytes, tree_bytes(block) + streams)
        return BlockPlan([*programs, *inner.programs], kept, inner.result)


def _bits(block: Block, paths: Iterable[str], spec: QuantSpec) -> int:
    """What the weights at `paths` take on that grid, scales and zero points included."""
    to_codes = functools.partial(quantize, spec=spec)
    return sum(8 * tree_bytes(jax.eval_shape(to_codes, get_at(block, p).w)) for p in paths)


def _count(block: Block, paths: Iterable[str]) -> int:
    return sum(get_at(block, path).w.size for path in paths)
