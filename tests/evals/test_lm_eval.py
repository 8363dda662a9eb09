"""The harness on our models: its own backend for transformers is the oracle."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from jaxcomp.evals import Choice
from jaxcomp.evals.lm_eval_adapter import harness_model, run_harness
from jaxcomp.hub import encode as encode_with
from jaxcomp.hub import load_tokenizer, open_checkpoint
from jaxcomp.models.likelihood import buckets, make_request
from jaxcomp.models.stream import block_step_at
from tests import tiny

pytest.importorskip("lm_eval")
pytest.importorskip("torch")

TEXT = " ".join(tiny.SENTENCES)
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {settings}
metric_list: [{{metric: exact_match}}]
"""
QUESTIONS = [  # of some, what is called right is what the random model says
    {"question": "The Atlantic Ocean", "choices": ["is the second", "walked", "sailed"], "gold": 0},
    {"question": "In 1492 three ships", "choices": ["sailed from Palos", "read"], "gold": 1},
    {"question": "Each block reads", "choices": ["the Moon", "the residual stream"], "gold": 1},
    {"question": "Two people walked on", "choices": ["the Moon", "it", "a", "the sum"], "gold": 0},
    {"question": "The head reads", "choices": ["the sum", "ships and people"], "gold": 0},
]


class Ask:
    """A request of the harness."""

    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny.checkpoint("llama", jax.random.key(0), tmp_path_factory.mktemp("lm") / "model")


@pytest.fixture(scope="module")
def tokenizer(place):
    return load_tokenizer(place)


@pytest.fixture(scope="module")
def model(place):
    return open_checkpoint(place).model


@pytest.fixture(scope="module")
def encode(tokenizer):
    return lambda text: encode_with(tokenizer, text, tiny.VOCAB)


@pytest.fixture(scope="module")
def ours(model, tokenizer, encode):
    return harness_model(model, tokenizer, encode, batch=3)


@pytest.fixture(scope="module")
def theirs(place):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(place), device="cpu", dtype="float32", batch_size=2)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with tasks over a local file."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "choice.yaml").write_text(CHOICE.format(data=data))
    settings = "{until: ['.'], max_gen_toks: 4}"
    generate = GENERATE.format(data=data, settings=settings)
    (tmp_path / "yaml" / "generate.yaml").write_text(generate)
    return tmp_path / "yaml"


PAIRS = [
    ("The Atlantic Ocean", " is the second"),
    ("The Atlantic Ocean ", "is the second"),
    ("", "ships sailed"),
    ("In 1492", " three"),
    ("In 1492", " two"),
    (TEXT, " walked on the Moon."),  # longer than the context
    ("a\n", "b"),
]


def test_likelihoods_are_those_of_the_backend_for_transformers(ours, theirs):
    requests = [Ask(*pair) for pair in PAIRS]
    found, wanted = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in wanted], atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert ours.max_length == theirs.max_length == 64


def test_a_greedy_continuation_is_told_by_both(ours, theirs):
    start = "In 1492 three"
    text = theirs.generate_until([Ask(start, {"max_gen_toks": 2, "until": []})])[0]
    found = ours.loglikelihood([Ask(start, text)]), theirs.loglikelihood([Ask(start, text)])
    assert [f[0][1] for f in found] == [True, True]


def test_rolling_likelihoods_are_those_of_the_backend_for_transformers(ours, theirs):
    requests = [Ask(TEXT), Ask("ships"), Ask(TEXT * 2), Ask("")]
    found, wanted = ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests)
    np.testing.assert_allclose(found, wanted, atol=2e-3)
    assert found[3] == 0


def test_greedy_texts_are_those_of_the_backend_for_transformers(ours, theirs):
    requests = [
        Ask("The Atlantic Ocean", {"until": [], "max_gen_toks": 12}),
        Ask("In 1492 three ships", {"until": ["e"], "max_gen_toks": 12}),
        Ask("two people", {"until": ["e"], "max_gen_toks": 12, "do_sample": False}),
        Ask("walked on the Moon and", {"until": ["e"], "max_gen_toks": 12, "temperature": 0.0}),
        Ask(TEXT, {"until": ["<|pad|>"], "max_gen_toks": 7}),  # longer than the context
        Ask("the", {"max_gen_toks": 40}),
    ]
    found = ours.generate_until(requests)
    assert found == theirs.generate_until(requests)
    assert not any("e" in text for text in found[1:4]) and any(found)


def test_a_stop_string_may_be_a_token_that_no_text_shows(ours):
    start = "In 1492 three"
    (text,) = ours.generate_until([Ask(start, {"max_gen_toks": 8})])
    first = ours.tok_encode(start + text)[len(ours.tok_encode(start))]
    shown = ours.tokenizer.convert_ids_to_tokens(first)
    ours.tokenizer.get_added_vocab, keep = lambda: {shown: first}, ours.tokenizer.get_added_vocab
    try:
        assert ours.generate_until([Ask(start, {"until": [shown], "max_gen_toks": 8})]) == [""]
    finally:
        ours.tokenizer.get_added_vocab = keep


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "temperature": 0.8}, "do_sample=True and temperature=0.8 samples"),
        ({"temperature": 0.5}, "only greedy decoding is supported"),
        ({"num_beams": 4}, "generation with num_beams=4 is not supported; known are do_sample"),
        ({"max_gen_toks": 64}, "leaves no room for a prompt in a context of 64; it may be 1 to 63"),
        ({"max_gen_toks": 0}, "max_gen_toks=0 is below 1"),
    ],
)
def test_what_is_not_greedy_or_does_not_fit_is_refused(settings, message, ours):
    with pytest.raises(ValueError, match=message):
        ours.generate_until([Ask("ships", settings)])


def test_the_family_says_whether_a_bos_comes_first(model, tokenizer, encode):
    config = dataclasses.replace(model.config, bos="window")
    lm = harness_model(model.replace(config=config), tokenizer, encode)
    assert lm.tok_encode("ships") == [0, *encode("ships")]
    assert lm.tok_encode("ships", add_special_tokens=False) == encode("ships").tolist()
    assert lm._encode_pair("In 1492", " three")[0][0] == 0 and lm.prefix_token_id == 0


def test_a_block_compiles_once_for_every_length_that_occurs(ours):
    requests = [Ask(TEXT[:i], " ships") for i in range(1, 90, 3)]
    encoded = [ours._encode_pair(*request.args) for request in requests]
    block_step_at.clear_cache()
    ours.loglikelihood(requests)
    lengths = buckets([make_request(*pair, 64) for pair in encoded], 3)
    assert block_step_at._cache_size() == len(lengths) == 1


def test_a_local_task_gives_the_numbers_of_the_other_backend_and_of_our_own_evaluation(
    ours, theirs, model, encode, tasks, tmp_path
):
    names, run = ["tiny_choice", "tiny_generate"], dict(include_path=tasks, defaults=False)
    found, wanted = (run_harness(lm, names, **run)["results"] for lm in (ours, theirs))
    assert found == wanted and set(found) == set(names)
    lines = [
        {"doc_id": i, "label": q["gold"], "request": {"context": q["question"], "continuation": c}}
        for i, q in enumerate(QUESTIONS)
        for c in (f" {choice}" for choice in q["choices"])
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    numbers = Choice(str(tmp_path / "t.jsonl"))(model, encode)
    choice = found["tiny_choice"]
    assert 0 < numbers["accuracy"] == choice["acc,none"] < 1
    assert numbers["accuracy_per_char"] == choice["acc_norm,none"]
    assert numbers["accuracy_stderr"] == pytest.approx(choice["acc_stderr,none"])
    assert numbers["items"] == 5


def test_few_shots_and_a_limit_reach_the_harness(ours, tasks):
    found = run_harness(
        ours, ["tiny_choice"], include_path=tasks, defaults=False, limit=2, num_fewshot=1
    )
    assert found["n-samples"]["tiny_choice"]["effective"] == 2
    assert found["n-shot"]["tiny_choice"] == 1


def test_a_chat_template_wraps_the_prompts_or_is_missed(ours, tasks, monkeypatch):
    run = lambda: run_harness(  # noqa: E731
        ours, ["tiny_choice"], include_path=tasks, defaults=False, chat=True
    )
    with pytest.raises(ValueError, match="no chat template"):
        run()
    seen = []
    template = "{% for m in messages %}<u>{{ m.content }}{% endfor %}<a>"
    monkeypatch.setattr(ours.tokenizer, "chat_template", template)
    encode = ours.tok_encode
    monkeypatch.setattr(ours, "tok_encode", lambda s, *a, **k: seen.append(s) or encode(s, *a, **k))
    run()
    assert any(text.startswith("<u>The Atlantic Ocean<a>") for text in seen)


def test_bad_input_is_refused_with_the_way_out(ours, model, tasks):
    run = dict(include_path=tasks, defaults=False)
    with pytest.raises(ValueError, match=r"no task 'tiny_choise'; did you mean tiny_choice\?"):
        run_harness(ours, ["tiny_choise"], **run)
    with pytest.raises(ValueError, match="include_path='nowhere' is no folder"):
        run_harness(ours, ["tiny_choice"], include_path="nowhere", defaults=False)
    absent = CHOICE.format(data="absent.jsonl").replace("tiny_choice", "absent")
    (tasks / "absent.yaml").write_text(absent)
    with pytest.raises(ConnectionError, match=r"data of absent is not there: .* --eval choice"):
        run_harness(ours, ["absent"], **run)
    with pytest.raises(ValueError, match="max_length=65 is outside 1 to 64"):
        harness_model(model, ours.tokenizer, None, max_length=65)


def test_a_missing_harness_names_the_command_that_installs_it(model, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxcomp\[lm-eval\]'"):
        harness_model(model, None, None)
