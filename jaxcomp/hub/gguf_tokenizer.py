"""A byte-level BPE tokenizer from the metadata of a GGUF file.

The file holds tokens and merges and only the *name* of the rule that cuts text before merging
(`tokenizer.ggml.pre`). The rules are those of the models' own tokenizers.

Source: llama.cpp's `llama-vocab.cpp` for what a name means. transformers' own GGUF conversion
forgets the rule, so that SmolLM's digits are merged there and not here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcomp.hub.gguf import GGUFFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

AGAIN = "convert the model again"
CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_WORDS = (  # a word ends where a small letter is followed by a capital one
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def build_tokenizer(path: str | Path) -> "PreTrainedTokenizerFast":
    """The tokenizer in a GGUF file, with its special tokens and chat template.

    Raises:
      ValueError: the file has none, or one of a kind or rule this library does not have.
    """
    from transformers import PreTrainedTokenizerFast

    file = GGUFFile(path)
    backend, tokens = _backend(file)
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and not (type(number) is int and 0 <= number < len(tokens)):
            raise ValueError(
                f"{path}: tokenizer.ggml.{key}_token_id={number!r} is no token: there are "
                f"{len(tokens)}; {AGAIN}"
            )
        special[f"{name}_token"] = None if number is None else tokens[number]
    architecture = file.metadata.get("general.architecture")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        model_max_length=file.metadata.get(f"{architecture}.context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _backend(file: GGUFFile) -> tuple["Tokenizer", list[str]]:
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    kind = file.metadata.get("tokenizer.ggml.model")
    rule = file.metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or rule not in RULES:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.model={kind!r} with tokenizer.ggml.pre={rule!r} is not "
            f"supported; there is 'gpt2' (byte-level BPE) with {', '.join(RULES)}. "
            "Use the tokenizer files of the model's Hugging Face directory"
        )
    tokens = _list(file, "tokens", str)
    types = _list(file, "token_type", int) if "tokenizer.ggml.token_type" in file.metadata else []
    merges = [tuple(merge.split(" ", 1)) for merge in _list(file, "merges", str)]
    if types and len(types) != len(tokens):
        raise ValueError(
            f"{file.path}: {len(types)} entries of tokenizer.ggml.token_type for {len(tokens)} "
            f"tokens; {AGAIN}"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        bpe = models.BPE(vocab, merges, ignore_merges=rule in IGNORE_MERGES)
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{file.path}: tokens and merges disagree: {error}; {AGAIN}") from error
    backend = Tokenizer(bpe)
    RULES[rule](backend)
    backend.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=type_ == CONTROL, normalized=False)
        for token, type_ in zip(tokens, types, strict=False)
        if type_ in (CONTROL, USER_DEFINED)
    ]
    backend.add_tokens(added)
    bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    if file.metadata.get("tokenizer.ggml.add_bos_token", rule in ADD_BOS) and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A {tokens[bos]} $B",
            special_tokens=[(tokens[bos], bos)],
        )
    return backend, tokens


def _list(file: GGUFFile, name: str, kind: type) -> list[Any]:
    found = file.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or not all(type(item) is kind for item in found):
        raise ValueError(
            f"{file.path}: tokenizer.ggml.{name} must be a list of {kind.__name__}; {AGAIN}"
        )
    return found


def _byte_level(*, digits: bool) -> Callable[["Tokenizer"], None]:
    def install(backend: "Tokenizer") -> None:
        from tokenizers import pre_tokenizers as pre

        gpt2 = pre.ByteLevel(add_prefix_space=False)  # its own regex is GPT-2's
        one_by_one = pre.Digits(individual_digits=True)
        backend.pre_tokenizer = pre.Sequence([one_by_one, gpt2]) if digits else gpt2

    return install


def _words(*patterns: str, nfc: bool = False) -> Callable[["Tokenizer"], None]:
    def install(backend: "Tokenizer") -> None:
        from tokenizers import Regex, normalizers
        from tokenizers import pre_tokenizers as pre

        splits = [pre.Split(Regex(pattern), "isolated") for pattern in patterns]
        byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre.Sequence([*splits, byte_level])
        if nfc:
            backend.normalizer = normalizers.NFC()

    return install


RULES: dict[str, Callable[["Tokenizer"], None]] = {
    "smollm": _byte_level(digits=True),  # before the byte level: each digit on its own
    "gpt-2": _byte_level(digits=False),
    "llama-bpe": _words(LLAMA3_WORDS),
    "dbrx": _words(LLAMA3_WORDS),  # OLMo 2, Phi 4
    "qwen2": _words(QWEN2_WORDS, nfc=True),
    "tekken": _words(TEKKEN_WORDS),  # Mistral since NeMo
    "default": _words(r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
}
IGNORE_MERGES = {"llama-bpe", "tekken"}  # a word that is a token is taken whole
ADD_BOS = {"llama-bpe", "tekken"}  # where the file does not say
