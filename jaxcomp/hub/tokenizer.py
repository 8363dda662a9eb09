"""The tokenizer of a checkpoint, as a fast tokenizer of transformers.

`load_tokenizer` takes it from the files beside the weights or builds it from a GGUF file;
`tokenizer.save_pretrained(dir)` keeps it. Nothing here needs torch or the network.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32

from jaxcomp.hub.gguf_tokenizer import build_tokenizer
from jaxcomp.hub.locate import locate
from jaxcomp.hub.read import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_tokenizer(source: Checkpoint | str | Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of an open checkpoint, a directory, a GGUF file, or whatever `locate` knows.

    Raises:
      ValueError: no tokenizer there, or one this library cannot build.
    """
    path = source.path if isinstance(source, Checkpoint) else locate(source)
    if path.is_file():
        return build_tokenizer(path)
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{path} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there; copy them "
            "from the model the weights are from"
        )
    # A class chosen by model_type may replace the rules of tokenizer.json by its own; and to import
    # what chooses takes 150 MB where torch is installed.
    if (path / "tokenizer.json").exists():
        from transformers import PreTrainedTokenizerFast as kind
    else:
        from transformers import AutoTokenizer as kind
    try:
        tokenizer = kind.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(
            f"{path}: transformers cannot load the tokenizer: {error}. Where tokenizer.json is "
            "missing, load it once with the model's own code and save_pretrained it here"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"{path}: {type(tokenizer).__name__} is a slow tokenizer and a fast one is needed; "
            "add the model's tokenizer.json"
        )
    return tokenizer


def encode(
    tokenizer: "PreTrainedTokenizerFast", text: str, vocab_size: int
) -> Int32[np.ndarray, " n"]:
    """Token ids of `text` without special tokens around it.

    Args:
      tokenizer: any fast tokenizer.
      text: of any length.
      vocab_size: rows of the embedding; more than the tokenizer has is normal (padding rows).

    Raises:
      ValueError: a token has no row, so tokenizer and model do not belong together.
    """
    ids = np.asarray(
        tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, np.int32
    )
    if len(ids) and ids.max() >= vocab_size:
        worst = int(ids.max())
        token = tokenizer.convert_ids_to_tokens(worst)
        raise ValueError(
            f"the tokenizer gives id {worst} ({token!r}) and the embedding has {vocab_size} rows; "
            "the tokenizer is of another model: use the files of the one the weights are from"
        )
    return ids
