"""A tree as the stock class of its family: the config that describes it, its tensors by name.

Other libraries build a model from `config.json` alone, so a tree has a place there only if the
template of some config is the tree, leaf for leaf and fact for fact, but for what is at the sites.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.core.linear import Linear
from jaxcomp.core.quantize import QTensor
from jaxcomp.core.struct import is_static
from jaxcomp.core.tree import get_at, named_leaves
from jaxcomp.models.decoder import Decoder, block_struct
from jaxcomp.models.families import Param, template_of
from jaxcomp.models.families.template import stored_tensors

PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern")  # of which blocks have a window

Leaf = Any  # an array, a QTensor, or either with `jax.ShapeDtypeStruct` inside


class Stock(NamedTuple):
    """The config that describes a model, and the template of it: `Param` leaves."""

    config: dict[str, Any]
    template: Decoder


def stock(model: Decoder, hf_config: Mapping[str, Any]) -> Stock:
    """The config of `model`, which is `hf_config` but for depth and head, and its template.

    Raises:
      ValueError: no stock class computes this; the message names the first place that differs.
    """
    # What is quantized is said by the tree, and by the writer of a format.
    config = {k: v for k, v in hf_config.items() if k != "quantization_config"}
    structs = [block_struct(block) for block in model.blocks]
    if patched := [i for i, block in enumerate(structs) if block.patch is not None]:
        raise ValueError(
            f"block {patched[0]} maps its input by a patch, for which no other class has a place; "
            "the patches of LinearPatch(kind='scalar') and 'mlp_branch' fold into weights"
        )
    if len(structs) != config.get("num_hidden_layers"):
        config |= _depth(config, structs)
    template = _template(config)
    if (template.lm_head is None) != (model.lm_head is None):
        config["tie_word_embeddings"] = model.lm_head is None
        template = _template(config)
    name = config["architectures"][0]
    for i, (wanted, found) in enumerate(zip(template.blocks, structs, strict=True)):
        for difference in _differences(wanted, found, f"blocks.{i}"):
            raise ValueError(f"{name} computes something else: {difference}")
    # Codes are held transposed.
    table = jax.ShapeDtypeStruct(model.embed.table_shape, jnp.float32)
    model = model.replace(embed=model.embed.replace(weight=table))
    for part in ("embed", "norm", "lm_head"):
        for difference in _differences(getattr(template, part), getattr(model, part), part):
            raise ValueError(f"{name} computes something else: {difference}")
    return Stock(config, template)


def linear_modules(template: Any) -> dict[str, tuple[str, ...]]:
    """Every linear module of a template or a part of it → paths of the linears it is made of."""
    nodes = named_leaves(template, is_leaf=lambda x: isinstance(x, Linear))
    weights = {f"{path}.w" for path, x in nodes.items() if isinstance(x, Linear)}
    return {
        name.removesuffix(".weight"): tuple(path.removesuffix(".w") for path in params)
        for name, params in stored_tensors(template).items()
        if weights.issuperset(params)
    }


def gather(tree: Any, paths: Iterable[str]) -> Leaf:
    """The leaves of one stored tensor as one, in our orientation, joined along `out_ch`.

    Raises:
      ValueError: they are quantized on different grids.
    """
    leaves = [get_at(tree, path) for path in paths]
    if len(leaves) == 1:
        return leaves[0]
    if len(kinds := sorted({_kind(x) for x in leaves})) > 1:
        raise ValueError(
            f"{', '.join(paths)} are stored as one tensor and quantized differently: "
            f"{', '.join(kinds)}"
        )
    no_arrays = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(leaves))
    return jax.eval_shape(_join, leaves) if no_arrays else _join(leaves)


def per_channel(w: QTensor) -> QTensor:
    """The same weight with a scale and zero point for every output channel, were it one for all."""
    wide = lambda grid: jnp.broadcast_to(grid, (*grid.shape[:-1], w.packed.shape[-1]))  # noqa: E731
    return w.replace(
        scale=wide(w.scale), zero_point=None if w.zero_point is None else wide(w.zero_point)
    )


def _join(leaves: list[Leaf]) -> Leaf:
    if isinstance(leaves[0], QTensor):
        leaves = [per_channel(x) for x in leaves]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *leaves)


def _kind(x: Leaf) -> str:
    if not isinstance(x, QTensor):
        return "not at all"
    groups, zero = x.scale.shape[-2], "symmetric" if x.zero_point is None else "asymmetric"
    return f"{x.bits} bits in groups of {x.in_ch // groups}, {zero}"


def _depth(config: dict[str, Any], blocks: list[Any]) -> dict[str, Any]:
    """What a config says of blocks that were dropped: their number and, by block, their windows."""
    fields = {"num_hidden_layers": len(blocks)}
    windows = [getattr(getattr(block, "attn", None), "window", None) for block in blocks]
    if config.get("layer_types") or len(set(windows)) > 1:
        kinds = {True: "sliding_attention", False: "full_attention"}
        fields["layer_types"] = [kinds[window is not None] for window in windows]
        fields |= dict.fromkeys(PATTERNS)
    return fields


def _template(config: dict[str, Any]) -> Decoder:
    """What was vouched for when the model was read is vouched for here."""
    inner = [name for value in config.values() if isinstance(value, dict) for name in value]
    return template_of(config, allow=(*config, *inner))


def _differences(wanted: Any, found: Any, path: str) -> Iterator[str]:
    """Where a tree is not its template, in tree order; sites are not looked at."""
    if isinstance(wanted, Param):
        shape = getattr(found, "shape", None)
        if shape is None:
            yield f"{path} is {_words(found)} and should be a tensor of shape {wanted.shape}"
        elif tuple(shape) != wanted.shape:
            yield f"{path} has shape {tuple(shape)} instead of {wanted.shape}"
    elif type(wanted) is not type(found):
        yield f"{path} is {_words(found)} instead of {_words(wanted)}"
    elif dataclasses.is_dataclass(wanted):
        for field in dataclasses.fields(wanted):
            a, b = getattr(wanted, field.name), getattr(found, field.name)
            if field.name == "sites":
                continue
            if not is_static(field):
                yield from _differences(a, b, f"{path}.{field.name}")
            elif a != b:
                yield f"{path}.{field.name} is {b!r} instead of {a!r}"


def _words(x: Any) -> str:
    if x is None:
        return "absent"
    return "a tensor" if hasattr(x, "dtype") else f"a {type(x).__name__}"
