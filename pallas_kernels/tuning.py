"""Tiles by operation and chip: tables and rules, so that kernels hold no such choices.

`TILES[op][chip]` is a function of a call's sizes that gives what the operation's kernel on that
chip calls a tile. A chip without an entry is one that nobody has tuned the kernel for, and the
kernel does not take it. Tiles of TPUs were ranked by the compilers' static schedules
(`benchmarks/static`), not by time on a device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from pallas_kernels.chips import Chip


def tile_for(op: str, chip: Chip, **sizes: Any) -> Any:
    """The tile of a call.

    Raises:
      NotImplementedError: there is no rule for the chip.
    """
    rules = TILES.get(op, {})
    if chip.name not in rules:
        raise NotImplementedError(f"{op} has tiles for {', '.join(rules)} and not for {chip.name}")
    return rules[chip.name](**sizes)


def divisor(size: int, most: int, unit: int) -> int:
    """The largest multiple of `unit` up to `most` that divides `size`, a multiple of `unit`."""
    return max(d for d in range(unit, max(most, unit) + 1, unit) if size % d == 0)


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


TILES: dict[str, dict[str, Callable[..., Any]]] = {}
