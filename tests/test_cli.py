import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from jaxcomp import artefact, completion, job
from jaxcomp.__main__ import app
from jaxcomp.evals import Cost, Perplexity
from jaxcomp.evals import __all__ as eval_names
from jaxcomp.methods import METHODS
from jaxcomp.models.families import FAMILIES
from jaxcomp.report import Report
from tests import heterogeneous

CONFIG = """
from jaxcomp import RTN, CalibSpec, QuantSpec, Recipe

def recipe():
    return Recipe(steps=(RTN(weight=QuantSpec(bits=4)),), calib=CalibSpec(samples=8))
"""


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120"})


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "out"
    artefact.save(heterogeneous.model(), out, recipe={"class": "Recipe"})
    return out


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = (
        "import sys, jaxcomp.__main__; print({'jax', 'numpy', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "command", ["compress", "eval", "lm-eval", "inspect", "generate", "bench", "study", "compare"]
)
def test_the_help_of_every_command_shows_how_it_is_used(command):
    result = run(command, "--help")
    assert result.exit_code == 0 and f"jaxcomp {command} " in result.output
    assert command in run().output and command in run("--help").output


def test_info_lists_the_registries():
    output = run("info").output
    assert all(name in output for name in [*METHODS, *FAMILIES, "Perplexity", "wiki_calib"])
    assert "compilation cache" in output and "jaxcomp 0." in run("--version").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "x", "absent.py", "--out", "o"], "there is no recipe file absent.py"),
        (["inspect", "no/such/place/here"], "no/such/place/here"),
        (["eval", "x", "--eval", "taste"], "there is no evaluation 'taste'; there is: perplexity"),
        (["eval", "x", "--eval", "cost", "--text", "c4"], "--text is no setting of cost"),
        (["eval", "x", "--eval", "cost", "--through-cache", 8], "--through-cache is no setting"),
        (["eval", "x", "--execution", "exact"], "Invalid value for '--execution'"),
        (["eval", "x", "--context", "many"], "Invalid value for '--context'"),
        (["compress", "x"], "Missing"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.output
    assert "Traceback" not in result.output


def test_the_traceback_is_shown_when_it_is_asked_for():
    result = run("eval", "x", "--eval", "taste", "--traceback")
    assert isinstance(result.exception, ValueError)


def test_a_bug_of_ours_keeps_its_traceback(config, monkeypatch, tmp_path):
    def broken(*_, **__):
        raise KeyError("ours")

    monkeypatch.setattr(job, "compress", broken)
    result = run("compress", "x", config, "--out", tmp_path / "o")
    assert isinstance(result.exception, KeyError)


def test_compress_hands_everything_to_the_job(config, monkeypatch, tmp_path):
    seen, report = {}, Report("DIR", {})
    patched = lambda *args, **kwargs: seen.update(kwargs, args=args) or report  # noqa: E731
    monkeypatch.setattr(job, "compress", patched)
    flags = ["--no-resume", "--overwrite", "--dtype", "bfloat16", "--allow-config", "a"]
    flags += ["--data-parallel"]
    settings = ["calib.samples=4", "steps.0.weight.bits=3"]
    result = run("compress", "DIR", config, *settings, "--out", tmp_path / "o", *flags)
    assert result.exit_code == 0, result.output
    source, recipe, out = seen["args"]
    assert (source, out) == ("DIR", tmp_path / "o")
    assert recipe.calib.samples == 4 and recipe.steps[0].weight.bits == 3
    assert not seen["resume"] and seen["overwrite"] and seen["allow_config"] == ("a",)
    assert seen["compute_dtype"] == "bfloat16" and seen["data_parallel"]


def test_a_setting_that_does_not_exist_is_refused_before_the_model_is_read(config, tmp_path):
    result = run("compress", "DIR", config, "calib.sample=4", "--out", tmp_path / "o")
    assert result.exit_code == 2 and "did you mean samples?" in result.output


def test_eval_builds_the_evaluations_and_writes_the_numbers(monkeypatch, tmp_path):
    def evaluate(loaded, evals, progress):
        assert evals == (Perplexity("t.txt", context=64, stride=32, tokens=99), Cost())
        return {"perplexity t": {"perplexity": 12.5}}

    monkeypatch.setattr(job, "load", lambda *_, **__: None)
    monkeypatch.setattr(job, "evaluate", evaluate)
    names = ["--eval", "perplexity", "--eval", "Cost"]
    numbers = ["--text", "t.txt", "--context", 64, "--stride", 32, "--tokens", 99]
    result = run("eval", "DIR", *names, *numbers, "--json", tmp_path / "n.json")
    assert result.exit_code == 0 and "12.5" in result.output
    written = json.loads((tmp_path / "n.json").read_text())
    assert written["evals"] == {"perplexity t": {"perplexity": 12.5}} and written["source"] == "DIR"
    assert set(eval_names) >= {"Perplexity", "Cost"}


@pytest.mark.parametrize("execution", [[], ["--execution", "integer"]])
def test_the_execution_and_the_cache_are_chosen_on_the_command_line(execution, monkeypatch):
    seen = {}
    monkeypatch.setattr(job, "load", lambda *_, **options: seen.update(options))
    monkeypatch.setattr(job, "evaluate", lambda _, evals, __: seen.update(evals=evals) or {})
    monkeypatch.setattr(completion, "complete", lambda *_, **__: iter(()))
    assert run("eval", "DIR", "--through-cache", 64, *execution).exit_code == 0
    assert seen["evals"] == (Perplexity(through_cache=64),)
    assert seen.pop("integer") == bool(execution)
    assert run("generate", "DIR", "-p", "Once", *execution).exit_code == 0
    assert seen["integer"] == bool(execution)


def test_inspect_shows_nodes_grids_and_sizes_of_an_artefact(place):
    output = run("inspect", place, "--check").output
    for text in ("16 × 16 4 bit, groups of 8, symmetric", "3 bit, per channel, asymmetric"):
        assert text in output
    assert "window=7" in output and "int8 per-token sym" in output and '"class": "Recipe"' in output
    assert "codes" in output and "intact" in output


def test_inspect_finds_what_is_damaged(place, tmp_path):
    model = heterogeneous.model()
    bad = model.embed.weight.at[3, 3].set(float("nan"))
    artefact.save(model.replace(embed=model.embed.replace(weight=bad)), tmp_path / "nan")
    result = run("inspect", tmp_path / "nan", "--check")
    assert result.exit_code == 2 and "embed.weight: 1 of 800 values are NaN" in result.output


def test_equal_blocks_are_one_entry_unless_each_is_wanted(tmp_path):
    model = heterogeneous.model()
    artefact.save(model.replace(blocks=(model.blocks[1],) * 3), tmp_path / "out")
    assert "blocks.0 … blocks.2" in run("inspect", tmp_path / "out").output
    assert "blocks.1" in run("inspect", tmp_path / "out", "--blocks").output
