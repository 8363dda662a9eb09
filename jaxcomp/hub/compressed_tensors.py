"""Format `compressed-tensors`: packed weights that vLLM, transformers and others load.

The codes are moved as they are; nothing is rounded again. What the format has a word for: integer
weights of 2 to 8 bits per channel or group, inputs of linears quantized per token at run time or
on a static grid, static grids of keys and values, and Hadamard rotations of a linear's input.
Everything else is refused: another program would load the rest without an error and be wrong.

Source: compressed-tensors 0.20 and the loader of vLLM.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxcomp.core.hadamard import hadamard_matrix
from jaxcomp.core.quantize import QTensor, QuantSpec
from jaxcomp.core.site import ActQuantizer
from jaxcomp.core.tensorfile import TensorSpec
from jaxcomp.core.transforms import Hadamard
from jaxcomp.hub import ct_pack
from jaxcomp.hub.ct_config import ModuleScheme, check_matches, patterns, quantization_config
from jaxcomp.hub.ct_scheme import CACHES, Plan, input_quantizer, plan
from jaxcomp.hub.dense import (
    find_dtype,
    parts,
    plain_entry,
    structures,
    with_dtype,
    with_plain_embedding,
)
from jaxcomp.hub.shards import SHARD_BYTES, Entry, Layout, write_shards
from jaxcomp.hub.stock import gather, linear_modules, per_channel, stock
from jaxcomp.hub.write import ExportSource, copy_companions, write_json
from jaxcomp.models.decoder import Block, Decoder
from jaxcomp.models.families.template import stored_tensors

LOAD = 'vllm serve "{out}", or transformers.AutoModelForCausalLM.from_pretrained("{out}")'
FLOAT32 = np.dtype(np.float32)
SIGNS = np.dtype(ml_dtypes.bfloat16)  # of a Hadamard matrix, whose entries are ±1


def check(model: Decoder, hf_config: dict[str, Any]) -> None:
    """Refuses what the format has no word for; reads no block.

    Raises:
      ValueError: the first such place and the reason.
    """
    plan(model, stock(model, hf_config).template)


def write(
    source: ExportSource, out: Path, *, dtype: str | None = None, shard_size: int = SHARD_BYTES
) -> list[str]:
    """Fills the directory `out`.

    Args:
      dtype: of dense tensors and scales; None leaves dense tensors as they are and scales float32.
      shard_size: bytes of tensors in a file.

    Raises:
      ValueError: see `check`; an unknown dtype; transforms of queries and keys that do not cancel.
    """
    source, notes = with_plain_embedding(source)
    target, found = find_dtype(dtype), stock(source.model, source.hf_config)
    what = plan(source.model, found.template)
    config = quantization_config(what.schemes, what.kv_cache, transform_groups(what.rotations))
    check_matches(config, what.schemes)
    layouts = [_layout(*part, what, target) for part in structures(source.model, found)]
    layouts[0] |= _matrices(what.rotations)
    write_shards(out, layouts, parts(source), shard_size)
    embed = layouts[0][found.template.embed.weight.name].spec.dtype
    described = with_dtype(found.config, embed) | {"quantization_config": config}
    write_json(out / "config.json", described)
    copy_companions(source, out)
    return notes + _notes(what)


def transform_groups(rotations: dict[str, Hadamard]) -> dict[str, dict[str, Any]]:
    """`config_groups` of a transform_config: a group for every order of a rotation.

    A matrix that is not Sylvester's is "random-hadamard", whose entries are read from the file.
    """
    orders: dict[int, list[str]] = {}
    for module, rotation in rotations.items():
        orders.setdefault(rotation.order, []).append(module)
    return {
        _group(order): {
            "type": "hadamard" if order & (order - 1) == 0 else "random-hadamard",
            "apply": [{"targets": patterns(names), "location": "input"}],
            "head_dim": order,  # runs of so many channels; all of them where they are one run
        }
        for order, names in orders.items()
    }


def weight_layout(
    module: str, w: QTensor, scheme: ModuleScheme, scales: np.dtype, read: Callable[[Any], QTensor]
) -> Layout:
    """The tensors of a quantized weight; `read` takes it out of its part of the model."""
    in_ch, out_ch = w.shape
    groups = w.scale.shape[-2]

    def entry(shape: tuple[int, ...], dtype: Any, make: Callable[[QTensor], np.ndarray]) -> Entry:
        return Entry(TensorSpec(shape, np.dtype(dtype)), lambda part: make(read(part)))

    def scale(w: QTensor) -> np.ndarray:
        return np.asarray(per_channel(w).scale).T.astype(scales, copy=False)

    def packed(w: QTensor) -> np.ndarray:
        return ct_pack.pack_weight(np.asarray(w.packed), w.bits, w.in_ch)

    def zero_point(w: QTensor) -> np.ndarray:
        return ct_pack.pack_zero_point(np.asarray(per_channel(w).zero_point), w.bits)

    layout = {f"{module}.weight_scale": entry((out_ch, groups), scales, scale)}
    if scheme.format == "int-quantized":
        codes = lambda w: ct_pack.bytes_weight(np.asarray(w.packed))  # noqa: E731
        return layout | {f"{module}.weight": entry((out_ch, in_ch), np.int8, codes)}
    shape = np.array([out_ch, in_ch], np.int64)
    columns, rows = ct_pack.words(in_ch, w.bits), ct_pack.words(out_ch, w.bits)
    layout[f"{module}.weight_packed"] = entry((out_ch, columns), np.int32, packed)
    layout[f"{module}.weight_shape"] = entry((2,), np.int64, lambda _: shape)
    if not scheme.symmetric:
        layout[f"{module}.weight_zero_point"] = entry((rows, groups), np.int32, zero_point)
    return layout


def grid_layout(
    at: str, spec: QuantSpec, scales: np.dtype, read: Callable[[Any], ActQuantizer]
) -> Layout:
    """The static grid of an activation: `AT_scale`, and `AT_zero_point` where it has one."""

    def entry(field: str, dtype: np.dtype) -> Entry:
        make = lambda part: np.asarray(getattr(read(part), field)).reshape(1).astype(dtype)  # noqa: E731
        return Entry(TensorSpec((1,), dtype), make)

    layout = {f"{at}_scale": entry("scale", scales)}
    if not spec.symmetric:
        layout[f"{at}_zero_point"] = entry("zero_point", np.dtype(np.int8))
    return layout


def _layout(part: Any, template: Any, what: Plan, target: np.dtype | None) -> dict[str, Entry]:
    """Everything that is written of one part of the model."""
    scales = FLOAT32 if target is None else target
    linears, layout = linear_modules(template), {}
    for name, params in stored_tensors(template).items():
        module, paths = name.removesuffix(".weight"), tuple(params)
        scheme = what.schemes.get(module) if module in linears else None
        if scheme is None:
            layout[name] = plain_entry(part, params, target)
            continue
        read = lambda part, paths=paths: gather(part, paths)  # noqa: E731
        layout |= weight_layout(module, read(part), scheme, scales, read)
        if scheme.act is not None and not scheme.act.dynamic:
            path = linears[module][0]
            own = lambda block, path=path: input_quantizer(block, path)  # noqa: E731
            layout |= grid_layout(f"{module}.input", scheme.act, scales, own)
    if isinstance(part, Block) and what.kv_cache is not None:
        attention = template.attn.q.w.name.rsplit(".", 2)[0]
        for site in CACHES:
            own = lambda block, site=site: block.sites[site].quantizer  # noqa: E731
            layout |= grid_layout(f"{attention}.{site[0]}", what.kv_cache, scales, own)
    return layout


def _matrices(rotations: dict[str, Hadamard]) -> Layout:
    """The matrix of every order, once: readers share it among the modules of a group."""
    first = {r.order: module for module, r in reversed(rotations.items())}
    return {
        f"{module}.{_group(order)}_input.weight": Entry(
            TensorSpec((order, order), SIGNS),
            lambda _, order=order: hadamard_matrix(order).astype(SIGNS),
        )
        for order, module in first.items()
    }


def _group(order: int) -> str:
    return f"hadamard_{order}"


def _notes(what: Plan) -> list[str]:
    """What a user of the export would otherwise learn from wrong numbers."""
    schemes = {scheme for scheme in what.schemes.values() if scheme is not None}
    acts = {s.act for s in schemes if s.act is not None and s.act.dynamic and s.act.symmetric}
    notes = []
    if any(s.format == "pack-quantized" and not s.symmetric for s in schemes):
        notes.append(
            "Asymmetric weights: vLLM loads them; transformers only with "
            "quantization_config=CompressedTensorsConfig(dequantize=True)."
        )
    if len(schemes) > 1:
        notes.append(
            "Several grids: transformers' CompressedTensorsConfig(dequantize=True) takes the first "
            "for all modules and is wrong; load without it."
        )
    for act in sorted(acts, key=str):
        half, qmax = (2**act.bits - 1) / 2, act.qmax
        notes.append(
            f"Inputs of {act.bits} bits: the format leaves open which scale goes with a range. "
            f"transformers divides the largest magnitude by {half}, this library by {qmax}; "
            f"act_clip={qmax / half:.6g} in a recipe simulates the former."
        )
    if what.rotations:
        notes.append(
            "Hadamard rotations at run time are in transform_config: vLLM applies them (on one "
            "device), transformers does not and is wrong without an error."
        )
    if what.kv_cache is not None:
        notes.append(
            "kv_cache_scheme, k_scale and v_scale hold the static grids of keys and values: "
            "transformers 5.24 does not apply them, vLLM's caches are float and it refuses others "
            "than symmetric ones of 8 bits."
        )
    return notes
