"""Format `ascend`: the V1 layout that vllm-ascend and MindIE run on Ascend NPUs.

    quant_model_description.json       every tensor → its type; what the model is as a whole
    quant_model_weights.safetensors    or parts of 4 GB with an index
    config.json, tokenizer, …          as in a Hugging Face directory

A linear that is not FLOAT has `weight` int8 `[out, in]`, `weight_scale` and `weight_offset` float32
`[out, 1]` (the offset 0: weights are symmetric); of 4 bits also `left_trans` `[L, L]`,
`right_trans` `[R, R]` and `clip_ratio` float32 `[1]`. What the types mean is `ascend_types`.

The files were checked against the description of the layout, by a reference that computes from
them what it says, and on no NPU.

Source: msModelSlim's description of AscendV1, the loaders of vllm-ascend, torch_npu's
`npu_kronecker_quant`. `clip_ratio` is the ratio itself, as the kernel wants it, not its logit.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxcomp.core.quantize import QTensor
from jaxcomp.core.site import ActQuantizer, Site
from jaxcomp.core.tensorfile import TensorSpec
from jaxcomp.core.tree import get_at
from jaxcomp.hub.ascend_factors import find_factors, runtime_pair
from jaxcomp.hub.ascend_types import FLOAT, TYPES, W4A4, W8A8, W8A16, site_types
from jaxcomp.hub.dense import (
    find_dtype,
    parts,
    plain_entry,
    structures,
    with_dtype,
    with_plain_embedding,
)
from jaxcomp.hub.shards import Entry, Layout, write_shards
from jaxcomp.hub.stock import gather, linear_modules, per_channel, stock
from jaxcomp.hub.write import ExportSource, copy_companions, write_json
from jaxcomp.models.anatomy import anatomy, channels
from jaxcomp.models.decoder import Block, Decoder, block_struct
from jaxcomp.models.families.template import stored_tensors
from jaxcomp.models.fold import take_back

LOAD = 'vllm serve "{out}" --quantization ascend'
STEM = "quant_model_weights"
PART_BYTES = 4 * 10**9
DESCRIPTION = "quant_model_description.json"
VERSION = "1.0.0"
FLOAT32 = np.dtype(np.float32)
ClipRatio = Literal["exact", "mean"]


def check(model: Decoder, hf_config: dict[str, Any]) -> None:
    """Refuses what the runtime would not compute; reads no block.

    Raises:
      ValueError: block, site, what is in the way, and settings that avoid it.
    """
    stock(model, hf_config)
    if model.lm_head is not None and isinstance(model.lm_head.w, QTensor):
        raise ValueError("lm_head is quantized, and the layout keeps it in floats")
    found = set()
    for i, block in enumerate(map(block_struct, model.blocks)):
        try:
            found |= set(site_types(block).values())
        except ValueError as error:
            raise ValueError(f"block {i}, {error}") from None
    if found == {FLOAT}:
        raise ValueError("no weight is quantized; the runtime loads the hf directory as it is")


def write(
    source: ExportSource,
    out: Path,
    *,
    dtype: str | None = None,
    shard_size: int = PART_BYTES,
    clip_ratio: ClipRatio = "exact",
) -> list[str]:
    """Fills the directory `out`.

    Args:
      dtype: of dense tensors and factors; None leaves dense tensors as they are and gives factors
        the dtype of the embedding.
      shard_size: bytes of tensors in a part.
      clip_ratio: what to do where the least and the greatest value of a 4-bit range are clipped by
        different factors, while the layout has one: "exact" refuses, "mean" takes their mean.

    Raises:
      ValueError: see `check`; an unknown option; different factors and `clip_ratio="exact"`.
    """
    if clip_ratio not in ("exact", "mean"):
        raise ValueError(f"clip_ratio={clip_ratio!r} is unknown; use exact or mean")
    check(source.model, source.hf_config)
    source, notes = with_plain_embedding(source)
    target, found = find_dtype(dtype), stock(source.model, source.hf_config)
    kept = np.dtype(source.model.embed.weight.dtype) if target is None else target
    gaps: dict[str, float] = {}
    layouts, types = [], {"lm_head.weight": FLOAT}  # asked for by name also where it is tied
    for part, template in structures(source.model, found):
        layout, named = _layout(part, template, target, kept, clip_ratio, gaps)
        layouts.append(layout)
        types |= named
    write_shards(out, layouts, parts(source), shard_size, STEM)
    head = {
        "model_quant_type": max(set(types.values()), key=TYPES.index),
        "version": VERSION,
        "group_size": 0,
    }
    write_json(out / DESCRIPTION, head | dict(sorted(types.items())))
    write_json(out / "config.json", with_dtype(found.config, kept))
    copy_companions(source, out)
    return notes + _notes(source.model, gaps)


def _layout(
    part: Any,
    template: Any,
    target: np.dtype | None,
    kept: np.dtype,
    clip_ratio: ClipRatio,
    gaps: dict[str, float],
) -> tuple[dict[str, Entry], dict[str, str]]:
    """What is written of one part of the model, and the type of each tensor.

    Args:
      gaps: filled while the parts come by: name of a clip ratio → how far it is from the factors.
    """
    modules = linear_modules(template)
    by_site = site_types(part) if isinstance(part, Block) else {}
    layout: dict[str, Entry] = {}
    types: dict[str, str] = {}
    for name, params in stored_tensors(template).items():
        module, paths = name.removesuffix(".weight"), tuple(params)
        site = anatomy(part).linears[modules[module][0]] if by_site and module in modules else ""
        kind = by_site.get(site, FLOAT)
        if kind == FLOAT:
            here = {name: plain_entry(part, params, target, _plain)}
        else:
            here = _weight_layout(module, part, paths)
            if kind == W4A4:
                here |= _input_layout(module, channels(part, site), site, kept, clip_ratio, gaps)
        layout |= here
        types |= dict.fromkeys(here, kind)
    return layout, types


def _plain(part: Any, path: str) -> Any:
    """A dense leaf; a weight with the transforms before it multiplied in."""
    leaf = get_at(part, path)
    behind = isinstance(part, Block) and path.removesuffix(".w") in anatomy(part).linears
    if not behind or not path.endswith(".w"):
        return leaf
    sites = part.sites.get(anatomy(part).linears[path.removesuffix(".w")], Site())
    return take_back(part, path.removesuffix(".w"), leaf) if sites.transforms else leaf


def _weight_layout(module: str, part: Any, paths: tuple[str, ...]) -> Layout:
    in_ch, out_ch = gather(part, paths).shape

    def codes(part: Any) -> np.ndarray:
        return np.asarray(gather(part, paths).codes).T

    def scale(part: Any) -> np.ndarray:
        return np.asarray(per_channel(gather(part, paths)).scale, FLOAT32).T

    def offset(part: Any) -> np.ndarray:
        return np.zeros((out_ch, 1), FLOAT32)

    column = TensorSpec((out_ch, 1), FLOAT32)
    return {
        f"{module}.weight": Entry(TensorSpec((out_ch, in_ch), np.dtype(np.int8)), codes),
        f"{module}.weight_scale": Entry(column, scale),
        f"{module}.weight_offset": Entry(column, offset),
    }


def _input_layout(
    module: str, n: int, site: str, kept: np.dtype, how: ClipRatio, gaps: dict[str, float]
) -> Layout:
    """Factors and clip ratio before a linear of 4 bits."""
    left, right = runtime_pair(n)

    def factors(block: Block) -> Any:
        found = find_factors(block.sites[site].transforms, n)
        if found is None:
            raise ValueError(
                f"{module}: the transform at {site} is no left ⊗ right of the orders {left} and "
                f"{right} to float32; it is nearly singular"
            )
        return found

    def ratio(block: Block) -> np.ndarray:
        name = f"{module}.clip_ratio"
        value, gaps[name] = one_ratio(block.sites[site].quantizer, how, f"{module}, {site}")
        return np.array([value], FLOAT32)

    as_kept = lambda m: np.asarray(m).astype(kept, copy=False)  # noqa: E731
    return {
        f"{module}.left_trans": Entry(
            TensorSpec((left, left), kept), lambda block: as_kept(factors(block).left)
        ),
        f"{module}.right_trans": Entry(
            TensorSpec((right, right), kept), lambda block: as_kept(factors(block).right)
        ),
        f"{module}.clip_ratio": Entry(TensorSpec((1,), FLOAT32), ratio),
    }


def one_ratio(quantizer: ActQuantizer, how: ClipRatio, where: str) -> tuple[float, float]:
    """The factor of both ends of a range, and how far it is from the two that were fitted.

    Raises:
      ValueError: they differ and `how` is "exact".
    """
    if quantizer.clip is None:
        return 1.0, 0.0
    low, high = (float(x) for x in np.asarray(quantizer.clip))
    if np.float32(low) != np.float32(high) and how == "exact":
        raise ValueError(
            f"{where}: the least value of a range is clipped by {low:.4f} and the greatest by "
            f"{high:.4f}, and the runtime has one factor for both; fit without factors "
            "(FlatQuant(learn_clip=False), with GPTQ(clip='output') for those of weights), or "
            "take their mean with clip_ratio='mean' and measure what that costs"
        )
    mean = (low + high) / 2
    return mean, abs(high - low) / 2


def _notes(model: Decoder, gaps: dict[str, float]) -> list[str]:
    linears = list(itertools.chain.from_iterable(_linears(block) for block in model.blocks))
    count = Counter(kind for kind, _ in linears)
    told = ", ".join(f"{n} {kind}" for kind, n in count.items())
    notes = [f"Linears by type: {told}. The files were checked against the layout, on no NPU."]
    if narrow := sum(bits < 8 for kind, bits in linears if kind in (W8A16, W8A8)):
        notes.append(
            f"{narrow} weights of fewer than 8 bits are stored in 8, as no type for their inputs "
            "is narrower; what is computed is the same."
        )
    if (worst := max(gaps.values(), default=0.0)) > 0:
        notes.append(
            f"Clip factors are the mean of two that are up to {worst:.4f} away from it: the "
            "runtime's activations differ from this library's; measure the quality there."
        )
    return notes


def _linears(block: Any) -> Iterator[tuple[str, int]]:
    """Type and bits of every linear of a block, 0 for a dense one."""
    block = block_struct(block)
    kinds = site_types(block)
    for path, site in anatomy(block).linears.items():
        w = get_at(block, path).w
        yield kinds[site], w.bits if isinstance(w, QTensor) else 0
