"""`jaxcomp compare`: finished runs by their reports, or two models by what they predict."""

import json
import pathlib
from typing import Annotated, Any

import typer

from jaxcomp.commands.common import Allow, Dtype, Traceback, console, plain_errors

EPILOG = (
    "[bold]Reports, without running anything[/]\n\n"
    "jaxcomp compare out again/report.json\n\n"
    "jaxcomp compare grid/rows/*    [dim]# the rows of a study[/]\n\n"
    "[bold]Two models, the first of which is the teacher[/]\n\n"
    "jaxcomp compare demo:smollm2 out --logits --png drift.png\n\n"
    "jaxcomp compare demo:smollm2 out --logits --text my.txt --context 2048 --tokens 20000\n\n"
    "jaxcomp compare demo:smollm2 out --task arc_easy --task piqa --limit 200\n\n"
    "--logits gives the KL divergence of the next token, agreement, both perplexities, and the "
    "blocks that drift; --task the answers that changed. Both may be asked at once."
)


def run(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="REPORT… | TEACHER STUDENT",
            help="Artefacts or report.json files; with --logits or --task two models of any kind.",
        ),
    ],
    logits: Annotated[
        bool, typer.Option("--logits", help="Run both models on a text; compare their predictions.")
    ] = False,
    text: Annotated[str | None, typer.Option(help="Text for --logits. Default: wiki_eval.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens a window. Default: 1024.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Predictions to compare. Default: 8184.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="Multiple-choice task to ask both; may be repeated."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Items of a task, from a shuffle. Default: all.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of that shuffle. Default: 0.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Windows or choices at a time. Default: 1 or 16.")
    ] = None,
    png: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="FILE", help="Picture: drift along depth, KL along position."),
    ] = None,
    json_file: Annotated[
        pathlib.Path | None, typer.Option("--json", metavar="FILE", help="Also write the numbers.")
    ] = None,
    dtype: Dtype = None,
    allow_config: Allow = None,
    traceback: Traceback = False,
) -> None:
    """Show runs side by side by their reports, or two models by what they predict."""
    with plain_errors(traceback):
        ran = dict(text=text, context=context, tokens=tokens, png=png)
        asked = dict(limit=limit, seed=seed)
        _refuse_unused(ran, logits, "--logits")
        _refuse_unused(asked, bool(task), "--task")
        if not (logits or task):
            _refuse_unused(dict(batch=batch, json=json_file, dtype=dtype), False, "--logits")
            _show_reports(places)
            return
        if len(places) != 2:
            raise ValueError(
                f"--logits and --task compare 2 models, and {len(places)} are given; name the "
                "teacher and the student"
            )

        from jaxcomp import job
        from jaxcomp.evals import Agreement, Choice
        from jaxcomp.report.agreement import agreement_tables, plot_agreement

        given = lambda **options: {k: v for k, v in options.items() if v is not None}  # noqa: E731
        agreement = Agreement(**given(text=text, context=context, tokens=tokens, batch=batch))
        choices = [Choice(t, **given(**asked, batch=batch)) for t in task or []]
        models = [
            job.load(place, compute_dtype=dtype, lazy=True, allow_config=tuple(allow_config or ()))
            for place in places
        ]
        found = _side_by_side(models, agreement if logits else None, choices)
        for table in agreement_tables(found):
            console.print(table)
        if why := found.get("depth", {}).get("skipped"):
            console.print(f"no errors along depth: {why}", markup=False, highlight=False)
        if png:
            plot_agreement(found, png)
        if json_file:
            json_file.write_text(json.dumps(found, indent=2) + "\n")


def _show_reports(places: list[str]) -> None:
    from jaxcomp.studies import compare_reports
    from jaxcomp.studies.table import result_table

    try:
        lines, numbers, notes = compare_reports(places)
    except ValueError as error:
        hint = "; to run two models and compare what they predict, add --logits or --task"
        raise ValueError(f"{error}{hint if len(places) == 2 else ''}") from error
    console.print(result_table(lines, numbers), highlight=False)
    for note in notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)


def _side_by_side(models: list[Any], agreement: Any, choices: list[Any]) -> dict[str, Any]:
    """What `jaxcomp.report.agreement` shows of two models that were loaded."""
    from jaxcomp.calibrate import comparison
    from jaxcomp.data.corpora import load_text
    from jaxcomp.evals.agreement import check_same_tokens
    from jaxcomp.evals.choice import flips
    from jaxcomp.job import COMPARED_TOKENS
    from jaxcomp.progress import ConsoleProgress
    from jaxcomp.report import environment

    teacher, student = models
    progress = ConsoleProgress(console)

    def bars(name: str) -> Any:
        total = max(len(m.model.blocks) for m in models)
        return lambda blocks: progress.each(blocks, name, total)

    numbers = "\n".join(map(str, range(1000)))  # where there is no text, something that has tokens
    check_same_tokens(teacher, student, load_text(agreement.text).text if agreement else numbers)
    found: dict[str, Any] = {"teacher": teacher.source, "student": student.source}
    pair = teacher.model, student.model
    if agreement:
        found["next_token"] = {"name": agreement.name} | agreement(
            *pair, teacher.encode, bars("next token")
        )
        window = agreement.windows(teacher.model.config, teacher.encode).tokens[:1]
        depth = comparison.compare(*pair, window[:, :COMPARED_TOKENS], bars("depth")).depth
        found["depth"] = depth
    for choice in choices:
        answers = [choice.answers(m.model, m.encode, bars(choice.name)) for m in models]
        found.setdefault("tasks", {})[choice.name] = flips(*answers)
    return found | {"environment": environment()}


def _refuse_unused(options: dict[str, Any], used: bool, by: str) -> None:
    if not used and (odd := [name for name, value in options.items() if value is not None]):
        raise ValueError(f"--{odd[0]} is a setting of {by}, which is not given; add it")
