"""A byte-level BPE tokenizer as `tokenizer.*` keys of a GGUF file; `gguf_tokenizer` read backwards.

A file holds tokens and merges, and of the rule that cuts text before merging only a name. Which
name is right is found as llama.cpp's converter finds it: by what a tokenizer does to a text that
has something of everything. Where no rule that `gguf_tokenizer` knows does the same, there is no
name to write, and a runtime would cut text in another way than the model was trained with.

Source: llama.cpp's `convert_hf_to_gguf`.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcomp.hub.gguf_container import Value
from jaxcomp.hub.gguf_tokenizer import CONTROL, IGNORE_MERGES, RULES, USER_DEFINED
from jaxcomp.models.config import ModelConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

NORMAL, UNUSED = 1, 5  # values of tokenizer.ggml.token_type
OTHERWISE = "export as hf and convert that directory with llama.cpp's convert_hf_to_gguf.py instead"
PROBE = (
    "Hello, World! It's 3.14159 or 2,000,000—isn't it? I'M, we'd, THEY'LL\tnaïve cafe\u0301\n\n\n"
    "  def f(x_1):\r\n\treturn x**2   # ~~ßcode~~ $5+7=12^3|<>\n \n   \u3000\U0001f999\U0001f680 "
    "Привет, мир! 你好，世界 1234567890 مرحبا १२३ ½ \u200d\u0336 a\u00a0b  …  ''''''```"
    '""""......!!!!!!??????'
)


def vocabulary(tokenizer: "PreTrainedTokenizerFast", config: ModelConfig) -> dict[str, Value]:
    """The keys.

    Args:
      tokenizer: as `hub.tokenizer.load_tokenizer` gives it.
      config: of the model. Rows of the embedding beyond the tokenizer become unused tokens; of the
        tokens that end a text the file has a place for two, and the tokenizer's own comes first.

    Raises:
      ValueError: not byte-level BPE, a rule without a name, or more tokens than rows.
    """
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    kind, pieces = state["model"].get("type"), bool(state["model"].get("byte_fallback"))
    if kind != "BPE" or pieces:
        kind = "BPE of SentencePiece" if pieces else kind
        raise ValueError(
            f"the tokenizer is {kind}, and only byte-level BPE is written to GGUF here; {OTHERWISE}"
        )
    tokens, types = _tokens(state, config.vocab_size)
    keys: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": find_rule(backend, bool(state["model"].get("ignore_merges"))),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.asarray(types, np.int32),
        "tokenizer.ggml.merges": _merges(state["model"]["merges"]),
    }
    ids = {
        "bos": tokenizer.bos_token_id if config.bos_token_id is None else config.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    if config.eos_token_ids:
        ends = sorted(config.eos_token_ids, key=lambda i: i != ids["eos"])
        ids |= {"eos": ends[0], "eot": ends[1] if len(ends) > 1 else None}
    for name, number in ids.items():
        if number is not None:
            keys[f"tokenizer.ggml.{name}_token_id"] = np.uint32(number)
    plain, whole = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
    keys["tokenizer.ggml.add_bos_token"] = len(whole) > len(plain) and whole[0] == ids["bos"]
    if len(whole) > len(plain) and whole[-1] == ids["eos"]:
        keys["tokenizer.ggml.add_eos_token"] = True
    if template := tokenizer.chat_template:
        named = template if isinstance(template, dict) else {"default": template}
        if "default" in named:
            keys["tokenizer.chat_template"] = named["default"]
    return keys


def find_rule(backend: "Tokenizer", ignore_merges: bool) -> str:
    """The name of the rule by which a tokenizer cuts text.

    Args:
      ignore_merges: a word that is a token is taken whole.

    Raises:
      ValueError: none of the rules does the same to the probe.
    """
    from tokenizers import Tokenizer, models

    wanted = _pieces(backend)
    for name, install in RULES.items():
        other = Tokenizer(models.BPE())
        install(other)
        if _pieces(other) == wanted and (name in IGNORE_MERGES) == ignore_merges:
            return name
    raise ValueError(
        "the tokenizer cuts text before merging by a rule that none of "
        f"{', '.join(RULES)} is, so that no tokenizer.ggml.pre names it; {OTHERWISE}"
    )


def _pieces(backend: "Tokenizer") -> list[str] | None:
    if backend.pre_tokenizer is None:
        return None
    text = PROBE if backend.normalizer is None else backend.normalizer.normalize_str(PROBE)
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def _tokens(state: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    found = {number: token for token, number in state["model"]["vocab"].items()}
    added = {token["id"]: token for token in state["added_tokens"]}
    found |= {number: token["content"] for number, token in added.items()}
    if (last := max(found)) >= vocab_size:
        raise ValueError(
            f"the tokenizer has id {last} ({found[last]!r}) and the embedding {vocab_size} rows; "
            "the tokenizer is of another model"
        )
    special = {i: CONTROL if token["special"] else USER_DEFINED for i, token in added.items()}
    tokens = [found.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    types = [special.get(i, NORMAL if i in found else UNUSED) for i in range(vocab_size)]
    return tokens, types


def _merges(merges: list[Any]) -> list[str]:
    """`a b` for every pair, in either of the two forms that `tokenizer.json` has had."""
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
