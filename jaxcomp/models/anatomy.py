"""What a block is made of, written once: who makes each site's activation and who reads it.

A method asks `anatomy(block)` and refuses by it; no method matches names. Paths are relative to
the block (`attn.q` is `block.attn.q`), and the tables are dispatched on node types.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

from jaxcomp.core.quantize import QuantSpec, n_groups
from jaxcomp.core.tree import get_at
from jaxcomp.models.attention import GQA
from jaxcomp.models.decoder import Block, Decoder, block_struct
from jaxcomp.models.ffn import DenseFFN


class SitePart(NamedTuple):
    """One site's neighbourhood.

    Attributes:
      consumers: paths of the linears that read the site, in the order a method should solve them.
      producer: path of the node whose output channels are the site's channels and which can
        absorb a scale per channel (a norm's weight, a linear's columns); None if there is none.
      repeats: how often the producer's channels are repeated at the site (heads sharing a value
        head); a scale folded into the producer must be constant over the repeats.
    """

    consumers: tuple[str, ...]
    producer: str | None
    repeats: int = 1


class Anatomy(NamedTuple):
    """A block's sites with linears behind them, and its ends on the residual stream.

    Attributes:
      sites: in execution order; the consumers of all sites are all the linears of the block.
      readers: linears whose `in_ch` is the residual stream (through a norm).
      writers: linears whose `out_ch` is added to the residual stream.
      rotatable: an orthogonal change of the residual basis can be folded exactly; False where a
        norm sits between a writer and the residual stream.
    """

    sites: dict[str, SitePart]
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    rotatable: bool

    def __getitem__(self, site):
        return self.sites[site] if isinstance(site, str) else tuple.__getitem__(self, site)

    @property
    def linears(self) -> dict[str, str]:
        """Every linear of the block → the site it reads."""
        return {path: site for site, part in self.sites.items() for path in part.consumers}


def anatomy(block: Block) -> Anatomy:
    """The anatomy of a block, with arrays or with structs for leaves."""
    sites = {}
    sites |= attention_sites(block.attn, "attn_norm" if block.attn_norm is not None else None)
    sites |= ffn_sites(block.ffn, "ffn_norm" if block.ffn_norm is not None else None)
    return Anatomy(
        sites,
        readers=sites["attn_in"].consumers + sites["ffn_in"].consumers,
        writers=sites["attn_out"].consumers + sites["ffn_mid"].consumers,
        rotatable=block.attn_post_norm is None and block.ffn_post_norm is None,
    )


def channels(block: Block, site: str) -> int:
    """How many channels the activation at a site has, as the linears behind it read them."""
    return get_at(block, anatomy(block)[site].consumers[0]).w.shape[-2]


def check_grid(model: Decoder, spec: QuantSpec, named: Iterable[str] = ()) -> None:
    """Refuses a weight grid that some linear of the blocks cannot take; reads no block.

    Args:
      named: paths of linears that settings speak of, which must exist.

    Raises:
      ValueError: names the block, the linear and what is wrong.
    """
    known = {path: None for b in map(block_struct, model.blocks) for path in anatomy(b).linears}
    if absent := [path for path in named if path not in known]:
        raise ValueError(f"no block has a linear {absent[0]!r}; there is: {', '.join(known)}")
    for i, block in enumerate(map(block_struct, model.blocks)):
        for path in anatomy(block).linears:
            try:
                n_groups(get_at(block, path).w.shape[-2], spec)
            except ValueError as error:
                raise ValueError(f"block {i}, {path}: {error}") from None


@functools.singledispatch
def attention_sites(attn: object, norm: str | None) -> dict[str, SitePart]:
    """Sites of an attention node whose input norm is at path `norm`."""
    raise TypeError(f"no anatomy for attention node {type(attn).__name__}; register one here")


@attention_sites.register
def _(attn: GQA, norm: str | None) -> dict[str, SitePart]:
    return {
        "attn_in": SitePart(("attn.q", "attn.k", "attn.v"), norm),
        "attn_out": SitePart(("attn.o",), "attn.v", repeats=attn.n_heads // attn.n_kv_heads),
    }


@functools.singledispatch
def ffn_sites(ffn: object, norm: str | None) -> dict[str, SitePart]:
    """Sites of a feed-forward node whose input norm is at path `norm`."""
    raise TypeError(f"no anatomy for feed-forward node {type(ffn).__name__}; register one here")


@ffn_sites.register
def _(ffn: DenseFFN, norm: str | None) -> dict[str, SitePart]:
    return {
        "ffn_in": SitePart(("ffn.gate", "ffn.up"), norm),
        "ffn_mid": SitePart(("ffn.down",), "ffn.up"),
    }


@functools.singledispatch
def score_linears(attn: object) -> tuple[str, ...]:
    """Linears whose outputs meet in the attention scores: errors of one multiply the other's."""
    raise TypeError(f"no anatomy for attention node {type(attn).__name__}; register one here")


@score_linears.register
def _(attn: GQA) -> tuple[str, ...]:
    return ("attn.q", "attn.k")
