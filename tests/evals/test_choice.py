import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import job
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.evals import Choice, Gold
from jaxcomp.evals.choice import Answers, flips, summary
from jaxcomp.hub import encode as encode_with
from jaxcomp.hub import load_tokenizer, open_checkpoint
from jaxcomp.methods import RTN
from jaxcomp.models.text import encode_pair
from jaxcomp.recipe import Recipe, recipe_from_json, recipe_to_json
from tests import tiny

QUESTIONS = [  # context, choices, right one
    ("The Atlantic Ocean is", (" the second largest", " a cat", " one of the oceans"), 0),
    ("In 1492 three ships", (" sailed from Palos", " walked on the Moon"), 0),
    ("Each block reads", (" é", " the residual stream and adds to it", " and", " in"), 1),
    ("In 1969 two people", (" walked", " sailed"), 0),
]


def write(path, questions=QUESTIONS):
    lines = [
        {"doc_id": i, "label": gold, "request": {"context": context, "continuation": text}}
        for i, (context, texts, gold) in enumerate(questions)
        for text in texts
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny.checkpoint("llama", jax.random.key(0), tmp_path_factory.mktemp("choice") / "model")


@pytest.fixture(scope="module")
def model(place):
    return open_checkpoint(place).model


@pytest.fixture(scope="module")
def encode(place):
    tokenizer = load_tokenizer(place)
    return lambda text: encode_with(tokenizer, text, tiny.VOCAB)


@pytest.fixture(scope="module")
def reference(place, model, encode):
    """Log-likelihood of a pair by transformers, and its number of tokens."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()

    def log_likelihood(context, continuation):
        before, after = encode_pair(model.config, encode, context, continuation)
        ids = torch.tensor([[*before, *after]][:1], dtype=torch.long)
        with torch.no_grad():
            log_p = torch.log_softmax(theirs(ids[:, :-1]).logits[0].double(), -1)
        found = log_p[-len(after) :].gather(1, ids[0, -len(after) :, None])
        return float(found.sum()), len(after)

    return log_likelihood


def test_the_answers_are_those_of_the_likelihoods_of_transformers(
    model, encode, reference, tmp_path
):
    found = Choice(write(tmp_path / "t.jsonl")).answers(model, encode)
    for i, (context, texts, gold) in enumerate(QUESTIONS):
        nats = np.array([reference(context, text)[0] for text in texts])
        assert found.gold[i] == gold and found.ids[i] == str(i)
        assert found.chosen["accuracy"][i] == nats.argmax()
        chars = [len(text) - 1 for text in texts]
        assert found.chosen["accuracy_per_char"][i] == (nats / chars).argmax()
        sizes = [len(text.encode()) - 1 for text in texts]
        assert found.chosen["accuracy_per_byte"][i] == (nats / sizes).argmax()


def test_gold_bits_are_those_of_transformers(model, encode, reference, tmp_path):
    numbers = Gold(write(tmp_path / "t.jsonl"))(model, encode)
    right = [(context, texts[gold]) for context, texts, gold in QUESTIONS]
    nats, tokens = zip(*(reference(*pair) for pair in right), strict=True)
    sizes = [len(text.encode()) for _, text in right]
    assert numbers["tokens"] == sum(tokens) and numbers["bytes"] == sum(sizes)
    assert numbers["bits_per_byte"] == pytest.approx(-sum(nats) / math.log(2) / sum(sizes), 1e-4)
    assert numbers["perplexity"] == pytest.approx(math.exp(-sum(nats) / sum(tokens)), 1e-3)
    assert numbers["items"] == 4 and numbers["truncated"] == 0


def test_the_standard_error_of_a_ratio_shrinks_with_the_items(model, encode, tmp_path):
    once = Gold(write(tmp_path / "a.jsonl"))(model, encode)
    many = Gold(write(tmp_path / "b.jsonl", QUESTIONS * 16))(model, encode)
    assert many["bits_per_byte"] == pytest.approx(once["bits_per_byte"], rel=1e-5)
    ratio = once["bits_per_byte_stderr"] / many["bits_per_byte_stderr"]
    assert ratio == pytest.approx(math.sqrt(63 / 3), rel=1e-4)


def test_a_limit_takes_the_same_items_of_every_model(model, encode, tmp_path):
    path = write(tmp_path / "t.jsonl", QUESTIONS * 5)
    whole, part = (Choice(path, limit).answers(model, encode) for limit in (None, 7))
    assert len(part.ids) == 7 and len(whole.ids) == 20
    where = [whole.ids.index(i) for i in part.ids]
    np.testing.assert_array_equal(part.chosen["accuracy"], whole.chosen["accuracy"][where])


def test_an_item_longer_than_the_context_is_cut_at_the_left_and_counted(model, encode, tmp_path):
    context = " ".join(tiny.SENTENCES)
    assert len(encode(context)) > model.config.context_length == 64
    long = [(context, (" ships", " people of the world"), 0), *QUESTIONS]
    numbers = Choice(write(tmp_path / "long.jsonl", long))(model, encode)
    assert numbers["truncated"] == 2 and numbers["items"] == 5
    assert len(encode(context[40:])) > 66
    cut = [(context[40:], (" ships", " people of the world"), 0), *QUESTIONS]
    answers = [
        Choice(write(tmp_path / "t.jsonl", questions)).answers(model, encode)
        for questions in (long, cut)
    ]
    np.testing.assert_array_equal(*(a.chosen["accuracy"] for a in answers))
    assert Gold(write(tmp_path / "t.jsonl", long))(model, encode)["truncated"] == 1
    with pytest.raises(ValueError, match="tokens to score exceed the model's context of 64"):
        Gold(write(tmp_path / "t.jsonl", [("a", (context,), 0)]))(model, encode)


def test_a_single_item_has_no_standard_error(model, encode, tmp_path):
    path = write(tmp_path / "t.jsonl", QUESTIONS[:1])
    for evaluation in (Choice(path), Gold(path)):
        assert not [key for key in evaluation(model, encode) if key.endswith("stderr")]


def test_a_task_without_choices_is_refused(model, encode, tmp_path):
    path = write(tmp_path / "t.jsonl", [("a", ("b",), 0)])
    with pytest.raises(ValueError, match=r"nothing to choose from: 1 of 1 items .* Gold"):
        Choice(path)(model, encode)


def test_a_model_that_makes_nan_is_refused(model, encode, tmp_path):
    broken = model.replace(norm=model.norm.replace(weight=model.norm.weight * jnp.nan))
    for evaluation in (Choice, Gold):
        with pytest.raises(ValueError, match=r"NaN or infinite.*inspect --check"):
            evaluation(write(tmp_path / "t.jsonl"))(broken, encode)


@pytest.mark.parametrize("evaluation", [Choice, Gold])
def test_the_name_tells_evaluations_apart(evaluation):
    kind = evaluation.__name__.lower()
    assert evaluation("piqa").name == f"{kind} piqa"
    settings = [("piqa",), ("piqa", 10), ("piqa", 20), ("piqa", 20, 1), ("piqa/mc_5shot", 20)]
    assert len({evaluation(*s).name for s in settings}) == len(settings)
    with pytest.raises(ValueError, match="limit=0 is below 1"):
        evaluation("piqa", 0)


def test_a_recipe_measures_tasks_and_its_run_depends_on_their_content(place, tmp_path):
    path = write(tmp_path / "t.jsonl")
    recipe = Recipe((RTN(QuantSpec(2)),), evals=(Choice(path, 3), Gold(path)))
    assert recipe_from_json(recipe_to_json(recipe)) == recipe
    report = job.compress(place, recipe, tmp_path / "out", compare=False)
    names = [evaluation.name for evaluation in recipe.evals]
    assert list(report.evals_before) == list(report.evals_after) == names
    before, after = (e[names[1]] for e in (report.evals_before, report.evals_after))
    assert before["bits_per_byte"] != after["bits_per_byte"] and before["items"] == 4
    identity = lambda: job.run_identity(job.load(place), recipe, None, "float32")  # noqa: E731
    first = identity()
    write(tmp_path / "t.jsonl", QUESTIONS[::-1])
    assert identity() != first and identity()["recipe"] == first["recipe"]


def answers(chosen):
    return Answers(("a", "b", "c", "d"), np.array([0, 1, 2, 0]), {"accuracy": np.array(chosen)}, 0)


def test_flips_are_counted_by_their_direction():
    teacher, student = answers([0, 1, 0, 1]), answers([0, 2, 2, 2])
    assert flips(teacher, student) == {
        "items": 4,
        "teacher": 0.5,
        "student": 0.5,
        "same_answer": 0.25,
        "right_to_wrong": ["b"],
        "wrong_to_right": ["c"],
    }
    assert summary(teacher) == {
        "accuracy": 0.5,
        "accuracy_stderr": pytest.approx(math.sqrt(0.25 / 3)),
        "items": 4,
        "truncated": 0,
    }
