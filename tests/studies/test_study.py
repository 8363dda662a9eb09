"""A study on a tiny checkpoint: the job's own numbers, each row once, killed and continued."""

import dataclasses
import json
import random
import re

import jax
import pytest
from typer.testing import CliRunner

import jaxcomp
from jaxcomp import job
from jaxcomp.__main__ import app
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.evals import Perplexity
from jaxcomp.methods import GPTQ, RTN, gptq
from jaxcomp.recipe import CalibSpec, Recipe
from jaxcomp.studies import Study, StudyRow, plan_study, run_study, with_settings
from tests import tiny

SEEDS = ("calib.seed=0", "calib.seed=1")


@pytest.fixture(scope="module", autouse=True)
def no_pictures_of_single_runs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "draw_pictures", lambda *_: [])
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("study")
    tiny.checkpoint("llama", jax.random.key(0), place / "model", num_hidden_layers=3)
    rng, words = random.Random(0), " ".join(tiny.SENTENCES).split()
    (place / "text.txt").write_text(" ".join(rng.choice(words) for _ in range(300)))
    return place


@pytest.fixture
def study(place):
    text = str(place / "text.txt")
    calib = CalibSpec(text, samples=4, length=24, batch=4)
    rows = (
        StudyRow("RTN", Recipe((RTN(QuantSpec(3)),)), {"data": "–"}),
        StudyRow("GPTQ", Recipe((GPTQ(QuantSpec(3)),), calib), {"data": "✓"}, repeats=SEEDS),
        StudyRow("odd", Recipe((RTN(QuantSpec(3, group_size=5)),)), group="wrong"),
    )
    evals = (Perplexity(text, context=24, tokens=100, batch=2),)
    return Study(str(place / "model"), rows, evals, title="three rows", show=("perplexity",))


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """Where the study was run once, and its result."""
    out = tmp_path_factory.mktemp("finished")
    return out, run_study(study.__wrapped__(place), out, command="jaxcomp study grid.py")


@pytest.fixture
def calls(monkeypatch):
    """The recipes that the main job gets, and the numbers of evaluations."""
    seen, compress, evaluate = [], job.compress, job.evaluate

    def counted(source, recipe, *args, **kwargs):
        seen.append(recipe)
        return compress(source, recipe, *args, **kwargs)

    monkeypatch.setattr(job, "compress", counted)
    monkeypatch.setattr(job, "evaluate", lambda *a: seen.append("evaluate") or evaluate(*a))
    return seen


def perplexities(result, name):
    (row,) = (row for row in result["rows"] if row["name"] == name)
    return [numbers["perplexity"] for run in row["runs"] for numbers in run["evals"].values()]


def test_a_study_gives_the_numbers_that_compress_gives(finished, study, tmp_path):
    _, result = finished
    report = jaxcomp.compress(study.model, study.rows[0].recipe, tmp_path / "out")
    (before,), (after,) = report.evals_before.values(), report.evals_after.values()
    assert perplexities(result, "RTN") == [after["perplexity"]]
    (itself,) = result["model_itself"]["evals"].values()
    assert itself == before and result["rows"][0]["runs"][0]["sizes"] == report.sizes
    assert result["rows"][0]["runs"][0]["peak_rss_bytes"] > 0


def test_a_study_leaves_a_table_pictures_and_reports_but_no_models(finished):
    out, result = finished
    assert json.loads((out / "study.json").read_text()) == result
    for name in ("study.png", "depth.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    table = (out / "study.md").read_text()
    assert "### three rows" in table and re.search(r"\| GPTQ +\| ✓ +\| .*± ", table)
    assert "`jaxcomp study grid.py`" in table and "100 tokens scored" in table
    assert len(list(out.glob("rows/*"))) == len(list(out.glob("rows/*/report.json"))) == 3
    assert not list(out.glob("rows/*/params")) and not list(out.glob("rows/*.partial"))


def test_nothing_is_computed_twice_and_the_model_itself_is_measured_once(finished, study, calls):
    out, result = finished
    again = run_study(study, out)
    assert not calls
    for name in ("RTN", "GPTQ"):
        assert perplexities(again, name) == perplexities(result, name)


def test_a_study_along_a_label_leaves_curves_and_can_go_on(study, tmp_path, calls):
    rows = [
        dataclasses.replace(row, labels={"bits": "3"}, repeats=())
        for row in study.rows
        if row.name != "odd"
    ]
    changed = dataclasses.replace(study, rows=tuple(rows), along="bits")
    run_study(changed, tmp_path, only=["RTN"])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    calls.clear()
    run_study(changed, tmp_path)
    assert calls == [rows[1].recipe, "evaluate"]


def test_only_a_changed_row_is_computed(finished, study, calls):
    out, _ = finished
    changed, notes = with_settings(study, ["steps.0.act_order=false"])
    result = run_study(changed, out, only=["GPTQ"])
    assert notes == ["steps.0.act_order=false is no setting of RTN, odd"]
    assert [c for c in calls if c != "evaluate"] == [r for _, r in changed.rows[1].runs()]
    assert calls.count("evaluate") == 2  # after each run; before them it was known
    assert perplexities(result, "RTN")
    calls.clear()
    run_study(study, out, only=["RTN"], again=True)
    assert calls == [study.rows[0].recipe, "evaluate"]


class Kill(BaseException):
    pass


def test_a_killed_study_continues_at_the_block_and_with_the_next_row(
    finished, study, tmp_path, monkeypatch
):
    visited, solve = [], gptq.solve_block

    def killed_in_the_second_run(cfg, step):
        visited.append(step.index)
        if len(visited) == 5:
            raise Kill
        return solve(cfg, step)

    monkeypatch.setattr(gptq, "solve_block", killed_in_the_second_run)
    with pytest.raises(Kill):
        run_study(study, tmp_path)
    table = (tmp_path / "study.md").read_text()
    assert re.search(r"\| RTN .*\d", table) and "GPTQ" in table
    (plan,) = plan_study(study, tmp_path, only=["GPTQ"])
    assert plan["state"] == "1 of 2 done, continues after 1 finished blocks"
    result = run_study(study, tmp_path)
    assert visited == [0, 1, 2, 0, 1, 1, 2]
    assert perplexities(result, "GPTQ") == perplexities(finished[1], "GPTQ")


def test_a_failing_row_says_why_and_the_others_go_on(finished):
    out, result = finished
    (run,) = result["rows"][2]["runs"]
    assert "in_ch=32 is not a multiple of group_size=5" in run["error"]
    table = (out / "study.md").read_text()
    assert re.search(r"\| odd .*\| +failed \|", table)
    assert "- odd failed: block 0, attn.q: in_ch=32" in table


def test_a_row_that_fails_late_is_tried_again(finished, study, tmp_path, monkeypatch, calls):
    def broken(*_):
        raise ValueError("the loss is nan\nor so")

    run_study(study, tmp_path, only=["odd"])  # measures the model itself
    with monkeypatch.context() as patch:
        patch.setattr(job, "evaluate", broken)
        result = run_study(study, tmp_path, only=["RTN"])
    assert result["rows"][0]["runs"][0]["error"] == "the loss is nan or so"
    assert run_study(study, tmp_path, only=["odd"])["rows"][0]["runs"][0]["error"]
    result = run_study(study, tmp_path, only=["RTN"])
    assert perplexities(result, "RTN") == perplexities(finished[1], "RTN")


def test_seeds_are_a_mean_a_deviation_and_every_value(finished):
    out, result = finished
    values = perplexities(result, "GPTQ")
    assert len(set(values)) == 2
    mean, deviation = sum(values) / 2, abs(values[0] - values[1]) / 2**0.5
    table = (out / "study.md").read_text()
    assert f"{mean:.1f} ± {deviation:.2g}" in table
    assert f"calib.seed = 0, 1: perplexity text.txt @24 first 100 {values[0]:.1f}, " in table


def test_artefacts_are_kept_where_the_study_says_so(study, tmp_path):
    keeping = dataclasses.replace(study, keep_artefacts=True)
    run_study(keeping, tmp_path, only=["RTN"])
    (row,) = tmp_path.glob("rows/*")
    run_study(study, tmp_path, only=["RTN"])  # what was kept stays
    assert jaxcomp.load(row).model.config.d_model == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rows=()), "rows=.* must be a tuple of at least one StudyRow"),
        (dict(evals=()), "evals=.* measures nothing"),
        (dict(show=("taste",)), "'taste', which no evaluation gives; there is: .*: perplexity"),
        (dict(along="removed"), "along='removed' is a label of no row"),
        (
            dict(along="data"),
            "row 'RTN' has '–' for 'data', and what a study goes along are numbers",
        ),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(change, message, study, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_study(dataclasses.replace(study, **change), tmp_path)


def test_a_row_whose_settings_do_not_fit_is_refused_when_it_is_made():
    recipe = Recipe((RTN(),))
    with pytest.raises(ValueError, match=r"row 'a': steps\.0\.seed: RTN has no setting 'seed'"):
        StudyRow("a", recipe, repeats=("steps.0.seed=1",))
    with pytest.raises(ValueError, match="all rows are measured alike"):
        StudyRow("a", recipe, repeats=("evals.0.tokens=1",))
    with pytest.raises(ValueError, match="two rows are called 'a'"):
        Study("m", (StudyRow("a", recipe), StudyRow("a", recipe)), (Perplexity(),))
    with pytest.raises(ValueError, match=r"calib\.sample: .* did you mean samples\?"):
        calib = Recipe((RTN(),), CalibSpec())
        rows = {"without": recipe, "with": calib}
        with_settings(Study("m", rows, (Perplexity(),)), ["calib.sample=4"])


def test_a_foreign_directory_is_left_alone(study, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis\.tex and is no study"):
        run_study(study, tmp_path)


def test_the_command_runs_a_file_and_refuses_names_it_does_not_know(place, finished, tmp_path):
    out, result = finished
    file, text = tmp_path / "grid.py", place / "text.txt"
    file.write_text(
        "from jaxcomp import *\n"
        "def study():\n"
        f"    evals = (Perplexity({str(text)!r}, context=24, tokens=500, batch=2),)\n"
        f"    rows = {{'RTN': Recipe((RTN(QuantSpec(3)),))}}\n"
        f"    return Study({str(place / 'model')!r}, rows, evals)\n"
    )
    run = lambda *a: CliRunner().invoke(app, ["study", str(file), "-o", str(tmp_path / "out"), *a])  # noqa: E731
    wrong = run("--only", "RNT")
    assert wrong.exit_code == 2 and "did you mean 'RTN'? The rows are: RTN" in wrong.output
    assert "to do" in run("--dry-run").output and not (tmp_path / "out").exists()
    done = run("evals.0.tokens=100")
    assert done.exit_code == 0, done.output
    assert perplexities(json.loads((tmp_path / "out/study.json").read_text()), "RTN") == (
        perplexities(result, "RTN")
    )
    compared = CliRunner().invoke(
        app, ["compare", *map(str, out.glob("rows/*"))], env={"COLUMNS": "160"}
    )
    assert compared.exit_code == 0 and "GPTQ W3" in compared.output and "itself" in compared.output
    assert "no report" in CliRunner().invoke(app, ["compare", str(tmp_path)]).output
