"""Tiles by operation and chip: tables and rules, so that kernels hold no such choices.

`TILES[op][chip]` is a function of a call's sizes that gives what the operation's kernel on that
chip calls a tile. A chip without an entry is one that nobody has tuned the kernel for, and the
kernel does not take it. Tiles of TPUs were ranked by the compilers' static schedules
(`benchmarks/static`), not by time on a device.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from pallas_kernels.chips import Chip

LANES = 128  # channels of a TPU's vector register


def tile_for(op: str, chip: Chip, **sizes: Any) -> Any:
    """The tile of a call.

    Raises:
      NotImplementedError: there is no rule for the chip.
    """
    rules = TILES.get(op, {})
    if chip.name not in rules:
        raise NotImplementedError(f"{op} has tiles for {', '.join(rules)} and not for {chip.name}")
    return rules[chip.name](**sizes)


def divisors(size: int, most: int, unit: int) -> list[int]:
    """Multiples of `unit` up to `most`, at least one, that divide `size`, a multiple of `unit`."""
    return [d for d in range(unit, max(most, unit) + 1, unit) if size % d == 0]


def rows_of(m: int, most: int, unit: int = 16) -> int:
    """Rows of a tile: equal shares of `m` of at most `most`, 8 or a multiple of `unit`."""
    share = -(-m // -(-m // most))
    return 8 if share <= 8 else -(-share // unit) * unit


class MatmulTile(NamedTuple):
    """Of a matrix product on a TPU.

    Attributes:
      m, k, n: rows, input and output channels of a tile.
      scale: where a group's scale goes: "post" on the sum of its products, "pre" on its weights.
      span: input channels of one dot with "post"; several groups share it where it is wider.
    """

    m: int
    k: int
    n: int
    scale: str = "post"
    span: int = 128


@dataclasses.dataclass(frozen=True)
class MatmulRule:
    """Tiles of a matrix product by the numbers of tokens that decode and prefill have.

    Attributes:
      few: rows up to which reading the weight is the bound.
      few_area: input times output channels of a tile with few rows; a step takes about 200 cycles
        whatever the area, and the first copy hides behind nothing.
      many_area: the same with more rows.
      many_cols: most output channels of a tile with more rows.
      rows: most of a tile.
      pre: rows beyond which weights are scaled instead of sums.
      unit: rows of a register of activations, of which a tile with more than 8 has a multiple.
    """

    few: int
    few_area: int
    many_area: int
    many_cols: int
    rows: int
    pre: int
    unit: int = 16

    def __call__(self, m: int, k: int, n: int, group: int, bits: int) -> MatmulTile:
        """The tile for `m` rows and a padded weight of `k` × `n`."""
        few = m <= self.few
        area, cols = (self.few_area, 1024) if few else (self.many_area, self.many_cols)
        unit = LANES if group >= k else math.lcm(LANES, group)  # whole groups

        def order(tile: tuple[int, int]) -> tuple[int, int, int]:
            """Within the area: large where rows are few; else wide, to read `x` less often."""
            size = math.prod(tile)
            fits = min(area - size, 0)
            return (fits, size, tile[1]) if few else (fits, tile[1], size)

        bk, bn = max(
            ((bk, bn) for bn in divisors(n, cols, LANES) for bk in divisors(k, area // bn, unit)),
            key=order,
        )
        bm = rows_of(m, self.rows, self.unit)
        sharing = LANES // group if group < LANES else 1  # times that "post" repeats the rows
        return MatmulTile(bm, bk, bn, "pre" if bm * sharing > self.pre else "post")


@dataclasses.dataclass(frozen=True)
class GroupedRule:
    """Tiles of a product by experts: those of one product of an expert's share of the rows.

    An expert's rows begin and end anywhere in a tile, and a tile is multiplied once for each expert
    in it, so that twice the mean share makes three visits of two experts.
    """

    rule: MatmulRule

    def __call__(self, m: int, experts: int, **sizes: int) -> MatmulTile:
        """The tile for `m` rows of all experts together."""
        return self.rule(m=min(m, 2 * -(-m // experts)), **sizes)


class KronTile(NamedTuple):
    """Of a Kronecker product on a TPU.

    Attributes:
      rows: tokens of a tile, a multiple of 32.
      c: tokens of a left product, 8 or 4; see `kron_matmul.tpu`.
      most: rows of a left product, its order times c, up to which the matrix unit is worth it.
    """

    rows: int
    c: int
    most: int


@dataclasses.dataclass(frozen=True)
class KronRule:
    """Tiles of a Kronecker product.

    Attributes:
      area: tokens times channels of a tile.
      unit: order of the matrix unit: left products of 8 tokens are free up to it.
    """

    area: int
    unit: int

    def __call__(self, n1: int, channels: int, tokens: int) -> KronTile:
        """The tile for `tokens` rows and a left factor of order `n1`."""
        rows = max(self.area // channels // 32 * 32, 32)
        return KronTile(min(rows, -(-tokens // 32) * 32), 8 if 8 * n1 <= self.unit else 4, 1024)


def attention_rule(slots: int, bytes_of_slot: int) -> int:
    """Slots of a tile: a megabyte of keys and one of values, for a step costs what 0.2 MB cost."""
    most = min(max((1 << 20) // bytes_of_slot // 128 * 128, 128), 2048)
    return min(most, -(-slots // 128) * 128)


TILES: dict[str, dict[str, Callable[..., Any]]] = {
    "kron_matmul": {"v5e": KronRule(1 << 19, 128), "v6e": KronRule(1 << 19, 256)},
    "quant_decode_attention": {"v5e": attention_rule, "v6e": attention_rule},
    "quant_matmul": {
        "v5e": MatmulRule(64, 2 << 20, 1 << 19, 512, 512, 512),
        "v6e": MatmulRule(64, 2 << 20, 1 << 20, 1024, 512, 64),
    },
    "grouped_quant_matmul": {
        "v5e": GroupedRule(MatmulRule(64, 1 << 20, 1 << 19, 512, 256, 256)),
        "v6e": GroupedRule(MatmulRule(64, 1 << 20, 1 << 19, 512, 256, 64)),
    },
    "quant_matmul_int": {
        "v5e": MatmulRule(64, 2 << 20, 1 << 19, 512, 512, 512, 32),
        "v6e": MatmulRule(64, 2 << 20, 1 << 20, 1024, 512, 512, 32),
    },
}
