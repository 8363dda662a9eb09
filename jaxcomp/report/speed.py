"""What `jaxcomp bench` found, as tables and as a picture. The data is `jaxcomp.bench.bench`'s."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from jaxcomp.report.style import COLOURS, headline, picture
from jaxcomp.report.table import four_digits, plain_table


def speed_tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """Speed by batch, then memory by model."""
    settings, limit = found["settings"], found["bandwidth"]["limit"]
    title = (
        f"tokens/s of prompts of {settings['prompt']:,} and of {settings['new']:,} new tokens, "
        f"median of {settings['repeats']}; memory reads {limit / 1e9:.1f} GB/s"
    )
    columns = ("first, s", "prefill", "decode", "MB/step", "bandwidth")
    table = plain_table(title, "batch", "model", *columns)
    table.columns[1].justify = "left"
    for i, batch in enumerate(settings["batches"]):
        for j, model in enumerate(found["models"]):
            run = model["runs"][i]
            table.add_row(
                str(batch) if j == 0 else "",
                escape(model["name"]),
                f"{run['first_token_s']:.3f}",
                four_digits(run["prefill_tokens_per_s"]),
                four_digits(run["decode_tokens_per_s"]),
                f"{run['step_bytes'] / 1e6:,.1f}",
                f"{run['share']:.0%}",
            )
        table.add_section()
    yield table
    yield _memory_table(found["models"])


def plot_speed(found: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Draws decode and prefill speed by batch and the memory of each model, as a PNG."""
    settings, models = found["settings"], found["models"]
    environment = found["environment"]
    batches = settings["batches"]
    width = 2.4 + 0.42 * len(models) * len(batches)
    with picture(path, 2 * width + 2.2 + 0.8 * len(models), 4.4) as figure:
        ratios = [width, width, 2.2 + 0.8 * len(models)]
        left, middle, right = figure.subplots(1, 3, width_ratios=ratios)
        shares = [[f"{run['share']:.0%}" for run in model["runs"]] for model in models]
        _draw_bars(left, found, "decode_tokens_per_s", shares)
        left.set_title("decode, tokens/s (share of bandwidth)")
        _draw_bars(middle, found, "prefill_tokens_per_s")
        middle.set_title("prefill, tokens/s")
        _draw_memory(right, models)
        handles = left.get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower left", ncols=min(len(models), 4), fontsize=8.5)
        headline(
            figure,
            f"{models[0]['name']} on {environment['processor']}",
            f"{environment['usable_cores']} cores, {environment['device']}, jax "
            f"{environment['jax']}, {environment['date'][:10]}; prompts of {settings['prompt']} "
            f"tokens, {settings['new']} new; memory gives {found['bandwidth']['limit'] / 1e9:.1f} "
            "GB/s",
        )


def memory_above(model: Mapping[str, Any]) -> int:
    """Peak bytes of a model's process above what its imports took."""
    return model["peak_rss_bytes"] - model["baseline_rss_bytes"]


def _memory_table(models: list[Mapping[str, Any]]) -> Table:
    columns = ("weights read", "held after loading", "peak", "imports alone")
    table = plain_table("memory, MB; held and peak are above what the imports took", "model")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for model in models:
        base = model["baseline_rss_bytes"]
        sizes = (
            model["weight_bytes"],
            model["loaded_rss_bytes"] - base,
            memory_above(model),
            base,
        )
        table.add_row(escape(model["name"]), *(f"{size / 1e6:,.0f}" for size in sizes))
    return table


def _draw_bars(axis: Any, found: Mapping[str, Any], key: str, notes: Any = None) -> None:
    models, batches = found["models"], found["settings"]["batches"]
    each = 0.8 / len(models)
    for i, model in enumerate(models):
        places = [j + each * (i - (len(models) - 1) / 2) for j in range(len(batches))]
        values = [run[key] for run in model["runs"]]
        axis.bar(places, values, each * 0.92, color=COLOURS[i % len(COLOURS)], label=model["name"])
        for j, (x, value) in enumerate(zip(places, values, strict=True)):
            text = _short(value) + (f"\n{notes[i][j]}" if notes else "")
            _above(axis, x, value, text)
    axis.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axis.margins(y=0.2)
    axis.grid(axis="y")


def _draw_memory(axis: Any, models: list[Mapping[str, Any]]) -> None:
    for i, model in enumerate(models):
        peak = memory_above(model) / 1e6
        axis.bar(i, peak, 0.6, color=COLOURS[i % len(COLOURS)], alpha=0.45)
        axis.bar(i, model["weight_bytes"] / 1e6, 0.6, color=COLOURS[i % len(COLOURS)])
        _above(axis, i, peak, f"{peak:,.0f}")
    axis.set_xticks([])
    axis.margins(y=0.12)
    axis.set_title("peak memory, MB\n(dark: weights)")
    axis.grid(axis="y")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _above(axis: Any, x: float, y: float, text: str) -> None:
    options = dict(ha="center", va="bottom", fontsize=7.5, textcoords="offset points")
    axis.annotate(text, (x, y), (0, 2), **options)
