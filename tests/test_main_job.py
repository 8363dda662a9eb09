"""The main job on a checkpoint made on the spot, whole, resumed after SIGKILL, and repeated."""

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import jaxcomp
from jaxcomp import artefact
from jaxcomp.core.quantize import QTensor, QuantSpec, dequantize
from jaxcomp.evals import Cost, Perplexity
from jaxcomp.methods import GPTQ, RTN
from jaxcomp.models.decoder import iter_blocks
from jaxcomp.recipe import CalibSpec, Recipe, load_recipe, recipe_to_json
from jaxcomp.report import from_json
from tests import tiny

BLOCKS = 8
DRIVER = """
import sys, jaxcomp
jaxcomp.compress(sys.argv[1], jaxcomp.load_recipe(sys.argv[2]), sys.argv[3])
"""
SHAPED_BY_TIME = ("started", "seconds", "peak_rss_bytes", "baseline_rss_bytes")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint, a text, a recipe of two steps, and what one run made of them."""
    place = tmp_path_factory.mktemp("job")
    key = jax.random.key(0)
    tiny.checkpoint("qwen2", key, place / "model", shards=2, num_hidden_layers=BLOCKS)
    rng = random.Random(0)
    words = " ".join(tiny.SENTENCES).split()
    (place / "text.txt").write_text(" ".join(rng.choice(words) for _ in range(400)))
    (place / "recipe.json").write_text(json.dumps(recipe_to_json(recipe(place))))
    report = jaxcomp.compress(place / "model", recipe(place), place / "out")
    assert report.rows
    return place


def recipe(place):
    text = str(place / "text.txt")
    return Recipe(
        steps=(
            GPTQ(weight=QuantSpec(bits=3, group_size=16, symmetric=False)),
            RTN(weight=None, act=QuantSpec(8, granularity="token", dynamic=True)),
        ),
        calib=CalibSpec(text, samples=6, length=24, batch=3),
        evals=(Perplexity(text, context=24, tokens=230, batch=2),),
    )


def report_of(out):
    """The report without what depends on the hour and the machine's load."""
    data = artefact.read_json(out, "report.json")
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in data["rows"]]
    return {k: v for k, v in data.items() if k not in SHAPED_BY_TIME} | {"rows": rows}


def dense(model):
    """The model with every weight multiplied out, float32."""

    def block(b):
        return jax.tree.map(
            lambda x: dequantize(x) if isinstance(x, QTensor) else x,
            b,
            is_leaf=lambda x: isinstance(x, QTensor),
        )

    return model.replace(blocks=tuple(map(block, iter_blocks(model))))


def test_the_artefact_has_the_perplexity_of_the_fake_quantized_model(place):
    loaded = jaxcomp.load(place / "out")
    assert all(isinstance(b.ffn.down.w, QTensor) for b in loaded.model.blocks)
    evals = recipe(place).evals
    (packed,) = jaxcomp.evaluate(loaded, evals).values()
    fake = dataclasses.replace(loaded, model=dense(loaded.model))
    assert not any(isinstance(b.ffn.down.w, QTensor) for b in fake.model.blocks)
    (simulated,) = jaxcomp.evaluate(fake, evals).values()
    assert packed["perplexity"] == pytest.approx(simulated["perplexity"], rel=1e-3)
    (reported,) = from_json(artefact.read_json(place / "out", "report.json")).evals_after.values()
    assert packed["perplexity"] == pytest.approx(reported["perplexity"], rel=1e-5)
    assert reported["tokens"] == 230


def test_the_artefact_has_the_same_perplexity_in_integers_and_through_its_cache(place):
    loaded = jaxcomp.load(place / "out", lazy=True, integer=True)
    evaluation = dataclasses.replace(recipe(place).evals[0], through_cache=7)
    found = jaxcomp.evaluate(loaded, [evaluation])[evaluation.name]
    report = from_json(artefact.read_json(place / "out", "report.json"))
    simulated = report.evals_after[recipe(place).evals[0].name]
    assert found["nll"] == pytest.approx(simulated["nll"], rel=1e-3)
    assert found["tokens"] == simulated["tokens"] and found["bits_per_cached_value"] == 32


def test_the_report_has_rows_sizes_and_numbers_before_and_after(place):
    report = from_json(artefact.read_json(place / "out", "report.json"))
    linears = [(r.block, r.linear) for r in report.rows if r.step == "GPTQ" and r.linear]
    assert len(linears) == len(set(linears)) == 7 * BLOCKS
    whole = [(r.step, r.block) for r in report.rows if r.linear is None]
    assert whole == [(step, i) for step in ("GPTQ", "RTN") for i in range(BLOCKS)]
    assert all(
        r.metrics["error_after"] < r.metrics["error_before"] for r in report.rows if r.linear
    )
    assert all(r.seconds > 0 for r in report.rows if r.linear is None)
    (before,), (after,) = report.evals_before.values(), report.evals_after.values()
    assert before["perplexity"] != after["perplexity"] and math.isfinite(after["nll"])
    assert 3 < report.sizes["bits_per_weight"] < 3 + 40 / 16 + 1e-6  # scale and zero a group
    assert report.peak_rss_bytes >= report.baseline_rss_bytes > 0 and report.started
    assert set(report.seconds) >= {"0: GPTQ", "1: RTN"}


def test_the_artefact_holds_recipe_tokenizer_and_config_and_nothing_is_left_beside_it(place):
    assert load_recipe(place / "out" / "recipe.json") == recipe(place)
    for name in ("report.json", "config.json", "tokenizer/tokenizer.json"):
        assert (place / "out" / name).stat().st_size > 0
    assert {p.name for p in (place / "out").glob("*.png")} == {
        "report.png",
        "depth.png",
        "flatness.png",
    }
    assert not list(place.glob("*.partial")) and not list(place.glob(".*"))
    text = "The Moon is the 5th ocean"
    encoded = [jaxcomp.load(place / source).encode(text) for source in ("model", "out")]
    np.testing.assert_array_equal(*encoded)


def test_an_artefact_generates(place):
    loaded, pieces = jaxcomp.load(place / "out"), []
    text = jaxcomp.generate(loaded, "The Atlantic", max_tokens=5, on_text=pieces.append)
    assert isinstance(text, str) and text.startswith("".join(pieces))


def test_a_recipe_read_from_its_own_json_gives_the_same_bits(place):
    again = load_recipe(place / "out" / "recipe.json")
    jaxcomp.compress(place / "model", again, place / "again")
    assert artefact.leaf_hashes(place / "again") == artefact.leaf_hashes(place / "out")
    assert report_of(place / "again") == report_of(place / "out")


def test_an_artefact_is_a_source_like_any_other(place):
    rounded = Recipe(steps=(RTN(weight=None, kv=QuantSpec(8, granularity="head", dynamic=True)),))
    report = jaxcomp.compress(place / "out", rounded, place / "further")
    first, second = (artefact.leaf_hashes(place / name) for name in ("out", "further"))
    assert first == second  # a dynamic quantizer has no leaves
    assert {"k_cache", "attn_in"} <= jaxcomp.load(place / "further").model.blocks[0].sites.keys()
    assert not report.evals_before and report.recipe["calib"] is None


def test_an_older_artefact_is_replaced_only_when_asked(place):
    rounded, out = Recipe(steps=(RTN(),)), place / "twice"
    jaxcomp.compress(place / "model", rounded, out)
    before = artefact.leaf_hashes(out)
    with pytest.raises(ValueError, match=r"twice holds an artefact already; use overwrite=True"):
        jaxcomp.compress(place / "model", rounded, out)
    jaxcomp.compress(place / "model", Recipe(steps=(RTN(QuantSpec(2)),)), out, overwrite=True)
    assert artefact.leaf_hashes(out) != before


def test_cost_measures_a_compressed_model(place):
    loaded = jaxcomp.load(place / "out")
    (cost,) = jaxcomp.evaluate(loaded, (Cost(prompt=24, new=3, repeats=1),)).values()
    size = artefact.read_json(place / "out", "report.json")["sizes"]
    assert cost["bytes"] == size["total_bytes"]
    assert cost["bits_per_weight"] == pytest.approx(size["bits_per_weight"])
    assert min(cost["prefill_tokens_per_s"], cost["decode_tokens_per_s"]) > 0


class Interrupt(Exception):
    pass


def interrupt_at(monkeypatch, block):
    """Makes the GPTQ step fail at `block`, once it gets there."""
    from jaxcomp.methods import gptq

    solve = gptq.solve_block

    def solve_or_fail(cfg, step):
        if step.index == block:
            raise Interrupt
        return solve(cfg, step)

    monkeypatch.setattr(gptq, "solve_block", solve_or_fail)


@pytest.mark.parametrize("change", ["recipe", "calibration", "model"])
def test_unfinished_work_of_another_run_is_refused_and_can_be_discarded(
    change, place, tmp_path, monkeypatch
):
    source, text, out = (tmp_path / name for name in ("model", "text.txt", "out"))
    small = Recipe(steps=(GPTQ(),), calib=CalibSpec(str(text), 4, 24, batch=4))
    text.write_text((place / "text.txt").read_text())
    tiny.checkpoint("qwen2", jax.random.key(0), source)
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 1)
        jaxcomp.compress(source, small, out)
    assert not out.exists() and (tmp_path / "out.partial" / "step.0" / "state.json").exists()
    if change == "recipe":
        small = dataclasses.replace(small, steps=(GPTQ(damp=0.02),))
    elif change == "calibration":
        text.write_text(text.read_text()[9:])
    else:
        tiny.checkpoint("qwen2", jax.random.key(1), source)
    with pytest.raises(
        ValueError, match=rf"out\.partial .*other: {change}\).*resume=False \(--no-resume\)"
    ):
        jaxcomp.compress(source, small, out)
    jaxcomp.compress(source, small, out, resume=False)
    assert artefact.is_artefact(out) and not (tmp_path / "out.partial").exists()


def test_work_in_which_no_block_is_finished_gives_way_to_a_changed_recipe(
    place, tmp_path, monkeypatch
):
    calib = CalibSpec(str(place / "text.txt"), 4, 24, batch=4)
    tiny.checkpoint("qwen2", jax.random.key(0), tmp_path / "model")
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 0)
        jaxcomp.compress(tmp_path / "model", Recipe((GPTQ(damp=0.5),), calib), tmp_path / "out")
    assert (tmp_path / "out.partial" / "run.json").exists()
    jaxcomp.compress(tmp_path / "model", Recipe((GPTQ(),), calib), tmp_path / "out")
    assert artefact.is_artefact(tmp_path / "out")


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_that_only_looks_like_unfinished_work_is_left_alone(resume, place, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"out\.partial exists and is not unfinished work"):
        jaxcomp.compress(place / "model", Recipe((RTN(),)), tmp_path / "out", resume=resume)
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "mine"


def start(place, out, cache):
    environment = {**os.environ, "JAXCOMP_CACHE": str(cache)}
    command = [sys.executable, "-c", DRIVER, place / "model", place / "recipe.json", out]
    return subprocess.Popen(command, env=environment, cwd=os.getcwd())


def blocks_done(partial, step=0):
    try:
        return json.loads((partial / f"step.{step}" / "state.json").read_text())["done"]
    except FileNotFoundError:
        return 0


def kill_when(process, condition, limit=120.0):
    """SIGKILL as soon as `condition()`; True if the process did not end by itself before."""
    end = time.monotonic() + limit
    while process.poll() is None and not condition():
        assert time.monotonic() < end, "the run neither ended nor came this far"
        time.sleep(0.002)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


def test_a_run_killed_in_several_blocks_ends_like_one_that_was_not(place, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    rng = random.Random()  # another set of moments in every run; the claim holds for all
    moments = sorted(rng.sample(range(1, BLOCKS), 3))
    for wanted in moments:
        process = start(place, out, tmp_path / "cache")
        assert kill_when(process, lambda: blocks_done(partial) >= wanted)  # noqa: B023
        assert not out.exists() and blocks_done(partial) >= wanted
    process, begun = start(place, out, tmp_path / "cache"), time.monotonic()
    wait = rng.uniform(0, 8)
    kill_when(process, lambda: time.monotonic() > begun + wait)
    if not out.exists():
        done = blocks_done(partial)
        process = start(place, out, tmp_path / "cache")
        assert process.wait() == 0, (moments, wait, done)
    assert artefact.leaf_hashes(out) == artefact.leaf_hashes(place / "out"), (moments, wait)
    assert artefact.read_json(out, "recipe.json") == artefact.read_json(
        place / "out", "recipe.json"
    )
    assert report_of(out) == report_of(place / "out"), (moments, wait)
    assert not partial.exists()
