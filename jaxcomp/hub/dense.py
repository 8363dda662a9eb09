"""Format `hf`: a dense Hugging Face directory that the stock class of the family loads.

Quantized weights are dequantized. Where nothing quantizes activations, online transforms are
multiplied back into the weights behind them, x T · T⁻¹W = x · W, and what is left is a plain model.
What was read from such a directory and not changed comes out bit for bit.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxcomp.core.quantize import QTensor, dequantize
from jaxcomp.core.site import Site
from jaxcomp.core.tensorfile import TensorSpec
from jaxcomp.core.tree import get_at
from jaxcomp.hub.shards import SHARD_BYTES, Entry, write_shards
from jaxcomp.hub.stock import Stock, stock
from jaxcomp.hub.write import ExportSource, copy_companions, write_json
from jaxcomp.models.decoder import Block, Decoder, block_struct
from jaxcomp.models.families.template import Param, stored_shape, stored_tensors
from jaxcomp.models.fold import keeps_scores, take_back
from jaxcomp.models.layers import table_of

LOAD = 'transformers.AutoModelForCausalLM.from_pretrained("{out}")'
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def check(model: Decoder, hf_config: dict[str, Any]) -> None:
    """Refuses what no stock class computes; reads no block.

    Raises:
      ValueError: the first place that differs, or a quantizer of activations or of the cache.
    """
    stock(model, hf_config)
    for i, block in enumerate(map(block_struct, model.blocks)):
        for name, site in block.sites.items():
            if site.quantizer is not None:
                raise ValueError(
                    f"block {i} quantizes {name} ({site.quantizer.spec}), and a dense model "
                    "computes with activations and caches as they are"
                )
        if block.sites.get("v_cache", Site()).transforms:
            raise ValueError(f"block {i} transforms v_cache, and nothing there can take it back")


def write(
    source: ExportSource, out: Path, *, dtype: str | None = None, shard_size: int = SHARD_BYTES
) -> list[str]:
    """Fills the directory `out`.

    Args:
      dtype: of every tensor; None leaves dense ones as they are and gives dequantized ones the
        dtype of the embedding.
      shard_size: bytes of tensors in a file.

    Raises:
      ValueError: see `check`; an unknown dtype; transforms of queries and keys that do not cancel.
    """
    source, notes = with_plain_embedding(source)
    target, found = find_dtype(dtype), stock(source.model, source.hf_config)
    kept = np.dtype(source.model.embed.weight.dtype) if target is None else target
    layouts = [
        {
            name: plain_entry(part, params, kept if _quantized(part, params) else target, _plain)
            for name, params in stored_tensors(template).items()
        }
        for part, template in structures(source.model, found)
    ]
    write_shards(out, layouts, parts(source), shard_size)
    write_json(out / "config.json", with_dtype(found.config, kept))
    copy_companions(source, out)
    return notes + _notes(source.model, kept)


def with_plain_embedding(source: ExportSource) -> tuple[ExportSource, list[str]]:
    """The source with a table of floats for an embedding, and what to say about it."""
    model = source.model
    if not isinstance(model.embed.weight, QTensor):
        return source, []
    dtype = np.dtype(model.config.compute_dtype if model.norm is None else model.norm.weight.dtype)
    table = np.asarray(table_of(model.embed)).astype(dtype)
    model = model.replace(embed=model.embed.replace(weight=table))
    note = f"The embedding is dequantized to {dtype}: the format has no codes for it."
    return dataclasses.replace(source, model=model), [note]


def find_dtype(name: str | None) -> np.dtype | None:
    """The numpy dtype of an option.

    Raises:
      ValueError: none of DTYPES.
    """
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype={name!r} is not supported; use one of {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]


def with_dtype(config: dict[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """The config, saying in which dtype the model is stored."""
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    return config | dict.fromkeys(names, str(dtype))


def structures(model: Decoder, found: Stock) -> Iterator[tuple[Any, Any]]:
    """(structure, template) of the model without its blocks, then of every block."""
    yield model.replace(blocks=()), found.template.replace(blocks=())
    yield from zip(map(block_struct, model.blocks), found.template.blocks, strict=True)


def parts(source: ExportSource) -> Iterator[Any]:
    """The same parts with their arrays.

    Raises:
      ValueError: the transforms of queries and keys do not cancel.
    """
    blocks = map(_checked, itertools.count(), source.blocks())
    return itertools.chain([source.model.replace(blocks=())], blocks)


def plain_entry(
    part: Any,
    params: dict[str, Param],
    dtype: np.dtype | None,
    leaf: Callable[[Any, str], Any] = get_at,
) -> Entry:
    """A tensor of floats from the leaves it holds, in `dtype` or in their own."""
    dtype = np.dtype(get_at(part, next(iter(params))).dtype if dtype is None else dtype)

    def make(part: Any) -> np.ndarray:
        rows = []
        for path, param in params.items():
            array = np.asarray(leaf(part, path))
            rows.append((array.T if param.transpose else array).astype(dtype, copy=False))
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    return Entry(TensorSpec(stored_shape(params), dtype), make)


def _plain(part: Any, path: str) -> Any:
    """The leaf at `path` as a stock class wants it."""
    leaf = get_at(part, path)
    dense = dequantize(leaf) if isinstance(leaf, QTensor) else leaf
    rotated = isinstance(part, Block) and any(site.transforms for site in part.sites.values())
    return (
        take_back(part, path.removesuffix(".w"), dense)
        if rotated and path.endswith(".w")
        else dense
    )


def _quantized(part: Any, params: Iterable[str]) -> bool:
    return any(isinstance(get_at(part, path), QTensor) for path in params)


def _checked(index: int, block: Block) -> Block:
    if not keeps_scores(block):
        raise ValueError(
            f"block {index}: the transforms of query and k_cache do not cancel, and no class of "
            "other libraries has a place for them"
        )
    return block


def _notes(model: Decoder, dtype: np.dtype) -> list[str]:
    structs = [block_struct(block) for block in model.blocks]
    leaves = jax.tree.leaves(structs, is_leaf=lambda x: isinstance(x, QTensor))
    quantized = sum(isinstance(leaf, QTensor) for leaf in leaves)
    notes = []
    if quantized:
        notes.append(f"{quantized} quantized weights are dequantized to {dtype}.")
    if any(site.transforms for block in structs for site in block.sites.values()):
        notes.append("Online transforms are multiplied back into the weights, in float32.")
    return notes
