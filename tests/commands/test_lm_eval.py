import json
import sys

import jax
import pytest
from typer.testing import CliRunner

from jaxcomp.__main__ import app
from tests import tiny

TASK = """
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny.checkpoint("llama", jax.random.key(0), tmp_path_factory.mktemp("lm") / "model")


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = [{"question": f"In {i} ships", "choices": ["sailed", "read"], "gold": 0} for i in "123"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tasks").mkdir()
    task = TASK.format(data=tmp_path / "data.jsonl")
    (tmp_path / "tasks" / "local.yaml").write_text(task)
    return tmp_path / "tasks"


def test_a_task_of_the_users_own_gives_a_table_and_json(place, tasks, tmp_path):
    own = ["--include-path", tasks, "--no-defaults", "--batch", 4, "--max-length", 32]
    result = run(
        "lm-eval", place, "--tasks", "local", *own, "--limit", 2, "--json", tmp_path / "n.json"
    )
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "n.json").read_text())
    accuracy = written["results"]["local"]["acc,none"]
    assert accuracy in (0, 0.5, 1) and written["n-samples"]["local"]["effective"] == 2
    row = next(line for line in result.output.splitlines() if line.lstrip().startswith("local"))
    assert row.split()[:3] == ["local", "acc", f"{accuracy:.4g}"] and row.split()[-1] == "2"
    assert written["source"] == str(place) and written["environment"]["lm_eval"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", ","], "names no task"),
        (["--tasks", "locl"], "no task 'locl'; did you mean local?"),
        (["--tasks", "local", "--max-length", 65], "max_length=65 is outside 1 to 64"),
        (["--tasks", "local", "--chat"], "no chat template"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, place, tasks):
    result = run("lm-eval", place, *arguments, "--include-path", tasks, "--no-defaults")
    assert result.exit_code == 2 and message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


def test_a_missing_harness_is_told_before_the_model_is_read(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run("lm-eval", "no/such/model", "--tasks", "arc_easy")
    assert result.exit_code == 2
    assert "pip install 'jaxcomp[lm-eval]'" in result.output.replace("\n", " ")


def test_the_help_says_what_to_do_without_a_network():
    output = " ".join(run("lm-eval", "--help").output.split())
    assert all(word in output for word in ("Without a network", "HF_HOME", "--include-path"))
