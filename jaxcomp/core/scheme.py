"""Which grid goes where: one grid for all places of a kind, and exceptions by site and by block."""

import dataclasses

from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.site import SITES
from jaxcomp.core.struct import static_value


@static_value
class Override:
    """Other widths at some sites of some blocks.

    Attributes:
      sites: where; () for all. A weight is at the site that it reads.
      blocks: in which blocks; () for all, negative ones count from the end.
      weight_bits, act_bits, kv_bits: 2..8, 16 for no quantization, None for no change.
    """

    sites: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    weight_bits: int | None = None
    act_bits: int | None = None
    kv_bits: int | None = None

    def __post_init__(self):
        if unknown := [s for s in self.sites if s not in SITES]:
            raise ValueError(f"there is no site {unknown[0]!r}; there is: {', '.join(SITES)}")
        for name in ("weight_bits", "act_bits", "kv_bits"):
            bits = getattr(self, name)
            if bits is not None and not (bits == 16 or 2 <= bits <= 8):
                raise ValueError(f"{name}={bits} is outside 2..8 and not 16, which means off")


@static_value
class Scheme:
    """The grids of a model.

    Attributes:
      weight: every linear in the blocks; None leaves weights alone.
      act: the inputs of the linears; None leaves them alone.
      k, v: the cached keys and values; None leaves them alone.
      overrides: exceptions; where several apply, the last one counts.
    """

    weight: QuantSpec | None = None
    act: QuantSpec | None = None
    k: QuantSpec | None = None
    v: QuantSpec | None = None
    overrides: tuple[Override, ...] = ()

    def at(self, site: str, block: int, n_blocks: int) -> "Scheme":
        """The grids at one site of one block, without exceptions."""
        grids = Scheme(self.weight, self.act, self.k, self.v)
        for rule in self.overrides:
            here = {b % n_blocks for b in rule.blocks if -n_blocks <= b < n_blocks}
            if (rule.sites and site not in rule.sites) or (rule.blocks and block not in here):
                continue
            bits = dict(weight=rule.weight_bits, act=rule.act_bits, k=rule.kv_bits, v=rule.kv_bits)
            for name, width in bits.items():
                grid = getattr(grids, name)
                if width is not None and grid is not None:
                    new = None if width == 16 else dataclasses.replace(grid, bits=width)
                    grids = dataclasses.replace(grids, **{name: new})
        return grids
