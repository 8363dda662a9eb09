"""`open_checkpoint`: any checkpoint as a `Decoder` whose blocks are read when they are needed.

    source ─locate─▶ directory or file ─▶ config dict + table of tensors
    config ─families─▶ template: a Decoder of Param leaves
    template + tensors ─▶ every name and shape checked, then embedding, norm and head are loaded

Nothing is skipped: a tensor the template lacks, or one the files lack, is refused by name.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxcomp.core.files import sha256_file
from jaxcomp.core.tensorfile import TensorSpec
from jaxcomp.hub.directory import companions, open_tensors, read_json
from jaxcomp.hub.gguf import GGUFFile
from jaxcomp.hub.gguf_model import GGUFTensors
from jaxcomp.hub.gguf_model import hf_config as gguf_config
from jaxcomp.hub.locate import locate
from jaxcomp.models.decoder import Block, Decoder
from jaxcomp.models.families import Param, template_of
from jaxcomp.models.families.template import stored_shape, stored_tensors

FLOATS = ("float32", "bfloat16", "float16")  # dtypes a weight may be stored in
CHUNK = 2**20  # elements read at a time: a transposed tensor is never in memory twice
BUFFERS = (".rotary_emb.inv_freq",)  # in old checkpoints; recomputed from the config


class TensorSource(Protocol):
    """Named tensors of a checkpoint, in Hugging Face's names and orientation."""

    specs: dict[str, TensorSpec]
    files: tuple[Path, ...]
    where: str

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of the tensor `name`."""
        ...


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

        def leaf(param: Param) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(param.shape, self.source.specs[param.name].dtype)

        return jax.tree.map(leaf, self.template)


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open checkpoint.

    Attributes:
      model: embedding, final norm and head are on the device, `blocks` are handles.
      hf_config: the config as a dict; of a GGUF file, the one that says the same.
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
    template = template_of(
        hf_config, generation=generation, compute_dtype=compute_dtype, allow=allow
    )
    reconcile(template, tensors)
    ends = jax.device_put(fill(template.replace(blocks=()), tensors))
    blocks = tuple(CheckpointBlock(block, tensors) for block in template.blocks)
    model = ends.replace(blocks=blocks)
    return Checkpoint(model, hf_config, files, str(source), path, tensors.files)


def fill(template: Any, source: TensorSource) -> Any:
    """The template with every `Param` replaced by its array, one tensor after another."""
    return jax.tree.map(lambda param: read_param(param, source), template)


def read_param(param: Param, source: TensorSource) -> np.ndarray:
    """One leaf in our layout, contiguous, in its stored dtype."""
    out = _aligned(param.shape, source.specs[param.name].dtype)
    view = out.T if param.transpose else out
    step, first = _step(view.shape), param.first_row
    for start in range(0, len(view), step):
        stop = min(start + step, len(view))
        view[start:stop] = source.rows(param.name, first + start, first + stop)
    return out


def reconcile(template: Decoder, source: TensorSource) -> None:
    """Checks that the files hold just the tensors of the template.

    Raises:
      ValueError: a tensor is missing, unknown, of another shape or not of a float type; or a tied
        model has a head of its own.
    """
    wanted = stored_tensors(template)
    unknown = [n for n in source.specs if n not in wanted and not n.endswith(BUFFERS)]
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
    for name, params in wanted.items():
        spec, shape = source.specs[name], stored_shape(params)
        if spec.shape != shape:
            raise ValueError(
                f"{source.where}: tensor {name!r} has shape {list(spec.shape)} and the config "
                f"makes it {list(shape)}; correct the config or download the weights "
                "again"
            )
        if spec.dtype.name not in FLOATS:
            raise ValueError(
                f"{source.where}: tensor {name!r} is stored as {spec.dtype} and a weight must be "
                f"one of {', '.join(FLOATS)}; if the checkpoint is quantized, start from the "
                "unquantized one"
            )


def _check_tied_head(embed: str, source: TensorSource) -> None:
    spec, other = source.specs["lm_head.weight"], source.specs[embed]
    equal = spec == other
    step = _step(spec.shape)
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


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array at a multiple of 64 bytes: JAX on CPU takes it over without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _step(shape: tuple[int, ...]) -> int:
    return max(1, CHUNK * shape[0] // max(1, math.prod(shape)))


def _some(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )
