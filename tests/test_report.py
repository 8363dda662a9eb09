import dataclasses
import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from jaxcomp import artefact
from jaxcomp.core.quantize import QTensor, QuantSpec
from jaxcomp.core.site import ActQuantizer, Site
from jaxcomp.core.transforms import Diag, Hadamard, Kron
from jaxcomp.core.tree import named_leaves
from jaxcomp.report import (
    Report,
    Row,
    draw_pictures,
    environment,
    from_json,
    picture_names,
    plot_depth,
    plot_depths,
    plot_fit,
    plot_flatness,
    plot_report,
    print_report,
    sizes,
    to_json,
)
from jaxcomp.report.fit import fits, stages
from jaxcomp.report.html import render_html
from jaxcomp.report.structure import site_text
from jaxcomp.report.style import spread_apart
from tests import heterogeneous

CURVE = [1e-3, 2e-2, 3e-2, 0.4]


def report(**changes):
    rows = []
    for block in range(3):
        for i, kind in enumerate(("attn.q", "ffn.down")):
            error = 0.001 * (1 + block) * (1 + i)
            numbers = {"error_before": 2 * error, "error_after": error, "bits": 4, "damp": 0.01}
            rows.append(Row("GPTQ", block, kind, numbers))
        rows.append(Row("GPTQ", block, None, {}, 1.5))
    return Report(
        **{
            "source": "a [model]",
            "recipe": {"steps": []},
            "rows": tuple(rows),
            "evals_before": {"Perplexity": {"perplexity": 20.0, "tokens": 8184}},
            "evals_after": {"Perplexity": {"perplexity": 22.0, "tokens": 8184}},
            "sizes": sizes(heterogeneous.model()),
            "environment": environment(),
            "seconds": {"GPTQ": 4.5},
            "peak_rss_bytes": 2 * 10**9,
            "baseline_rss_bytes": 5 * 10**8,
        }
        | changes
    )


def printed(given, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    print_report(given, console)
    return console.export_text()


def test_a_report_survives_json():
    given = report()
    assert from_json(json.loads(json.dumps(to_json(given), allow_nan=False))) == given


def test_numbers_that_are_not_finite_survive_as_words():
    given = report(evals_after={"Perplexity": {"perplexity": float("inf")}})
    assert json.loads(json.dumps(to_json(given), allow_nan=False))["evals_after"] == {
        "Perplexity": {"perplexity": "inf"}
    }
    assert "inf" in printed(from_json(to_json(given)))


def test_unknown_and_missing_fields_of_a_report_are_named():
    with pytest.raises(ValueError, match="no field 'score'; its fields are source"):
        from_json({**to_json(report()), "score": 1})
    with pytest.raises(ValueError, match="lacks recipe"):
        from_json({"source": "x"})


def test_sizes_agree_with_the_bytes_of_the_arrays_and_read_nothing(tmp_path):
    model = heterogeneous.model()
    size = sizes(model)
    leaves = named_leaves(model)
    codes = {name: leaf for name, leaf in leaves.items() if name.endswith(".packed")}
    assert size["total_bytes"] == sum(leaf.nbytes for leaf in leaves.values())
    assert size["codes_bytes"] == sum(leaf.nbytes for leaf in codes.values())
    artefact.save(model, tmp_path / "out")
    lazy = artefact.load(tmp_path / "out", lazy=True)
    for data in (tmp_path / "out").glob("params/blocks.*/arrays/*"):
        data.unlink() if data.is_file() else None
    assert sizes(lazy) == size


def test_bits_per_weight_count_codes_scales_and_zero_points():
    model = heterogeneous.model()
    size = sizes(model)
    dense, four, three = size["block_bits"]
    d, hidden = heterogeneous.D, heterogeneous.HIDDEN
    assert dense == 0.0
    assert four == pytest.approx(4 + 32 / 8)  # groups of 8 share a float32
    weights = 2 * d * d + 2 * d * d // 2 + 3 * d * hidden
    columns = 2 * d + 2 * d // 2 + 2 * hidden + d
    assert three == pytest.approx(3 + (32 + 8) * columns / weights)
    stored = size["codes_bytes"] + size["scales_bytes"] + size["zero_points_bytes"]
    assert size["quantized_bits"] == pytest.approx(8 * stored / (2 * weights))


def test_a_model_without_quantized_weights_has_no_bits():
    model = heterogeneous.model()
    size = sizes(model.replace(blocks=model.blocks[:1]))
    assert size["quantized_weights"] == size["quantized_bits"] == size["codes_bytes"] == 0
    assert not any(isinstance(leaf, QTensor) for leaf in named_leaves(model.blocks[0]).values())
    assert "codes" not in printed(report(sizes=size))


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_show_every_block_the_evaluations_and_the_cost(width):
    text = printed(report(), width)
    assert "a [model]" in text and "GPTQ: relative output error" in text
    assert "6.0e-3" in text and "+10.0%" in text and "8,184" in text
    assert "GPTQ 4.5 s" in text and "peak memory 2.00 GB (1.50 GB above" in text
    assert "…" not in text


def test_reports_with_little_in_them_print_too():
    assert "x" in printed(Report("x", {}))
    rows = (Row("RTN", 0, "attn.q", {"weight_error": 0.1, "bits": 4}), Row("Prune", None, None, {}))
    text = printed(Report("x", {}, rows))
    assert "RTN: relative weight error" in text and "Prune" in text


def test_a_step_without_weights_shows_the_numbers_of_its_blocks_and_what_it_found():
    rows = (
        Row("Prune", 0, None, {"removed": 0, "score": 0.25, "curve": [1.0]}, 1.0),
        Row("Prune", 1, None, {"removed": 1, "score": 0.125}, 2.0),
        Row("Prune", None, None, {"metric": "bi", "margin": 0.5, "warning 1": "[too] close"}),
        Row("Rotate", 0, None, {}, 30.0),
        Row("Rotate", 1, None, {}, 31.0),
    )
    lines = [line.split() for line in printed(Report("x", {}, rows)).splitlines()]
    assert ["block", "removed", "score"] in lines
    assert ["0", "0.25"] in lines and ["1", "yes", "0.125"] in lines
    assert "Prune: metric bi · margin 0.5".split() in lines
    assert "Prune, warning: [too] close".split() in lines
    assert "Rotate 2 blocks in 61 s".split() in lines
    assert not any("curve" in line for line in lines)


def test_linears_outside_the_blocks_have_a_line_and_wide_tables_are_cut_with_a_word():
    rows = (
        Row("RTN", 0, "attn.q", {"weight_error": 0.1, "bits": 4}),
        Row("RTN", None, "embed and head", {"weight_error": 0.25, "bits": 8}),
        Row(
            "P[/x]",
            0,
            None,
            {f"a[/b]{'long' * 8}{i}": 1.0 for i in range(4)} | {"error_after": 0.5},
        ),
        Row("Whole", None, None, {"steps": 3}),
    )
    text = printed(Report("x", {}, rows), 100)
    lines = [line.split() for line in text.splitlines()]
    assert ["model", "2.5e-1", "8", "0.0"] in lines
    assert "error after" in text and "P[/x]" in text and "a[/b]long" in text
    assert "more numbers of every block are in report.json" in text
    assert lines.count(["Whole"]) == 0 and "Whole: steps 3".split() in lines


def comparison(**changes):
    channels = lambda top: {"flatness": 0.1 * top, "rms": 1.0, "channels": [top, 1.0, 0.5]}  # noqa: E731
    sides = {"before": channels(9.0), "after": channels(2.0)}
    entry = {"consumers": ["attn.q"], "activation": sides, "weight": sides}
    return {
        "tokens": 32,
        "depth": {"rotated": False, "median": CURVE, "energy": CURVE, "local": CURVE[::-1]},
        "output": {"kl": 0.2, "top1": 0.9},
        "flatness": [{"block": i, "site": site} | entry for i in (0, 2) for site in ("a", "b")],
    } | changes


def fit_rows(clips=True, errors=True):
    """Rows of a step that fitted two blocks."""
    rows = []
    for block in range(2):
        numbers = {"loss_curve": [0.3, 0.2, 0.1 + block]}
        if errors:
            numbers |= {"mse_rounding": 0.5, "mse_before": 0.3, "mse_after": 0.1}
        if clips:
            numbers |= {"clip_low:attn_in": 0.8, "clip_high:attn_in": 0.9 + 0.01 * block}
            rows.append(Row("Fit", block, "attn.q", {"clip_low": 0.9, "clip_high": 0.95}))
        rows.append(Row("Fit", block, None, numbers))
    return rows


def shown(path):
    """The picture at `path`: on a light ground, with something on it."""
    picture = imread(path)
    assert picture.shape[0] > 300 and picture[..., :3].mean() > 0.8
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 10
    return picture


@pytest.mark.parametrize("without", ["", "sizes", "rows"])
def test_the_picture_shows_what_there_is(without, tmp_path):
    plot_report(report(**({without: ()} if without else {})), tmp_path / "report.png")
    shown(tmp_path / "report.png")


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["report.png"]),
        ({"comparison": comparison()}, ["report.png", "depth.png", "flatness.png"]),
        ({"comparison": comparison(depth={"skipped": "n"})}, ["report.png", "flatness.png"]),
        ({"comparison": comparison(flatness=[])}, ["report.png", "depth.png"]),
        ({"rows": tuple(fit_rows()), "sizes": {}}, ["fit.png"]),
        ({"rows": tuple(fit_rows(clips=False))}, ["report.png", "fit.png"]),
        ({"rows": (), "sizes": {}}, []),
    ],
)
def test_a_report_has_the_pictures_it_has_numbers_for(changes, names, tmp_path):
    given = from_json(json.loads(json.dumps(to_json(report(**changes)))))
    paths = draw_pictures(given, tmp_path)
    assert [path.name for path in paths] == picture_names(given) == names
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    assert all(shown(path) is not None for path in paths)
    assert (f"pictures: {', '.join(names)}" in printed(given)) == bool(names)


@pytest.mark.parametrize("errors", [True, False])
@pytest.mark.parametrize("clips", [True, False])
def test_the_picture_of_a_fit_shows_what_was_recorded(clips, errors, tmp_path):
    rows = (*report().rows, *fit_rows(clips, errors))
    plot_fit(report(rows=rows), tmp_path / "fit.png")
    panels = 1 + errors + 2 * clips
    assert shown(tmp_path / "fit.png").shape[0] > 480 * ((panels + 1) // 2)


def test_steps_that_fitted_something_have_a_panel_each(tmp_path):
    search = Row("Search", None, None, {"loss_curve": [0.1, 0.2]})
    given = report(rows=(search, *fit_rows(clips=False, errors=False)))
    assert [*fits(given)] == ["Search", "Fit"]
    plot_fit(given, tmp_path / "two.png")
    plot_fit(report(rows=(search,)), tmp_path / "one.png")
    two, one = (shown(tmp_path / f"{name}.png") for name in ("two", "one"))
    assert two.shape[1] > 1.5 * one.shape[1]
    text = render_html(given)
    assert "Search: loss during the fit" in text and "Fit: loss during the fit" in text
    assert "did in Search, on the whole model; in Fit, block by block." in text


def test_the_picture_of_a_search_says_how_many_blocks_it_removes_when(tmp_path):
    curves = {"loss_curve": [0.1, 0.2, 0.2, 0.4], "removed_curve": [1.0, 2.0, 2.0, 4.0]}
    rows = (Row("Search", None, None, curves),)
    assert stages(rows) == {1: 1, 2: 2, 4: 4} and stages(fit_rows()) == {}
    plot_fit(report(rows=rows), tmp_path / "fit.png")
    assert "blocks removed at a time: 1 from record 1, 2 from record 2, 4 from" in render_html(
        report(rows=rows)
    )


def test_numbers_that_are_not_finite_leave_a_gap_in_a_picture(tmp_path):
    broken = comparison(output={"kl": math.nan, "top1": 0.0})
    broken["depth"] |= {"median": [0.0, 0.1, math.nan, math.inf], "local": [0.0] * 4}
    rows = (Row("Fit", 0, None, {"loss_curve": [0.1, math.nan, math.inf]}),)
    given = from_json(to_json(report(comparison=broken, rows=rows)))
    assert len(draw_pictures(given, tmp_path)) == 4


def test_several_runs_share_a_plot_and_those_without_a_curve_are_left_out(tmp_path):
    found, skipped = comparison()["depth"], {"skipped": "the models have 3 and 2 blocks"}
    plot_depths({"one": found, "two": found, "three": skipped}, tmp_path / "depths.png")
    shown(tmp_path / "depths.png")
    with pytest.raises(ValueError, match="none of these runs has errors along depth"):
        plot_depths({"three": skipped, "four": {}}, tmp_path / "none.png")


def test_labels_are_pushed_apart_no_further_than_needed():
    assert spread_apart([0.1, 0.5], 0.1) == pytest.approx([0.1, 0.5])
    assert spread_apart([0.3, 0.3, 0.31], 0.1) == pytest.approx([0.2033, 0.3033, 0.4033], abs=1e-3)
    assert spread_apart([], 0.1) == []


def test_a_report_with_nothing_to_draw_has_no_picture(tmp_path):
    empty = report(rows=(), sizes={})
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_report(empty, tmp_path / "report.png")
    for plot, words in ((plot_flatness, "no flatness"), (plot_fit, "no step of this report")):
        with pytest.raises(ValueError, match=words):
            plot(empty, tmp_path / "x.png")
    with pytest.raises(ValueError, match="along depth: the models have 3 and 2 blocks"):
        skipped = {"depth": {"skipped": "the models have 3 and 2 blocks"}}
        plot_depth(report(comparison=skipped), tmp_path / "x.png")


def test_older_reports_without_a_comparison_still_read():
    data = to_json(report())
    del data["comparison"]
    assert from_json(data).comparison == {}


def test_the_environment_names_versions_and_device():
    found = environment()
    assert found["jax"] and found["numpy"] == np.__version__ and "x" in found["device"]
    assert dataclasses.replace(report(), environment=found) is not None


def test_the_structure_names_transforms_and_grids():
    x = QuantSpec(bits=4, granularity="token", dynamic=True)
    site = Site(
        ActQuantizer(x, clip=jnp.ones(2)),
        (Diag(jnp.ones(24)), Kron(jnp.eye(4), jnp.eye(6)), Hadamard(4, 6), Kron(jnp.eye(4), None)),
    )
    found = site_text(site)
    assert (
        "Diag 24 → P4 ⊗ P6 → Hadamard 4 ⊗ I6 → P4 ⊗ I → [cyan]int4 per-token sym, clipped" in found
    )
    assert site_text(Site()) == "as it is"
