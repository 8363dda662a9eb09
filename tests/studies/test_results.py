import json

from jaxcomp.evals import Cost, Perplexity
from jaxcomp.recipe import Recipe, recipe_to_json
from jaxcomp.report import Report, to_json
from jaxcomp.studies import compare_reports
from jaxcomp.studies.curves import curve, near_and_far, plot_curves
from jaxcomp.studies.results import Line, Number, choose_numbers, named_now, with_retained

SHORT, LONG = Perplexity("a.txt", tokens=99), Perplexity("a.txt", tokens=99, through_cache=8)


def recipe(*evals):
    return recipe_to_json(Recipe(evals=evals))


def test_numbers_of_an_older_report_get_the_names_of_today():
    old = {
        "perplexity a.txt @1024": {"perplexity": 9.0},
        "perplexity a.txt @1024 by 8 through the cache": {"perplexity": 8.0},
        "cost": {"bytes": 1},
    }
    now = named_now(old, recipe(SHORT, LONG, Cost()))
    assert list(now) == [SHORT.name, LONG.name, "cost"]
    assert list(now.values()) == list(old.values()) and named_now(now, recipe(SHORT, LONG)) == now


def test_of_evaluations_that_had_one_name_the_last_is_what_is_there():
    first, last = Perplexity("a.txt", tokens=5), Perplexity("a.txt", stride=8)
    (name,) = named_now({"perplexity a.txt @1024": {}}, recipe(first, last))
    assert name == last.name


def test_what_cannot_be_read_keeps_its_name():
    old = {"perplexity a.txt @1024": {}, "taste": {}}
    assert named_now(old, {"evals": [{"class": "Taste"}]}) == old == named_now(old, {})


def test_an_old_report_and_a_new_one_share_a_column(tmp_path):
    for file, name in (("old.json", "perplexity a.txt @1024"), ("new.json", SHORT.name)):
        numbers = {name: {"perplexity": 9.0}}
        report = Report("m", recipe(SHORT), evals_before=numbers, evals_after=numbers)
        (tmp_path / file).write_text(json.dumps(to_json(report)))
    lines, numbers, _ = compare_reports([tmp_path / "old.json", tmp_path / "new.json"])
    assert len(numbers) == 1 and len(lines) == 3
    assert all(line.values[numbers[0]] == (9.0,) for line in lines)


def test_what_is_retained_is_the_mean_of_the_ratios():
    itself = {"choice a": {"accuracy": 0.8}, "choice b": {"accuracy": 0.2}, "cost": {"bytes": 1}}
    found = {"choice a": {"accuracy": 0.4}, "choice b": {"accuracy": 0.2}, "cost": {"bytes": 1}}
    assert with_retained(found, itself)["retained"] == {"retained": 0.75}  # not 0.6 / 1.0
    assert with_retained(itself, itself)["retained"] == {"retained": 1.0}
    assert with_retained({"cost": {"bytes": 1}}, itself) == {"cost": {"bytes": 1}}
    assert choose_numbers(("retained",), with_retained(itself, itself))[0].heading == "retained"


def test_curves_go_along_the_numbers_of_a_label(tmp_path):
    loss, speed = Number("perplexity", "perplexity"), Number("cost", "tokens_per_s")

    def line(name, group, removed, *values):
        labels = {} if removed is None else {"removed": removed}
        values = {n: (v,) for n, v in zip((loss, speed), values, strict=False)}
        return Line(name, group, labels, values)

    lines = [line("dense", "", None, 20.0, 30.0), line("no label", "a", None, 1.0, 1.0)]
    lines += [line(f"a{n}", "a", n, 20.0 * 2 ** float(n), 30.0) for n in ("3", "10", "5")]
    lines += [line("b", "b", "3", float("inf"), 31.0), line("failed", "b", "5")]
    found = curve([line for line in lines if "removed" in line.labels], "a", loss, "removed")
    assert [x for x, _ in found] == [3, 5, 10]
    near, far = near_and_far([(3, 20.0), (5, 1e9), (8, float("nan"))], 20.0)
    assert near == [(3, 20.0)] and [x for x, _ in far] == [5, 8]
    assert near_and_far([(3, 1e9)], float("nan")) == ([(3, 1e9)], [])
    plot_curves(lines, [loss, speed], "removed", tmp_path / "curves.png", "two panels")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
