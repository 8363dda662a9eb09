import json

import jax
import pytest
from typer.testing import CliRunner

import jaxcomp
from jaxcomp.__main__ import app
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.evals import Choice, Perplexity
from jaxcomp.methods import RTN
from jaxcomp.recipe import Recipe
from jaxcomp.report.agreement import agreement_tables, drifting_blocks, plot_agreement
from tests import tiny

WORDS = " ".join(tiny.SENTENCES).split()
QUESTIONS = [(" ".join(WORDS[i : i + 4]), (f" {WORDS[-i]}", " of", " it")) for i in range(1, 13)]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, what rounding to 2 bits makes of it, another model, a text and a task."""
    place = tmp_path_factory.mktemp("compare")
    tiny.checkpoint("llama", jax.random.key(0), place / "model")
    (place / "text.txt").write_text(" ".join(tiny.SENTENCES * 3))
    jaxcomp.compress(place / "model", Recipe((RTN(QuantSpec(2)),)), place / "out", compare=False)
    tiny.checkpoint("llama", jax.random.key(0), place / "other", vocab_size=400)
    lines = [
        {"doc_id": i, "label": i % 2, "request": {"context": context, "continuation": text}}
        for i, (context, texts) in enumerate(QUESTIONS)
        for text in texts
    ]
    (place / "task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


@pytest.fixture(scope="module")
def finished(place):
    """Both models run on the text and the task: what was printed and what was written."""
    settings = ["--logits", "--text", place / "text.txt", "--context", 24, "--tokens", 92]
    asked = ["--task", place / "task.jsonl", "--limit", 10, "--seed", 3]
    files = ["--png", place / "drift.png", "--json", place / "found.json"]
    result = run("compare", place / "model", place / "out", *settings, *asked, *files)
    assert result.exit_code == 0, result.output
    return result.output, json.loads((place / "found.json").read_text())


def test_two_models_are_run_and_their_predictions_compared(place, finished):
    output, found = finished
    text = str(place / "text.txt")
    perplexity = Perplexity(text, context=24, tokens=92)
    for who, where in (("teacher", "model"), ("student", "out")):
        loaded = jaxcomp.load(place / where)
        wanted = perplexity(loaded.model, loaded.encode)["perplexity"]
        assert found["next_token"]["perplexity"][who] == pytest.approx(wanted, rel=1e-4)
    assert found["next_token"]["tokens"] == 92 and found["next_token"]["kl"]["mean"] > 0
    assert (found["teacher"], found["student"]) == (str(place / "model"), str(place / "out"))
    assert len(found["depth"]["median"]) == 3 and found["environment"]["jax"]
    for words in ("KL(teacher ‖ student), 99 %", "same first choice", "blocks that add most"):
        assert words in " ".join(output.split())
    assert (place / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_flips_are_those_of_the_answers_of_both(place, finished):
    output, found = finished
    ((name, flips),) = found["tasks"].items()
    assert name.endswith("/task 10 items seed 3") and "items lost (right → wrong)" in output
    evaluation = Choice(str(place / "task.jsonl"), 10, seed=3)
    answers = []
    for where in ("model", "out"):
        loaded = jaxcomp.load(place / where)
        answers.append(evaluation.answers(loaded.model, loaded.encode))
    right = [dict(zip(a.ids, a.chosen["accuracy"] == a.gold, strict=True)) for a in answers]
    lost = [i for i in answers[0].ids if right[0][i] and not right[1][i]]
    assert flips["right_to_wrong"] == lost != [] and flips["items"] == 10
    assert flips["teacher"] == pytest.approx(sum(right[0].values()) / 10)


def test_a_task_alone_needs_no_text(place):
    result = run("compare", place / "model", place / "model", "--task", place / "task.jsonl")
    assert result.exit_code == 0 and "KL" not in result.output
    row = next(line for line in result.output.splitlines() if "/task" in line).split()
    assert row[-4:] == ["0", "0", "100.0%", "12"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "other", "--logits"], "have 320 and 400 words; only models of one vocabulary"),
        (["model", "--logits"], "--task compare 2 models, and 1 are given"),
        (["model", "out", "--text", "c4"], "--text is a setting of --logits, which is not given"),
        (["model", "out", "--logits", "--seed", 1], "--seed is a setting of --task"),
        (["out", "out", "--json", "x"], "--json is a setting of --logits"),
        (["model", "out"], "there is no report at"),
        (["model", "out"], "to run two models and compare what they predict, add --logits"),
    ],
)
def test_a_mistake_says_what_to_do(arguments, message, place):
    paths = [place / a if a in ("model", "out", "other") else a for a in arguments]
    result = run("compare", *paths)
    assert result.exit_code == 2 and message in " ".join(result.output.split())


def test_reports_are_still_compared_without_running_anything(place):
    result = run("compare", place / "out", place / "out")
    assert result.exit_code == 0 and "RTN W2" in result.output


def test_blocks_drift_in_the_order_of_what_they_add():
    depth = {"local": [0.0, 0.1, 0.3, 0.2], "median": [0.0, 0.1, 0.35, 0.5]}
    assert drifting_blocks(depth) == [1, 2, 0] and drifting_blocks(depth, 1) == [1]
    (table,) = agreement_tables({"depth": depth})
    assert list(table.columns[0].cells) == ["1", "2", "0", "1 (half of the end)", "2 (the end)"]


def test_a_picture_needs_a_text_and_gets_by_without_depth(finished, tmp_path):
    _, found = finished
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_agreement({"tasks": found["tasks"]}, tmp_path / "a.png")
    flat = found | {"depth": {"skipped": "the models have 2 and 3 blocks"}}
    plot_agreement(flat, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
