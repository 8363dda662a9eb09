"""`jaxcomp compare`: finished artefacts side by side."""

from typing import Annotated

import typer

from jaxcomp.commands.common import Traceback, console, plain_errors

EPILOG = (
    "[bold]Examples[/]\n\n"
    "jaxcomp compare out again/report.json\n\n"
    "jaxcomp compare grid/rows/*    [dim]# the rows of a study[/]"
)


def run(
    reports: Annotated[
        list[str], typer.Argument(metavar="REPORT", help="Artefacts, or report.json files.")
    ],
    traceback: Traceback = False,
) -> None:
    """Show finished artefacts side by side: method, evaluations, bits, time, memory."""
    with plain_errors(traceback):
        from jaxcomp.studies import compare_reports
        from jaxcomp.studies.table import result_table

        lines, numbers, notes = compare_reports(reports)
        console.print(result_table(lines, numbers), highlight=False)
        for note in notes:
            console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
