"""How text becomes the tokens a model reads: what is put before it, where a continuation starts.

`encode` gives the token ids of a text without special tokens; what is special is added here.

Source: the rules of EleutherAI's evaluation harness (`TemplateLM.loglikelihood`), so that numbers
agree. Departure: whether a BOS comes first is said by the model's family (`ModelConfig.bos`), not
by the tokenizer.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from jaxcomp.models.config import ModelConfig

Encode = Callable[[str], np.ndarray]
Ids = Sequence[int] | Int[np.ndarray, "..."]


def encode_text(config: ModelConfig, encode: Encode, text: str) -> Int[np.ndarray, " n"]:
    """Tokens of a text, after the BOS token if the family wants one and the text has none."""
    ids = encode(text)
    if config.bos != "window" or (len(ids) and ids[0] == config.bos_token_id):
        return ids
    return np.concatenate([[config.bos_token_id], ids]).astype(np.int32)


def prefix_token(config: ModelConfig) -> int:
    """What stands before a text that has nothing before it: BOS, or EOS where there is none.

    Raises:
      ValueError: the model has neither.
    """
    ids = [config.bos_token_id, *config.eos_token_ids]
    found = [i for i in ids if i is not None]
    if not found:
        raise ValueError(
            "the first token of a text cannot be predicted: the model's config names neither a BOS "
            "nor an EOS token to put before it; give a context"
        )
    return found[0]


def split_pair(context: str, continuation: str) -> tuple[str, str]:
    """The pair with white space at the end of the context moved to where tokenizers put it."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def encode_pair(
    config: ModelConfig, encode: Encode, context: str, continuation: str
) -> tuple[Ids, Ids]:
    """Tokens of a context and of the continuation after it, both at least one.

    The two are encoded together; the continuation is what comes after as many tokens as the context
    alone has.

    Raises:
      ValueError: the continuation has no token of its own.
    """
    context, continuation = split_pair(context, continuation)
    if context:
        before = encode_text(config, encode, context)
        after = encode_text(config, encode, context + continuation)[len(before) :]
    else:
        before, after = [prefix_token(config)], encode(continuation)
        if len(after) > 1 and after[0] == before[0]:
            after = after[1:]
    if not len(after):
        raise ValueError(
            f"{continuation!r} after {context[-20:]!r} has no token of its own, so it has no "
            "likelihood; end the context where a token ends"
        )
    return before, after
