"""Weights that a checkpoint holds as codes: what is read of them, and the model they belong to.

    quantization_config ─ct_read, gptq_read, awq_read─▶ Packed: how each module's weight is stored
    template + Packed ─packed_template─▶ a template with leaves for `QTensor`s and for the grids of
                                         activations and caches

The codes are laid anew and never dequantized. What the config says of a module and what the files
hold of it must agree: readers that go by one of them alone compute nonsense without an error.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcomp.core.quantize import QTensor, QuantSpec, n_groups
from jaxcomp.core.site import CONSUMER_SITES, ActQuantizer, Site
from jaxcomp.core.tree import get_at, replace_many
from jaxcomp.hub.bits import stream_bytes
from jaxcomp.hub.leaves import TensorSource, Wanted, leaf_struct, read_leaf, whole
from jaxcomp.hub.stock import linear_modules
from jaxcomp.models.anatomy import anatomy
from jaxcomp.models.decoder import Block, Decoder
from jaxcomp.models.families.template import stored_shape, stored_tensors

MARKS = ("weight_packed", "weight_scale", "qweight")  # a module with one of them is quantized
DENSE = "start from the model before it was quantized, or from one that is dequantized"


class Form(NamedTuple):
    """How a format stores the weight of a linear module.

    Attributes:
      tensors: (linear, source) → every tensor it is made of, and what each must be.
      check: (linear, source): raises ValueError for what shapes do not tell; reads little.
      codes: (linear, source, rows) → `packed` of a QTensor with the output channels `rows`.
      grid: (linear, source) → scale float32 `[groups, out_ch]`, or `[1, 1]` per tensor, and the
        zero point int8 of the same shape, None where symmetric.
    """

    tensors: Callable[["PackedLinear", TensorSource], dict[str, Wanted]]
    check: Callable[["PackedLinear", TensorSource], None]
    codes: Callable[["PackedLinear", TensorSource, tuple[int, int]], np.ndarray]
    grid: Callable[["PackedLinear", TensorSource], tuple[np.ndarray, np.ndarray | None]]


@dataclasses.dataclass(frozen=True)
class PackedLinear:
    """A linear module whose weight is stored as codes.

    Attributes:
      name: of the module; its tensors begin with it and a dot.
      in_ch, out_ch: its channels, of all leaves together where a family fuses several.
      spec: the grid of its weight.
      form: how the file stores it.
      act: the grid of its input, None for none.
    """

    name: str
    in_ch: int
    out_ch: int
    spec: QuantSpec
    form: Form
    act: QuantSpec | None = None

    @property
    def groups(self) -> int:
        """Groups of input channels.

        Raises:
          ValueError: they are not whole.
        """
        try:
            return n_groups(self.in_ch, self.spec)
        except ValueError as error:
            raise ValueError(f"module {self.name!r}: {error}") from None


class Packed(NamedTuple):
    """The packed part of a checkpoint.

    Attributes:
      linears: every quantized module by name.
      kv_cache: the static grid of all keys and values, None for none: "tensor" is one for all,
        "channel" one for each head, which the format spreads over the channels of the head.
      unused: tensors that are there and change nothing.
    """

    linears: dict[str, PackedLinear]
    kv_cache: QuantSpec | None = None
    unused: tuple[str, ...] = ()


NOTHING = Packed({})


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A leaf of a template that becomes a `QTensor`: the output channels `rows` of a module."""

    linear: PackedLinear
    rows: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class PackedGrid:
    """A leaf of a template: a static scale or zero point, `shape` in our tree."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@read_leaf.register
def _(leaf: PackedWeight, source: TensorSource) -> QTensor:
    linear, (start, stop) = leaf.linear, leaf.rows
    scale, zero = linear.form.grid(linear, source)
    _check_scale(scale, linear.name, source)
    if zero is not None:
        _check_zero(zero, linear, source)
    if linear.spec.granularity != "tensor":
        part = lambda a: None if a is None else np.ascontiguousarray(a[:, start:stop])  # noqa: E731
        scale, zero = part(scale), part(zero)
    packed = linear.form.codes(linear, source, leaf.rows)
    return QTensor(packed, scale, zero, linear.spec.bits, linear.in_ch)


@leaf_struct.register
def _(leaf: PackedWeight, source: TensorSource) -> QTensor:
    linear, out_ch = leaf.linear, leaf.rows[1] - leaf.rows[0]
    spec, struct = linear.spec, jax.ShapeDtypeStruct
    grid = (linear.groups, 1 if spec.granularity == "tensor" else out_ch)
    return QTensor(
        struct((stream_bytes(linear.in_ch, spec.bits), out_ch), np.uint8),
        struct(grid, np.float32),
        None if spec.symmetric else struct(grid, np.int8),
        spec.bits,
        linear.in_ch,
    )


@read_leaf.register
def _(leaf: PackedGrid, source: TensorSource) -> np.ndarray:
    value = whole(source, leaf.name).astype(leaf.dtype)
    if leaf.dtype == "float32":
        _check_scale(value, leaf.name, source)
    own = value.reshape(-1, 1) if leaf.shape else value[0]
    return np.array(np.broadcast_to(own, leaf.shape))


@leaf_struct.register
def _(leaf: PackedGrid, source: TensorSource) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype))


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


def _check_scale(scale: np.ndarray, what: str, source: TensorSource) -> None:
    bad = int(np.count_nonzero(~np.isfinite(scale) | (scale == 0)))
    if bad:
        raise ValueError(
            f"{source.where}: {what}: {bad} of {scale.size} scales are 0, NaN or infinite, so the "
            f"checkpoint is damaged or overflowed in its dtype; download it again, or {DENSE}"
        )


def _check_zero(zero: np.ndarray, linear: PackedLinear, source: TensorSource) -> None:
    spec = linear.spec
    if zero.min() < spec.qmin or zero.max() > spec.qmax:
        raise ValueError(
            f"{source.where}: {linear.name}: zero points reach from {zero.min()} to {zero.max()}, "
            f"and codes of {spec.bits} bits from {spec.qmin} to {spec.qmax}; the checkpoint is "
            f"damaged: download it again, or {DENSE}"
        )
