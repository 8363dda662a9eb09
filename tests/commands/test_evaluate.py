import json
import types

import pytest
from typer.testing import CliRunner

from jaxcomp import job
from jaxcomp.__main__ import app
from jaxcomp.data import tasks
from jaxcomp.evals import Choice, Cost, Gold, Perplexity


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120"})


@pytest.fixture
def seen(monkeypatch):
    """The evaluations that the job is given."""
    found = []
    monkeypatch.setattr(job, "load", lambda *_, **__: None)
    monkeypatch.setattr(job, "evaluate", lambda _, evals, __: found.extend(evals) or {})
    return found


def test_every_task_is_an_evaluation_of_its_own(seen):
    options = ["--limit", 20, "--seed", 1, "--batch", 2]
    names = ["--eval", "choice", "--eval", "gold", "--eval", "cost"]
    result = run("eval", "DIR", *names, "--task", "piqa", "--task", "boolq", *options)
    assert result.exit_code == 0, result.output
    choices = [Choice(task, 20, 1, 2) for task in ("piqa", "boolq")]
    assert seen == [*choices, *(Gold(task, 20, 1, 2) for task in ("piqa", "boolq")), Cost()]


def test_a_task_alone_means_a_choice_and_nothing_means_perplexity(seen):
    run("eval", "DIR", "--task", "piqa")
    run("eval", "DIR", "--tokens", 99)
    assert seen == [Choice("piqa"), Perplexity(tokens=99)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval", "choice"], "choice needs a task, such as --task arc_easy; there are a, b"),
        (["--eval", "perplexity", "--task", "piqa"], "--task is no setting of perplexity"),
        (["--eval", "choice", "--task", "a", "--text", "c4"], "--text is no setting of choice"),
        (["--eval", "choice", "--task", "a", "--limit", 0], "limit=0 is below 1"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(arguments, message, monkeypatch):
    monkeypatch.setattr(tasks, "task_names", lambda: ["a", "b"])
    result = run("eval", "DIR", *arguments)
    assert result.exit_code == 2 and message in result.output


def test_two_evaluations_of_one_name_are_refused():
    loaded = types.SimpleNamespace(model=types.SimpleNamespace(blocks=()))
    with pytest.raises(ValueError, match="two evaluations are called 'choice piqa 20 items'"):
        job.evaluate(loaded, (Choice("piqa", 20), Choice("piqa", 20, batch=2)))


def test_an_unknown_task_is_one_line_on_the_screen(monkeypatch, tmp_path):
    folder = tmp_path / "t.jsonl"
    folder.write_text("")
    loaded = types.SimpleNamespace(model=types.SimpleNamespace(blocks=()), encode=None)
    monkeypatch.setattr(job, "load", lambda *_, **__: loaded)
    result = run("eval", "DIR", "--task", folder)
    assert result.exit_code == 2 and "is empty" in result.output.replace("\n", " ")


def test_the_numbers_are_written_as_json(monkeypatch, tmp_path):
    monkeypatch.setattr(job, "load", lambda *_, **__: None)
    monkeypatch.setattr(job, "evaluate", lambda *_: {"choice piqa": {"accuracy": 0.5}})
    result = run("eval", "DIR", "--task", "piqa", "--json", tmp_path / "n.json")
    assert result.exit_code == 0 and "choice piqa accuracy" in result.output
    written = json.loads((tmp_path / "n.json").read_text())
    assert written["evals"] == {"choice piqa": {"accuracy": 0.5}}
