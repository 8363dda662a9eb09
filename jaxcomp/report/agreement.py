"""Two models side by side: what `jaxcomp compare` shows of them, as tables and as a picture.

The data is plain: `next_token` (`jaxcomp.evals.Agreement`), `depth` (that of
`jaxcomp.calibrate.comparison`) and `tasks` (name → `jaxcomp.evals.choice.flips`), each of which may
be absent; `teacher` and `student` name the models.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from jaxcomp.report.depth import draw_depth, has_depth
from jaxcomp.report.style import AFTER, headline, picture, plain_ticks, short_name
from jaxcomp.report.table import number_text, plain_table

DRIFTING = 5  # blocks that the table points out
TICKS = [10.0**e for e in range(-9, 3)]


def agreement_tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """The tables of what there is."""
    if "next_token" in found:
        yield _next_token_table(found["next_token"])
    if "median" in found.get("depth", {}):
        yield _drift_table(found["depth"])
    if found.get("tasks"):
        yield _flip_table(found["tasks"])


def drifting_blocks(depth: Mapping[str, Any], count: int | None = None) -> list[int]:
    """Blocks in the order of the error that each adds by itself, the largest first."""
    local = depth["local"][1:]  # the first is of the embedding
    return sorted(range(len(local)), key=lambda i: -local[i])[:count]


def plot_agreement(found: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Draws the error along depth and the KL divergence along the position, as a PNG.

    Raises:
      ValueError: there is no `next_token` to draw.
    """
    if "next_token" not in found:
        raise ValueError("there is nothing to draw: the models were not run on a text")
    next_token, depth = found["next_token"], found.get("depth", {})
    panels = 2 if has_depth(depth) else 1
    with picture(path, 5.4 * panels + 0.6, 4.2) as figure:
        axes = figure.subplots(1, panels, squeeze=False)[0]
        if panels == 2:
            draw_depth(axes[0], depth)
            axes[0].set_title("hidden states")
        _draw_positions(axes[-1], next_token["kl_by_position"])
        headline(
            figure,
            f"{short_name(found['student'])} against {short_name(found['teacher'])}",
            f"next token, {next_token['tokens']:,} predictions: KL {next_token['kl']['mean']:.3g} "
            f"nats on average, {next_token['kl']['p99']:.3g} at 99 %; the same first choice "
            f"{next_token['top1']:.1%} of the time",
        )


def _draw_positions(axis: Any, pieces: list[Mapping[str, Any]]) -> None:
    shown = [(piece["from"], piece["to"], piece["mean"]) for piece in pieces if piece["mean"] > 0]
    for low, high, mean in shown:
        axis.plot([low, high + 1], [mean, mean], color=AFTER, linewidth=2.2)
    axis.plot(
        [(low * (high + 1)) ** 0.5 for low, high, _ in shown],
        [mean for *_, mean in shown],
        color=AFTER,
        linewidth=0.8,
        alpha=0.5,
    )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    if shown:
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.set_ylim(low / 1.3, high * 1.3)
        plain_ticks(axis, [t * m for t in TICKS for m in (1, 2, 5)])
    axis.set_title("next token")
    axis.set_xlabel("tokens seen before the prediction")
    axis.set_ylabel("mean KL divergence, nats")
    axis.grid(axis="y")


def _next_token_table(next_token: Mapping[str, Any]) -> Table:
    table = plain_table(f"next token, {next_token['tokens']:,} predictions", "", "")
    for key, name in (("mean", "mean"), ("median", "median"), ("p99", "99 %"), ("max", "maximum")):
        table.add_row(f"KL(teacher ‖ student), {name}, nats", number_text(next_token["kl"][key]))
    table.add_row("same first choice", f"{next_token['top1']:.2%}")
    table.add_section()
    perplexity = next_token["perplexity"]
    for key, name in (("teacher", "perplexity, teacher"), ("student", "perplexity, student")):
        table.add_row(name, number_text(perplexity[key]))
    table.add_row("ratio", number_text(perplexity["ratio"]))
    return table


def _drift_table(depth: Mapping[str, Any]) -> Table:
    title = f"relative error of the hidden states, the {DRIFTING} blocks that add most"
    table = plain_table(title, "behind block", "by itself", "with all before it")
    for i in drifting_blocks(depth, DRIFTING):
        table.add_row(str(i), *(number_text(float(depth[k][i + 1])) for k in ("local", "median")))
    table.add_section()
    end = depth["median"][-1]
    half = next(i for i, error in enumerate(depth["median"]) if error >= end / 2)
    table.add_row(f"{half - 1} (half of the end)", "", number_text(float(depth["median"][half])))
    table.add_row(f"{len(depth['median']) - 2} (the end)", "", number_text(float(end)))
    return table


def _flip_table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = ("teacher", "student", "lost", "won", "same answer", "items")
    table = plain_table("accuracy, and items lost (right → wrong) and won", "", *columns)
    for name, flips in tasks.items():
        cells = (
            f"{flips['teacher']:.1%}",
            f"{flips['student']:.1%}",
            str(len(flips["right_to_wrong"])),
            str(len(flips["wrong_to_right"])),
            f"{flips['same_answer']:.1%}",
            str(flips["items"]),
        )
        table.add_row(escape(name.removeprefix("choice ")), *cells)
    return table
