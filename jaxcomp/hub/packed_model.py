"""A model with packed weights: what its config and its files must agree on, and its template.

template + Packed ─wanted_tensors─▶ what the files must hold, by name
                  ─packed_template─▶ a template with leaves for `QTensor`s, and quantizers at
                                     the sites where inputs and caches are quantized
"""

from collections.abc import Mapping
from typing import Any

import jax

from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.site import CONSUMER_SITES, ActQuantizer, Site
from jaxcomp.core.tree import get_at, replace_many
from jaxcomp.hub.leaves import TensorSource, Wanted, read_leaf
from jaxcomp.hub.packed import DENSE, Packed, PackedGrid, PackedLinear, PackedWeight
from jaxcomp.hub.stock import linear_modules
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import Block, Decoder
from jaxcomp.models.families.template import stored_shape, stored_tensors

MARKS = ("weight_packed", "weight_scale", "qweight")  # a module with one of them is quantized


def module_shapes(template: Decoder) -> dict[str, tuple[int, int]]:
    """Every linear module of the class → its (out_ch, in_ch); a tied head is there as well."""
    parts, found = (template.replace(blocks=()), *template.blocks), {}
    for part in parts:
        stored = stored_tensors(part)
        for name in linear_modules(part):
            found[name] = stored_shape(stored[f"{name}.weight"])
    return {"lm_head": template.embed.weight.shape} | found


def check_modules(quantized: Mapping[str, bool], source: TensorSource, said_by: str) -> None:
    """Compares what a config makes of every linear module with what the files hold.

    Args:
      quantized: every linear module of the class → whether the config quantizes it.
      said_by: what of the config says so.

    Raises:
      ValueError: they differ, or a packed weight is of no linear module.
    """
    found = {}
    for tensor in source.specs:
        module, _, kind = tensor.rpartition(".")
        if kind in MARKS:
            found.setdefault(module, tensor)
    alike = (
        "Readers that follow the config compute nonsense from this without an error: correct it, "
        f"or {DENSE}"
    )
    for module, tensor in found.items():
        if not quantized.get(module):
            known = "is dense" if module in quantized else "is no linear module of the model"
            raise ValueError(
                f"{source.where}: module {module!r} is stored quantized ({tensor}), and by "
                f"{said_by} it {known}. {alike}"
            )
    for module, wanted in quantized.items():
        if wanted and module not in found:
            raise ValueError(
                f"{source.where}: module {module!r} is stored dense, and by {said_by} it is "
                f"quantized. {alike}"
            )


def wanted_tensors(template: Decoder, packed: Packed, source: TensorSource) -> dict[str, Wanted]:
    """Every tensor that a checkpoint of this model holds.

    Args:
      template: of the dense model.
    """
    wanted = {
        name: Wanted(stored_shape(params))
        for name, params in stored_tensors(template).items()
        if name.removesuffix(".weight") not in packed.linears
    }
    for linear in packed.linears.values():
        wanted |= linear.form.tensors(linear, source)
        if linear.act is not None and not linear.act.dynamic:
            wanted |= _grid_tensors(f"{linear.name}.input", linear.act, (1,))
    if packed.kv_cache is not None:
        for block in template.blocks:
            heads = (block.attn.n_kv_heads, 1, 1)
            shape = (1,) if packed.kv_cache.granularity == "tensor" else heads
            for at in _caches(block).values():
                wanted |= _grid_tensors(at, packed.kv_cache, shape)
    return wanted


def packed_template(template: Decoder, packed: Packed, source: TensorSource) -> Decoder:
    """The template of the quantized model, from that of the dense one.

    The tensors are known to be there. Linears that read one site share its quantizer where their
    grids are equal, static ones to the last bit, for which they are read here; otherwise each has
    one of its own.

    Raises:
      ValueError: what a tensor holds does not fit the model.
    """
    if not packed.linears:
        return template
    for linear in packed.linears.values():
        linear.form.check(linear, source)
    root = _with_weights(template.replace(blocks=()), packed)
    blocks = tuple(
        _with_weights(block, packed).replace(sites=_sites(block, packed, source))
        for block in template.blocks
    )
    return root.replace(blocks=blocks)


def _with_weights(part: Any, packed: Packed) -> Any:
    leaves = {}
    for module, paths in linear_modules(part).items():
        for path in paths if module in packed.linears else ():
            linear, param = packed.linears[module], get_at(part, f"{path}.w")
            leaves[f"{path}.w"] = PackedWeight(linear, param.rows or (0, linear.out_ch))
    return replace_many(part, leaves)


def _sites(block: Block, packed: Packed, source: TensorSource) -> dict[str, Site]:
    module = {path: name for name, paths in linear_modules(block).items() for path in paths}
    sites = {}
    for site, part in anatomy(block).sites.items():
        quantizers = {path: _input(packed.linears.get(module[path])) for path in part.consumers}
        first, *others = quantizers.values()
        if all(_equal(first, other, source) for other in others):
            sites[site] = first
        else:
            sites |= {CONSUMER_SITES[path]: q for path, q in quantizers.items()}
    if packed.kv_cache is not None:
        spec, heads = packed.kv_cache, (block.attn.n_kv_heads, block.attn.head_dim)
        shape = () if spec.granularity == "tensor" else heads
        sites |= {site: _static(at, spec, shape) for site, at in _caches(block).items()}
    return {site: Site(quantizer) for site, quantizer in sites.items() if quantizer is not None}


def _input(linear: PackedLinear | None) -> ActQuantizer | None:
    if linear is None or linear.act is None:
        return None
    if linear.act.dynamic:
        return ActQuantizer(linear.act)
    return _static(f"{linear.name}.input", linear.act, ())


def _static(at: str, spec: QuantSpec, shape: tuple[int, ...]) -> ActQuantizer:
    zero = None if spec.symmetric else PackedGrid(f"{at}_zero_point", shape, "int8")
    return ActQuantizer(spec, PackedGrid(f"{at}_scale", shape, "float32"), zero)


def _equal(a: ActQuantizer | None, b: ActQuantizer | None, source: TensorSource) -> bool:
    if a is None or b is None or a.spec != b.spec:
        return a is b
    read = lambda q: [read_leaf(leaf, source) for leaf in jax.tree.leaves(q)]  # noqa: E731
    return read(a) == read(b)


def _caches(block: Block) -> dict[str, str]:
    """Site of a cache → what its tensors are called, up to the last word."""
    attention = block.attn.q.w.name.rsplit(".", 2)[0]
    return {"k_cache": f"{attention}.k", "v_cache": f"{attention}.v"}


def _grid_tensors(at: str, spec: QuantSpec, shape: tuple[int, ...]) -> dict[str, Wanted]:
    tensors = {f"{at}_scale": Wanted(shape)}
    return tensors if spec.symmetric else tensors | {f"{at}_zero_point": Wanted(shape, ("int8",))}
