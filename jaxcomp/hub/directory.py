"""A Hugging Face model directory: its JSON files, and its safetensors as one table of tensors."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from jaxcomp.core.tensorfile import TensorFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMPANIONS = (  # carried over unchanged by a writer; config.json is written anew
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
)

log = logging.getLogger(__name__)


class ShardedTensors:
    """Tensors of one or several safetensors files under one roof.

    Attributes:
      specs: name → shape and dtype, as stored.
      files: the weight files.
      where: the directory, for messages.
    """

    def __init__(self, directory: Path, shards: dict[Path, TensorFile]):
        self.where = str(directory)
        self.files = tuple(shards)
        self._home = {name: shard for shard in shards.values() for name in shard.specs}
        self.specs = {name: shard.specs[name] for name, shard in self._home.items()}

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of the tensor, as stored."""
        return self._home[name].rows(name, start, stop)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ValueError: it is not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def companions(directory: Path) -> dict[str, Path]:
    """The files beside the weights that belong to the model, by name."""
    return {name: directory / name for name in COMPANIONS if (directory / name).is_file()}


def open_tensors(directory: Path) -> ShardedTensors:
    """Opens the weight files of a directory and checks that they are complete.

    Raises:
      ValueError: no safetensors, a missing or damaged file, or an index that does not fit.
    """
    index, single = directory / INDEX, directory / SINGLE
    if index.exists() and single.exists():
        raise ValueError(
            f"{directory} has both {SINGLE} and {INDEX}, and they could differ; remove one"
        )
    if single.exists():
        return ShardedTensors(directory, {single: TensorFile(single)})
    if index.exists():
        return _open_index(index)
    raise ValueError(_no_weights(directory))


def _open_index(index: Path) -> ShardedTensors:
    directory, weight_map = index.parent, read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map; download it again")
    shards = {}
    for file in sorted(set(map(str, weight_map.values()))):
        if Path(file).name != file:
            raise ValueError(f"{index} names the shard {file!r}, which is outside its directory")
        if not (directory / file).exists():
            raise ValueError(
                f"{index} names the shard {file}, which is missing in {directory}; "
                "download it, or the whole directory again"
            )
        shards[directory / file] = TensorFile(directory / file)
    seen: dict[str, str] = {}
    for path, shard in shards.items():
        for name in shard.specs:
            if name in seen:
                raise ValueError(
                    f"tensor {name!r} is in both {seen[name]} and {path.name} of {directory}; "
                    "download both again"
                )
            seen[name] = path.name
            if name not in weight_map:
                raise ValueError(
                    f"{path} holds tensor {name!r}, which {index.name} does not list; "
                    "the shard and the index are of different checkpoints: download both again"
                )
    for name, file in weight_map.items():
        if seen.get(name) != file:
            found = f"is in {seen[name]}" if name in seen else "is in no shard"
            raise ValueError(
                f"{index} says that tensor {name!r} is in {file} and it {found}; "
                "the shard and the index are of different checkpoints: download both again"
            )
    stale = sorted({p.name for p in directory.glob("model-*.safetensors")} - set(seen.values()))
    if stale:
        log.warning("%s: ignored, as the index does not name them: %s", directory, ", ".join(stale))
    return ShardedTensors(directory, shards)


def _no_weights(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    found = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    if any(name.startswith("pytorch_model") and name.endswith(".bin") for name in names):
        return (
            f"{directory} holds only pytorch_model.bin, whose pickle is not read here; convert it: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT) with transformers"
        )
    if any(name.endswith(".safetensors") for name in names):
        return (
            f"{directory} has no {SINGLE} and no {INDEX} to say which of its files belong "
            f"together (found: {found}); download the index, or rename a single file to {SINGLE}"
        )
    return f"{directory} has no {SINGLE} (found: {found or 'nothing'}); download the weights"
