"""Which grid goes where: one grid for all places of a kind, and exceptions by site and by block."""

import dataclasses
import typing

from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.site import SITES
from jaxcomp.core.struct import static_value

CACHES = ("k_cache", "v_cache")

T = typing.TypeVar("T")


@static_value
class Override:
    """Other widths at some sites of some blocks.

    Attributes:
      sites: where; () for all. A weight is at the site that it reads.
      blocks: in which blocks; () for all, negative ones count from the end.
      linears: for which of the linears at those sites; () for all. Such an exception changes the
        width of weights alone.
      weight_bits, act_bits, kv_bits: 2..8, 16 for no quantization, None for no change.
    """

    sites: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    linears: tuple[str, ...] = ()
    weight_bits: int | None = None
    act_bits: int | None = None
    kv_bits: int | None = None

    def __post_init__(self):
        if unknown := [s for s in self.sites if s not in SITES]:
            raise ValueError(f"there is no site {unknown[0]!r}; there is: {', '.join(SITES)}")
        for name in ("weight_bits", "act_bits", "kv_bits"):
            bits = getattr(self, name)
            if self.linears and name != "weight_bits" and bits is not None:
                raise ValueError(
                    f"an override for {', '.join(self.linears)} has {name}={bits}; linears share "
                    "what they read, so name the site instead"
                )
            if bits is not None and not (bits == 16 or 2 <= bits <= 8):
                raise ValueError(f"{name}={bits} is outside 2..8 and not 16, which means off")

    def holds_in(self, block: int, n_blocks: int) -> bool:
        """Whether block number `block` of `n_blocks` is one of its blocks."""
        return not self.blocks or block in self.blocks or block - n_blocks in self.blocks


def in_block(overrides: tuple[Override, ...], block: int, n_blocks: int) -> tuple[Override, ...]:
    """The exceptions that hold in one block, as exceptions for any block."""
    return tuple(
        dataclasses.replace(rule, blocks=()) for rule in overrides if rule.holds_in(block, n_blocks)
    )


def settings_in_block(settings: T, block: int, n_blocks: int) -> T:
    """A method's settings as they hold in one block: of its exceptions, those for that block."""
    overrides = getattr(settings, "overrides", ())
    if not overrides:
        return settings
    return dataclasses.replace(settings, overrides=in_block(overrides, block, n_blocks))


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

    def check(self, n_blocks: int) -> None:
        """Refuses an exception that can have no effect in a model of `n_blocks` blocks.

        Raises:
          ValueError: a block that is not there, or a width for what has no grid or is elsewhere.
        """
        for rule in self.overrides:
            for name, (grids, sites) in self._reach().items():
                bits = getattr(rule, name)
                if bits not in (None, 16) and not any(grids):
                    raise ValueError(
                        f"an override has {name}={bits}, and there is no grid of that kind whose "
                        "width it could change; give the grid, or leave the override out"
                    )
                if bits is not None and rule.sites and not set(rule.sites) & set(sites):
                    raise ValueError(
                        f"an override has {name}={bits} at {', '.join(rule.sites)}, where it "
                        f"changes nothing; it acts at {', '.join(sites)}"
                    )
            if absent := [b for b in rule.blocks if not -n_blocks <= b < n_blocks]:
                raise ValueError(
                    f"an override is for block {absent[0]}, and the model has {n_blocks} blocks: "
                    f"0..{n_blocks - 1}, or -{n_blocks}..-1 from the end"
                )

    def _reach(self) -> dict[str, tuple[tuple[QuantSpec | None, ...], tuple[str, ...]]]:
        """Setting of an exception → the grids whose width it changes, and the sites they are at."""
        linears = tuple(site for site in SITES if site not in (*CACHES, "query"))
        return {
            "weight_bits": ((self.weight,), linears),
            "act_bits": ((self.act,), linears),
            "kv_bits": ((self.k, self.v), CACHES),
        }

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears that exceptions name."""
        return tuple(path for rule in self.overrides for path in rule.linears)

    def at(self, site: str, block: int, n_blocks: int, linear: str | None = None) -> "Scheme":
        """The grids at one site of one block, without exceptions.

        Args:
          linear: the one that is asked about; without it exceptions for some linears do not count.
        """
        widths: dict[str, int] = {}
        for rule in in_block(self.overrides, block, n_blocks):
            if rule.sites and site not in rule.sites:
                continue
            if rule.linears and linear not in rule.linears:
                continue
            bits = dict(weight=rule.weight_bits, act=rule.act_bits, k=rule.kv_bits, v=rule.kv_bits)
            widths |= {name: width for name, width in bits.items() if width is not None}
        grids = {name: getattr(self, name) for name in ("weight", "act", "k", "v")}
        for name, width in widths.items():
            if grids[name] is not None:
                off = width == 16
                grids[name] = None if off else dataclasses.replace(grids[name], bits=width)
        return Scheme(**grids)
