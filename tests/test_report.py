import dataclasses
import io
import json

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from jaxcomp import artefact
from jaxcomp.core.quantize import QTensor
from jaxcomp.core.tree import named_leaves
from jaxcomp.report import (
    Report,
    Row,
    environment,
    from_json,
    plot_report,
    print_report,
    sizes,
    to_json,
)
from tests import heterogeneous


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


@pytest.mark.parametrize("without", ["", "sizes", "rows"])
def test_the_picture_shows_what_there_is(without, tmp_path):
    plot_report(report(**({without: ()} if without else {})), tmp_path / "report.png")
    picture = imread(tmp_path / "report.png")
    assert picture.shape[0] > 300 and picture[..., :3].mean() > 0.8  # on a light ground
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 10


def test_a_report_with_nothing_to_draw_has_no_picture(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_report(report(rows=(), sizes={}), tmp_path / "report.png")


def test_the_environment_names_versions_and_device():
    found = environment()
    assert found["jax"] and found["numpy"] == np.__version__ and "x" in found["device"]
    assert dataclasses.replace(report(), environment=found) is not None
