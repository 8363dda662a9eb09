"""`open_checkpoint`: any checkpoint as a `Decoder` whose blocks are read when they are needed.

    source ─locate─▶ directory or file ─▶ config dict + table of tensors
    config ─families─▶ template: a Decoder of Param leaves
    quantization_config ─PACKED─▶ leaves for packed weights in the place of some
    template + tensors ─▶ every name and shape checked, then embedding, norm and head are loaded

Nothing is skipped: a tensor the template lacks, or one the files lack, is refused by name.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jaxcomp.core.files import sha256_file
from jaxcomp.hub import awq_read, ct_read, gptq_read
from jaxcomp.hub.directory import companions, open_tensors, read_json
from jaxcomp.hub.gguf import GGUFFile
from jaxcomp.hub.gguf_model import GGUFTensors
from jaxcomp.hub.gguf_model import hf_config as gguf_config
from jaxcomp.hub.leaves import TensorSource, leaf_struct, read_leaf, rows_a_time
from jaxcomp.hub.locate import locate
from jaxcomp.hub.packed import DENSE, NOTHING, Packed
from jaxcomp.hub.packed_model import (
    check_modules,
    module_shapes,
    packed_template,
    wanted_tensors,
)
from jaxcomp.models.decoder import Block, Decoder
from jaxcomp.models.families import template_of

# `quant_method` → its reader, a module with `packed_part(config, template, source, allow)`.
PACKED: dict[str, ModuleType] = {
    "compressed-tensors": ct_read,
    "gptq": gptq_read,
    "awq": awq_read,
}
BUFFERS = (".rotary_emb.inv_freq",)  # in old checkpoints; recomputed from the config


@dataclasses.dataclass(frozen=True, eq=False)
class CheckpointBlock:
    """A block behind a checkpoint: `jaxcomp.models.decoder.BlockHandle`."""

    template: Block
    source: TensorSource

    def load(self) -> Block:
        """The block with host arrays in their stored dtypes; every call reads the files again."""
        return fill(self.template, self.source)

    def struct(self) -> Block:
        """The block with `jax.ShapeDtypeStruct` leaves."""
        return jax.tree.map(lambda leaf: leaf_struct(leaf, self.source), self.template)


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open checkpoint.

    Attributes:
      model: embedding, final norm and head are on the device, `blocks` are handles.
      hf_config: the config as a dict; of a GGUF file, the one that says the same. It describes the
        dense model: how the checkpoint packs weights is no part of it.
      files: what a writer carries over unchanged, name → path.
      source: what the user asked for.
      path: the directory or file it was found in.
      weights: the files that hold the tensors.
    """

    model: Decoder
    hf_config: dict[str, Any]
    files: dict[str, Path]
    source: str
    path: Path
    weights: tuple[Path, ...]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the bytes of config and weights: equal wherever the same content lies.

        Every byte is read once (about 1 GB/s where the disk gives it), and only when this is asked
        for: sizes and times alone would miss a file that was edited or copied over with its time.
        """
        configs = [p for p in (self.path / "config.json",) if p.exists()]
        digest = hashlib.sha256()
        for path in (*configs, *sorted(self.weights)):
            digest.update(sha256_file(path).encode())
        return digest.hexdigest()


def open_checkpoint(
    source: str | Path, *, compute_dtype: str = "float32", allow_config: Iterable[str] = ()
) -> Checkpoint:
    """Opens a checkpoint without reading its blocks.

    Args:
      source: a Hugging Face directory, a `.gguf` file, `owner/name` on the hub, `demo:smollm2`.
      compute_dtype: dtype of activations and products, "float32" or "bfloat16"; weights keep the
        dtype they are stored in.
      allow_config: unknown config fields that the caller vouches change nothing.

    Raises:
      ValueError: not a checkpoint, an unsupported model, or files that are damaged, incomplete or
        hold what the model does not have. The message names the file, the tensor and a way out.
      ModuleNotFoundError, ConnectionError: see `jaxcomp.hub.locate.locate`.
    """
    path, allow = locate(source), tuple(allow_config)
    if path.is_file():
        tensors, hf_config, generation, files = _open_file(path, allow)
    else:
        tensors, hf_config, generation, files = _open_directory(path)
    hf_config = dict(hf_config)
    quantization = hf_config.pop("quantization_config", None)
    template = template_of(
        hf_config, generation=generation, compute_dtype=compute_dtype, allow=allow
    )
    packed = _packed_part(quantization, template, tensors, allow)
    reconcile(template, tensors, packed)
    template = packed_template(template, packed, tensors)
    ends = jax.device_put(fill(template.replace(blocks=()), tensors))
    blocks = tuple(CheckpointBlock(block, tensors) for block in template.blocks)
    model = ends.replace(blocks=blocks)
    return Checkpoint(model, hf_config, files, str(source), path, tensors.files)


def fill(template: Any, source: TensorSource) -> Any:
    """The template with every leaf replaced by what it describes, one after another."""
    return jax.tree.map(lambda leaf: read_leaf(leaf, source), template)


def reconcile(template: Decoder, source: TensorSource, packed: Packed = NOTHING) -> None:
    """Checks that the files hold just the tensors of the model.

    Args:
      template: of the dense model.
      packed: which of its weights are stored as codes.

    Raises:
      ValueError: a tensor is missing, unknown, or of another shape or type; or a tied model has a
        head of its own.
    """
    wanted = wanted_tensors(template, packed, source)
    harmless = lambda name: name in packed.unused or name.endswith(BUFFERS)  # noqa: E731
    unknown = [name for name in source.specs if name not in wanted and not harmless(name)]
    missing = [name for name in wanted if name not in source.specs]
    if template.lm_head is None and "lm_head.weight" in unknown and not missing:
        _check_tied_head(template.embed.weight.name, source)
        unknown.remove("lm_head.weight")
    if missing or unknown:
        told = [f"{len(missing)} missing: {_some(missing)}"] if missing else []
        told += [f"{len(unknown)} unknown: {_some(unknown)}"] if unknown else []
        raise ValueError(
            f"{source.where} does not hold the tensors of a {template.config.family} model with "
            f"{len(template.blocks)} blocks; {'; '.join(told)}. The config and the weights must be "
            "of one model: download both again, or correct the config"
        )
    for name, (shape, dtypes) in wanted.items():
        spec = source.specs[name]
        if spec.shape != shape:
            raise ValueError(
                f"{source.where}: tensor {name!r} has shape {list(spec.shape)} and the config "
                f"makes it {list(shape)}; correct the config or download the weights "
                "again"
            )
        if spec.dtype.name not in dtypes:
            raise ValueError(
                f"{source.where}: tensor {name!r} is stored as {spec.dtype} and a weight must be "
                f"one of {', '.join(dtypes)}; if it is quantized in another way, {DENSE}"
            )


def _packed_part(
    quantization: Any, template: Decoder, source: TensorSource, allow: tuple[str, ...]
) -> Packed:
    """What of the model is stored as codes, by the config and checked against the files."""
    if not quantization:
        dense = dict.fromkeys(module_shapes(template), False)
        missing = (
            "the missing quantization_config of config.json (is there a quantize_config.json?)"
        )
        check_modules(dense, source, missing)
        return NOTHING
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in PACKED:
        raise ValueError(
            f"config.json: quantization_config={str(quantization)[:120]}: quant_method={method!r} "
            f"is not read; there is {', '.join(PACKED)}: {DENSE}"
        )
    return PACKED[method].packed_part(quantization, template, source, allow)


def _check_tied_head(embed: str, source: TensorSource) -> None:
    spec, other = source.specs["lm_head.weight"], source.specs[embed]
    equal = spec == other
    step = rows_a_time(spec.shape)
    for start in range(0, spec.shape[0] if equal else 0, step):
        rows = (source.rows(name, start, start + step) for name in ("lm_head.weight", embed))
        a, b = (r.view(np.uint8) for r in rows)
        equal = equal and np.array_equal(a, b)
    if not equal:
        raise ValueError(
            f"{source.where}: the config ties the head to the embedding and lm_head.weight differs "
            f"from {embed}; set tie_word_embeddings to false if the head is meant, or remove it"
        )


def _open_file(path: Path, allow: tuple[str, ...]) -> tuple[TensorSource, dict, dict, dict]:
    if path.suffix != ".gguf":
        raise ValueError(
            f"{path} is no checkpoint: a file must be .gguf; for safetensors give the directory "
            "that holds config.json and the weights"
        )
    file = GGUFFile(path)
    hf_config = gguf_config(file, allow)
    return GGUFTensors(file, hf_config["head_dim"]), hf_config, {}, {}


def _open_directory(path: Path) -> tuple[TensorSource, dict, dict, dict]:
    names = sorted(p.name for p in path.iterdir())
    if "config.json" not in names:
        hint = "give a directory with config.json and model.safetensors"
        if "manifest.json" in names:
            hint = "it looks like an artefact of this library: use jaxcomp.load"
        if any(name.endswith(".gguf") for name in names):
            hint = "give the path of the .gguf file itself"
        found = ", ".join(names[:12]) or "nothing"
        raise ValueError(f"{path} is no checkpoint: no config.json (found: {found}); {hint}")
    hf_config = read_json(path / "config.json")
    generation = path / "generation_config.json"
    generation = read_json(generation) if generation.exists() else {}
    return open_tensors(path), hf_config, generation, companions(path)


def _some(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )
