"""`jaxcomp report`: the page of a finished run."""

import pathlib
from typing import Annotated, Any

import typer

from jaxcomp.commands.common import Traceback, console, errors, plain_errors

EPILOG = (
    "[bold]Examples[/]\n\n"
    "jaxcomp report out --open\n\n"
    "jaxcomp report study/rows/64dd9035962fb485 --out row.html\n\n"
    "jaxcomp report benchmarks/results/cpu-2core/smollm2_flatquant_w4a4kv4.report.json\n\n"
    "The page is one file that needs no network. An artefact holds its own as report.html, without "
    "what is only known when it is complete: its size on disk and the fingerprint of its weights."
)


def run(
    source: Annotated[
        pathlib.Path,
        typer.Argument(
            metavar="ARTEFACT",
            help="An artefact, a directory that holds a report.json, or that file.",
        ),
    ],
    out: Annotated[
        pathlib.Path, typer.Option("--out", "-o", metavar="FILE", help="The page to write.")
    ] = pathlib.Path("report.html"),
    show: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
    traceback: Traceback = False,
) -> None:
    """Write the report of a run as one HTML page: numbers, plots, tables, recipe."""
    with plain_errors(traceback):
        from jaxcomp import artefact
        from jaxcomp.report import render_html, write_html
        from jaxcomp.studies.compare import read_report

        _check_outside(out)
        report = read_report(source)
        model, facts = _contents(source) if artefact.is_artefact(source) else (None, {})
        write_html(out, render_html(report, model, facts))
        console.print(f"written to [bold]{out}[/]")
        if show:
            _open(out)


def _check_outside(out: pathlib.Path) -> None:
    """Refuses a place inside an artefact, where a new file would be damage."""
    from jaxcomp import artefact

    for folder in out.absolute().parents:
        if artefact.is_artefact(folder):
            raise ValueError(
                f"{out} is inside the artefact {folder}, whose manifest seals every file; choose "
                "a place outside with --out"
            )


def _contents(place: pathlib.Path) -> tuple[Any, dict[str, Any]]:
    """The model of an artefact, blocks on disk, and facts; no model if it cannot be read."""
    from jaxcomp import artefact
    from jaxcomp.recipe import fingerprint

    manifest = artefact.read_manifest(place)
    files = manifest["files"].values()
    facts = {
        "format": f"{manifest['format']} {manifest['version']}",
        "on disk": f"{sum(f['bytes'] for f in files) / 1e6:,.1f} MB in {len(files)} files",
        "weights sha256": fingerprint(artefact.leaf_hashes(place)),
    }
    try:
        return artefact.load(place, lazy=True, verify=False), facts
    except (ValueError, OSError) as error:
        note = f"note: without the structure of the model, which cannot be read: {error}"
        errors.print(note, style="yellow", markup=False, highlight=False)
        return None, facts


def _open(page: pathlib.Path) -> None:
    import webbrowser

    if not webbrowser.open(page.absolute().as_uri()):
        raise ValueError(f"no browser could be started; open {page} yourself")
