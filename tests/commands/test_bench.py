import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image
from typer.testing import CliRunner

import jaxcomp
from jaxcomp import artefact, bench
from jaxcomp.__main__ import app
from jaxcomp.bench import Contender
from jaxcomp.core.quantize import QuantSpec
from jaxcomp.evals import speed
from jaxcomp.methods import RTN
from jaxcomp.models.prepare import prepare
from jaxcomp.models.sizes import cache_sizes, sizes
from jaxcomp.recipe import Recipe
from jaxcomp.report.speed import plot_speed, speed_tables
from tests import heterogeneous, tiny

SMALL = dict(batches=(1, 2), prompt=8, new=3, repeats=2, stream_bytes=1 << 20)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("bench")
    tiny.checkpoint("llama", jax.random.key(0), place / "model")
    recipe = Recipe(steps=(RTN(QuantSpec(bits=4, group_size=8)),))
    jaxcomp.compress(place / "model", recipe, place / "out", compare=False)
    return place


@pytest.fixture(scope="module")
def found(place):
    contenders = [Contender(str(place / name), name) for name in ("out", "model")]
    return bench.bench(contenders, **SMALL)


def test_two_models_take_turns_and_are_measured_alike(found):
    small, large = found["models"]
    assert (small["name"], large["name"]) == ("out", "model")
    assert 0 < small["weight_bytes"] < large["weight_bytes"]
    for model in found["models"]:
        assert [run["batch"] for run in model["runs"]] == [1, 2]
        assert model["peak_rss_bytes"] >= model["loaded_rss_bytes"] > 1e8
        for run in model["runs"]:
            values = run["values"]["step_s"]
            assert len(values) == 2 and run["step_s"] == pytest.approx(np.median(values))
            assert run["decode_tokens_per_s"] > 0 and run["compile_s"] > 0
            limit = found["bandwidth"]["limit"]
            assert run["share"] == pytest.approx(run["step_bytes"] / run["step_s"] / limit)
    assert found["bandwidth"]["limit"] == max(found["bandwidth"].values()) > 1e8
    assert found["environment"]["usable_cores"] >= 1 and found["environment"]["jax"]


def test_what_was_found_is_shown_and_drawn(found, tmp_path):
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    for table in speed_tables(found):
        console.print(table)
    text = console.export_text()
    for word in ("out", "model", "decode", "MB/step", "bandwidth", "peak", "memory reads"):
        assert word in text
    plot_speed(json.loads(json.dumps(found)), tmp_path / "speed.png")
    assert image.imread(tmp_path / "speed.png").std() > 0.05


def test_bytes_of_a_step_are_those_of_the_weights_it_reads_and_of_the_cache():
    model = tiny.model("mistral", jax.random.key(0))
    work = speed.Workload(batch=3, prompt=10, new=4)
    size, cache = sizes(model), cache_sizes(model, 12)["cache_bytes"]
    read = size["blocks_bytes"] + size["head_bytes"]
    assert speed.weight_bytes(model) == read
    assert speed.step_bytes(model, work) == read + 3 * cache
    tied = prepare(tiny.model("llama", jax.random.key(0)))
    size = sizes(tiny.model("llama", jax.random.key(0)))
    assert speed.weight_bytes(tied) == size["total_bytes"]
    assert speed.leaf_bytes(jnp.zeros((3, 5), jnp.int4)) == 8


def test_the_dense_model_is_found_through_all_artefacts_that_were_made_from_it(place, tmp_path):
    report = {"source": str(place / "out")}
    artefact.save(heterogeneous.model(), tmp_path / "further", report=report)
    assert bench.dense_source(str(tmp_path / "further")) == str(place / "model")
    assert bench.dense_source(str(place / "model")) is None


def test_what_goes_wrong_in_a_process_is_said_with_its_name():
    with pytest.raises(ValueError, match=r"broken: 'no/such/x' is no checkpoint"):
        bench.bench([Contender("no/such/x", "broken")], **SMALL)


def test_the_command_adds_the_dense_model_and_writes_files(place, found, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(bench, "bench", lambda *args: seen.append(args) or found)
    files = ["--json", tmp_path / "n.json", "--png", tmp_path / "n.png"]
    arguments = ["bench", place / "out", "--batch", 2, "--new", 5, *files]
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    (contenders, batches, prompt, new, repeats, _) = seen[0]
    assert [c.source for c in contenders] == [str(place / "out"), str(place / "model")]
    assert (batches, prompt, new, repeats) == ([2], 512, 5, 3)
    assert json.loads((tmp_path / "n.json").read_text()) == found and (tmp_path / "n.png").exists()
    CliRunner().invoke(app, ["bench", str(place / "out"), "--no-dense"])
    assert [c.source for c in seen[1][0]] == [str(place / "out")]


@pytest.mark.parametrize("option", [["--new", "1"], ["--batch", "0"], ["--prompt", "0"]])
def test_what_cannot_be_timed_is_refused_before_a_model_is_read(option):
    result = CliRunner().invoke(app, ["bench", "absent", *option])
    assert result.exit_code == 2 and f"{option[0][2:]}={option[1]} is below" in result.output
