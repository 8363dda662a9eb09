import dataclasses

import numpy as np
import pytest

from jaxcomp.hub.tokenizer import encode as encode_with
from jaxcomp.models.config import ModelConfig
from jaxcomp.models.text import encode_pair, encode_text, prefix_token, split_pair
from tests import tiny

CONFIG = ModelConfig("llama", 32, tiny.VOCAB, 64, bos_token_id=0, eos_token_ids=(2,))
WITH_BOS = dataclasses.replace(CONFIG, bos="window")


@pytest.fixture(scope="module")
def encode():
    tokenizer = tiny.tokenizer()
    return lambda text: encode_with(tokenizer, text, tiny.VOCAB)


def test_a_continuation_is_what_the_pair_has_beyond_the_context(encode):
    for config in (CONFIG, WITH_BOS):
        before, after = encode_pair(config, encode, "The Atlantic Ocean", " is the second")
        whole = encode_text(config, encode, "The Atlantic Ocean is the second")
        assert [*before, *after] == whole.tolist()
        assert (before[0] == 0) == (config.bos == "window")
    assert after.tolist() == encode(" is the second").tolist()


def test_white_space_goes_to_the_continuation():
    assert split_pair("a:  \n", "b") == ("a:", "  \nb")
    assert split_pair("a:", " b") == ("a:", " b")
    assert split_pair("  ", "b") == ("", "  b")


def test_without_a_context_the_prefix_token_stands_there(encode):
    before, after = encode_pair(CONFIG, encode, "", "ships")
    assert before == [0] and after.tolist() == encode("ships").tolist()
    no_bos = dataclasses.replace(CONFIG, bos_token_id=None)
    assert prefix_token(no_bos) == 2
    before, after = encode_pair(CONFIG, encode, "", "<|start|>ships")  # is there already
    assert before == [0] and after.tolist() == encode("ships").tolist()
    with pytest.raises(ValueError, match="neither a BOS nor an EOS token"):
        prefix_token(dataclasses.replace(no_bos, eos_token_ids=()))


def test_a_bos_that_is_there_is_not_doubled(encode):
    assert encode_text(WITH_BOS, encode, "<|start|>ships").tolist().count(0) == 1
    assert encode_text(WITH_BOS, encode, "").tolist() == [0]


def test_a_continuation_that_melts_into_the_context_is_refused():
    melted = lambda text: np.arange(1 + len(text) // 10, dtype=np.int32)  # noqa: E731
    with pytest.raises(ValueError, match="'b' after 'a' has no token of its own"):
        encode_pair(CONFIG, melted, "a", "b")
