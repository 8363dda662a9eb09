"""What compressed-tensors has to know of a model: the grids and rotations of its modules.

Everything the format has no word for is refused here, from structure alone. Engines hold q, k, v
and gate, up as one matrix each, so the linears that read one site must be on one grid.
"""

from typing import Any, NamedTuple

from jaxcomp.core.quantize import QTensor, QuantSpec
from jaxcomp.core.site import CONSUMER_SITES, ActQuantizer, Site
from jaxcomp.core.transforms import Hadamard
from jaxcomp.hub.ct_config import ModuleScheme
from jaxcomp.hub.stock import gather, linear_modules
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import Block, Decoder, block_struct

CACHES = ("k_cache", "v_cache")


class Plan(NamedTuple):
    """The modules of a model by their names in a checkpoint.

    Attributes:
      schemes: every linear module of the class → its grids, None for a dense one.
      kv_cache: the static grid of all keys and values, or None.
      rotations: module → what its input is multiplied by before everything else.
    """

    schemes: dict[str, ModuleScheme | None]
    kv_cache: QuantSpec | None
    rotations: dict[str, Hadamard]


def plan(model: Decoder, template: Decoder) -> Plan:
    """The plan of `model`, whose stock class is described by `template`; reads no block.

    Raises:
      ValueError: the format has no word for something; the message names block and place.
    """
    schemes: dict[str, ModuleScheme | None] = {"lm_head": None}  # a module of its own, tied or not
    if template.lm_head is not None:
        schemes["lm_head"] = _scheme(model.lm_head.w, None)
    caches, rotations = set(), {}
    for i, (block, shape) in enumerate(
        zip(map(block_struct, model.blocks), template.blocks, strict=True)
    ):
        try:
            caches.add(_cache_grid(block))
            here = _block_schemes(block, shape)
            for module, paths in linear_modules(shape).items():
                if (rotation := _rotation(block, paths[0])) is not None:
                    rotations[module] = rotation
        except ValueError as error:
            raise ValueError(f"block {i}: {error}") from None
        schemes |= here
    if len(caches) > 1:
        raise ValueError(
            "the caches of the blocks are on different grids, and the format has one for all: "
            + ", ".join(sorted(str(grid or "none") for grid in caches))
        )
    if not any(schemes.values()):
        raise ValueError("no weight is quantized, so there is nothing to pack")
    return Plan(schemes, caches.pop(), rotations)


def input_quantizer(block: Block, path: str) -> ActQuantizer | None:
    """What quantizes the input of a linear.

    Raises:
      ValueError: a grid that the format does not have.
    """
    shared, own = anatomy(block).linears[path], CONSUMER_SITES.get(path, "")
    found = {
        name: site.quantizer
        for name in (shared, own)
        if (site := block.sites.get(name)) is not None and site.quantizer is not None
    }
    if not found:
        return None
    (name, quantizer), *more = found.items()
    spec = quantizer.spec
    if more:
        raise ValueError(f"{path} reads what {shared} and then {own} quantize, one after the other")
    if quantizer.clip is not None:
        raise ValueError(
            f"the range at {name} is clipped by factors, and the format measures whole ranges"
        )
    if (spec.granularity, spec.dynamic) not in (("token", True), ("tensor", False)):
        raise ValueError(
            f"{name} is on the grid {spec}, {'dynamic' if spec.dynamic else 'static'}; inputs are "
            "quantized per token at run time, or per tensor on a static grid"
        )
    return quantizer


def _block_schemes(block: Block, template: Block) -> dict[str, ModuleScheme | None]:
    found, by_path = {}, {}
    for module, paths in linear_modules(template).items():
        inputs = {None if (q := input_quantizer(block, path)) is None else q.spec for path in paths}
        if len(inputs) > 1:
            raise ValueError(f"{', '.join(paths)} are one module and read different grids")
        weight = gather(block, [f"{path}.w" for path in paths])
        found[module] = _scheme(weight, inputs.pop(), paths[0])
        by_path |= dict.fromkeys(paths, found[module])
    for site, part in anatomy(block).sites.items():
        kinds = {by_path[path] for path in part.consumers}
        if len(kinds) > 1:
            told = ", ".join(f"{p} {by_path[p] or 'dense'}" for p in part.consumers)
            raise ValueError(
                f"the linears behind {site} differ ({told}), and engines hold them as one matrix; "
                "give them one grid"
            )
    return found


def _scheme(weight: Any, act: QuantSpec | None, path: str = "lm_head") -> ModuleScheme | None:
    if not isinstance(weight, QTensor):
        if act is not None:
            raise ValueError(f"{path} reads a quantized activation and its weight is dense")
        return None
    groups = weight.scale.shape[-2]
    group_size = None if groups == 1 else weight.in_ch // groups
    return ModuleScheme(weight.bits, group_size, weight.zero_point is None, act)


def _rotation(block: Block, path: str) -> Hadamard | None:
    """The one transform at the site that a linear reads."""
    name, own = anatomy(block).linears[path], CONSUMER_SITES.get(path, "")
    if block.sites.get(own, Site()).transforms:
        raise ValueError(f"{own} has a transform of its own, and q, k and v must read the same")
    transforms = block.sites.get(name, Site()).transforms
    if not transforms:
        return None
    first = transforms[0]
    if len(transforms) > 1 or not isinstance(first, Hadamard) or first.transposed:
        kinds = " and ".join(type(t).__name__ for t in transforms)
        raise ValueError(
            f"{name} is multiplied by {kinds} at run time, and the format has one Hadamard matrix "
            "there at most"
        )
    if transforms[0].inner > 1:
        raise ValueError(
            f"the rotation at {name} mixes heads (inner={transforms[0].inner}), and the format has "
            "rotations of neighbouring channels; leave it out with head_mix='none'"
        )
    return transforms[0]


def _cache_grid(block: Block) -> QuantSpec | None:
    """The grid of keys and values, which must be one."""
    sites = {name: block.sites.get(name, Site()) for name in (*CACHES, "query")}
    if sites["query"].quantizer is not None:
        raise ValueError("query is quantized, and the format quantizes keys and values alone")
    if sites["v_cache"].transforms:
        raise ValueError("v_cache has a transform, and no engine has a place for it")
    grids = {sites[n].quantizer.spec if sites[n].quantizer else None for n in CACHES}
    if grids == {None}:
        return None
    told = ", ".join(
        f"{n} {sites[n].quantizer.spec if sites[n].quantizer else '-'}" for n in CACHES
    )
    if len(grids) > 1:
        raise ValueError(f"keys and values are on different grids ({told}); the format has one")
    spec = grids.pop()
    if spec.dynamic or spec.granularity != "tensor":
        raise ValueError(
            f"the cache is on the grid {spec}, {'dynamic' if spec.dynamic else 'static'}; the "
            "format has static grids with one scale for all keys and one for all values of a block"
        )
    if sites["k_cache"].transforms:
        raise ValueError("keys are transformed before they are quantized, which no engine does")
    return spec
