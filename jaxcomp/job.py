"""THE MAIN JOB: a checkpoint in, a compressed artefact and its report out. Start reading here.

    source ─load─▶ model, tokenizer          blocks stay in their files
    text ─▶ calibration windows
    evals ─▶ numbers before
    each step of the recipe: model ─▶ model', rows         resumable, block by block
    evals ─▶ numbers after,  comparison with the original ─▶ pictures
    artefact.save ─▶ OUT                     written aside, renamed when complete

Unfinished work lives in `OUT.partial/` until the artefact is complete. A fingerprint of model,
recipe and text guards it: it continues the run it belongs to and no other.
"""

import contextlib
import dataclasses
import datetime
import json
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import rich.console

import jaxcomp
from jaxcomp import artefact
from jaxcomp.calibrate import comparison
from jaxcomp.calibrate.plan import check_steps, plan, plan_write
from jaxcomp.calibrate.stream import Calibration, Run, StepStore, check_batches, write_whole
from jaxcomp.core.files import sha256_file
from jaxcomp.core.metrics import told_apart
from jaxcomp.data.batches import evaluation_windows, sample_hash, sample_windows
from jaxcomp.data.corpora import load_text
from jaxcomp.data.tasks import task_digest
from jaxcomp.evals.perplexity import Perplexity
from jaxcomp.hub.read import open_checkpoint
from jaxcomp.hub.tokenizer import encode, load_tokenizer
from jaxcomp.models.decoder import Decoder
from jaxcomp.models.execution import use_integer
from jaxcomp.models.sizes import peak_rss
from jaxcomp.parallel import Placement, data_mesh
from jaxcomp.progress import ConsoleProgress
from jaxcomp.recipe import CalibSpec, Recipe, fingerprint, recipe_to_json
from jaxcomp.report import Report, draw_pictures, environment, render_html, sizes, to_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FOUND = "found_recipe.json"  # with what a step found instead of the step that searched
COMPARED_TOKENS = 1024  # of the window on which the original and the compressed model are compared


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A model ready to use, with what came along.

    Attributes:
      model: blocks are handles when it was loaded lazily.
      tokenizer: a fast tokenizer.
      source: what the user asked for.
      fingerprint: gives a digest of the weights; called only where it is needed.
      files: companions that an artefact keeps, name → content or path.
    """

    model: Decoder
    tokenizer: "PreTrainedTokenizerFast"
    source: str
    fingerprint: Callable[[], str]
    files: dict[str, bytes | pathlib.Path]

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text` without special tokens, int32."""
        return encode(self.tokenizer, text, self.model.config.vocab_size)


def load(
    source: str | pathlib.Path,
    *,
    compute_dtype: str | None = None,
    lazy: bool = False,
    allow_config: Iterable[str] = (),
    integer: bool = False,
) -> Loaded:
    """Opens an artefact of ours, or any checkpoint `jaxcomp.hub` reads.

    Args:
      source: an artefact, a Hugging Face directory, a `.gguf` file, a hub id, `demo:smollm2`.
      compute_dtype: dtype of activations; by default the artefact's own, or float32.
      lazy: leave an artefact's blocks on disk; those of a checkpoint always are.
      allow_config: unknown config fields that the caller vouches change nothing.
      integer: run quantized activations in integers instead of simulating them in floats.

    Raises:
      ValueError: not a model, a damaged one, or one that cannot run in integers; the message says
        where and what to do.
    """
    loaded = _open(source, compute_dtype, lazy, allow_config)
    return dataclasses.replace(loaded, model=use_integer(loaded.model)) if integer else loaded


def _open(
    source: str | pathlib.Path, compute_dtype: str | None, lazy: bool, allow_config: Iterable[str]
) -> Loaded:
    if artefact.is_artefact(source):
        path = pathlib.Path(source)
        model = artefact.load(path, lazy=lazy, compute_dtype=compute_dtype)
        return Loaded(
            model,
            load_tokenizer(path / "tokenizer"),
            str(source),
            lambda: fingerprint(artefact.leaf_hashes(path)),
            {p.name: p for p in path.glob("*.json") if p.name not in artefact.RESERVED},
        )
    checkpoint = open_checkpoint(
        source, compute_dtype=compute_dtype or "float32", allow_config=allow_config
    )
    config = json.dumps(checkpoint.hf_config, indent=2).encode()
    kept = {k: v for k, v in checkpoint.files.items() if k == "generation_config.json"}
    return Loaded(
        checkpoint.model,
        load_tokenizer(checkpoint),
        str(source),
        lambda: checkpoint.fingerprint,
        {"config.json": config, **kept},
    )


def evaluate(
    loaded: Loaded, evals: Iterable[Any], progress: ConsoleProgress | None = None
) -> dict[str, dict[str, float]]:
    """Runs evaluations; name of the evaluation → its numbers.

    Raises:
      ValueError: two of them have one name, so that numbers would be lost.
    """
    evals = tuple(evals)
    names = [evaluation.name for evaluation in evals]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"two evaluations are called {twice[0]!r} and would overwrite each other; leave one out"
        )
    progress = progress or ConsoleProgress(None)
    total = len(loaded.model.blocks)
    results = {}
    for evaluation in evals:
        each = lambda blocks, name=evaluation.name: progress.each(blocks, name, total)  # noqa: E731
        results[evaluation.name] = evaluation(loaded.model, loaded.encode, each)
    return results


def compress(
    source: str | pathlib.Path,
    recipe: Recipe,
    out: str | pathlib.Path,
    *,
    resume: bool = True,
    overwrite: bool = False,
    compute_dtype: str = "float32",
    allow_config: Iterable[str] = (),
    before: dict[str, dict[str, float]] | None = None,
    compare: bool = True,
    data_parallel: bool = False,
    console: rich.console.Console | None = None,
) -> Report:
    """Applies `recipe` to the model at `source` and writes the artefact `out`.

    Args:
      source: what `load` takes.
      recipe: steps, calibration text, evaluations.
      out: directory of the artefact; unfinished work lives in `OUT.partial` beside it.
      resume: continue unfinished work of the same run; False discards it.
      overwrite: replace an older artefact at `out`.
      before: what the evaluations give on the model as it is, where the caller knows already.
      compare: lay the model beside the original on one window of the text that the evaluations
        read, or the calibration, for the pictures of error along depth and of flatness.
      data_parallel: share every batch of calibration windows among all devices of this process.
        Evaluations stay on one. A run may be continued with another number of devices.
      console: shows progress; None is silent.

    Returns:
      The report, which is also `out/report.json`.

    Raises:
      ValueError: bad input of any kind, or unfinished work of another run and `resume`; one of
        several processes of a JAX cluster.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"compress is for one process, and this is one of {jax.process_count()}, which would "
            "all write the same files; call the methods with Run(mesh=data_mesh()) and save in "
            "process 0"
        )
    out = pathlib.Path(out).absolute()
    artefact.check_output(out, overwrite)
    mesh = data_mesh() if data_parallel else None
    baseline = peak_rss()
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    loaded = load(source, compute_dtype=compute_dtype, lazy=True, allow_config=allow_config)
    calib = _calibration(loaded, recipe, mesh)
    check_steps(loaded.model, recipe.steps, calib)
    identity = run_identity(loaded, recipe, calib, compute_dtype)
    work = _open_work(out.with_name(out.name + ".partial"), identity, resume)
    progress, seconds = ConsoleProgress(console), {}
    with contextlib.closing(progress):
        with _timed(seconds, "evaluation before"):
            measure = lambda: evaluate(loaded, recipe.evals, progress)  # noqa: E731
            before = _once(work / "before.json", measure) if before is None else before
        model, rows, found = loaded.model, [], []
        for i, step in enumerate(recipe.steps):
            with _timed(seconds, f"{i}: {type(step).__name__}"):
                store = StepStore(work / f"step.{i}")
                run = Run(store, progress.step, mesh, original=loaded.model)
                model, new = step(model, calib, run)
                rows += told_apart(new, rows)
                found.append(step.found(new) if hasattr(step, "found") else step)
        original, loaded = loaded.model, dataclasses.replace(loaded, model=model)
        with _timed(seconds, "evaluation after"):
            after = evaluate(loaded, recipe.evals, progress)
        side_by_side = {}
        if compare and (window := comparison_window(loaded, recipe, calib)) is not None:
            total = len(model.blocks)
            each = lambda pairs: progress.each(pairs, "comparison", total)  # noqa: E731
            with _timed(seconds, "comparison"):
                both = comparison.compare(original, model, window, each)
                side_by_side = dataclasses.asdict(both)
    report = Report(
        source=loaded.source,
        recipe=identity["recipe"],
        rows=tuple(rows),
        evals_before=before,
        evals_after=after,
        sizes=sizes(model),
        calibration=identity["calibration"],
        environment=environment()
        | {"compute_dtype": compute_dtype}
        | ({"data_parallel": mesh.size} if mesh else {}),
        started=started,
        source_sha256=identity["model"],
        seconds=seconds,
        peak_rss_bytes=peak_rss(),
        baseline_rss_bytes=baseline,
        comparison=side_by_side,
    )
    if (resolved := dataclasses.replace(recipe, steps=tuple(found))) != recipe:
        data = json.dumps(recipe_to_json(resolved), indent=2).encode()
        loaded = dataclasses.replace(loaded, files={**loaded.files, FOUND: data})
    _save(loaded, report, out, overwrite)
    shutil.rmtree(work)
    return report


def comparison_window(
    loaded: Loaded, recipe: Recipe, calib: Calibration | None
) -> np.ndarray | None:
    """The first window of an evaluation text, else of the calibration, `[1, time]`."""
    for evaluation in recipe.evals:
        if isinstance(evaluation, Perplexity):
            time = min(evaluation.context, COMPARED_TOKENS)
            config = loaded.model.config
            bos = config.bos_token_id if config.bos == "window" else None
            ids = loaded.encode(load_text(evaluation.text).text)
            return evaluation_windows(ids, time, tokens=1, bos_id=bos).tokens
    return None if calib is None else calib.tokens[:1, :COMPARED_TOKENS]


def run_identity(
    loaded: Loaded, recipe: Recipe, calib: Calibration | None, compute_dtype: str
) -> dict[str, Any]:
    """All that the result of a run depends on, as JSON values."""
    texts = {e.text: load_text(e.text).sha256 for e in recipe.evals if hasattr(e, "text")}
    texts |= {e.task: task_digest(e.task) for e in recipe.evals if hasattr(e, "task")}
    files = {f: sha256_file(pathlib.Path(f)) for s in recipe.steps for f in getattr(s, "files", ())}
    return {
        "model": loaded.fingerprint(),
        "recipe": recipe_to_json(recipe),
        "calibration": {"windows_sha256": sample_hash(calib.tokens)} if calib else {},
        "texts": texts,
        "compute_dtype": compute_dtype,
        "jaxcomp": jaxcomp.__version__,
    } | ({"files": files} if files else {})


def dry_run(
    source: str | pathlib.Path,
    recipe: Recipe,
    *,
    compute_dtype: str = "float32",
    allow_config: Iterable[str] = (),
    data_parallel: bool = False,
) -> list[dict[str, Any]]:
    """What each step of `compress` would take: dicts with `step`, `seconds` and `peak_bytes`.

    No block is read; see `jaxcomp.calibrate.plan`. The last entry is the writing of the artefact,
    whose time is not predicted (0.0). Evaluations are not planned. With `data_parallel` the batch
    is checked; time and memory are still those of one device.
    """
    loaded = load(source, compute_dtype=compute_dtype, lazy=True, allow_config=allow_config)
    calib = _calibration(loaded, recipe, data_mesh() if data_parallel else None)
    steps = plan(loaded.model, recipe.steps, calib)
    return [step._asdict() for step in (*steps, plan_write(loaded.model))]


def calibration(loaded: Loaded, spec: CalibSpec) -> Calibration:
    """The windows that `spec` draws from its text, as `loaded` tokenizes it."""
    config = loaded.model.config
    ids = loaded.encode(load_text(spec.source).text)
    bos = config.bos == "window"
    tokens = sample_windows(ids, spec.samples, spec.length - bos, spec.seed)
    if bos:
        tokens = np.pad(tokens, ((0, 0), (1, 0)), constant_values=config.bos_token_id)
    return Calibration(tokens, spec.batch)


def _calibration(
    loaded: Loaded, recipe: Recipe, mesh: jax.sharding.Mesh | None
) -> Calibration | None:
    """The windows of a recipe, if it has any, in batches that the mesh can share."""
    if recipe.calib is None:
        return None
    calib = calibration(loaded, recipe.calib)
    check_batches(calib, Placement(mesh))
    return calib


def _open_work(path: pathlib.Path, identity: dict, resume: bool) -> pathlib.Path:
    """The directory for unfinished work, empty or belonging to this very run."""
    mark = path / "run.json"
    # A kill while the mark was written leaves `run.json.tmp` alone.
    if path.exists() and not (
        mark.exists() or (path.is_dir() and {p.name for p in path.iterdir()} <= {"run.json.tmp"})
    ):
        raise ValueError(f"{path} exists and is not unfinished work of a run; move it away")
    if mark.exists() and resume:
        other = json.loads(mark.read_text())
        differs = sorted(k for k in identity if identity[k] != other.get(k))
        if not differs:
            return path
        # Without these no block is finished and nothing is found, and so nothing is lost.
        if any(path.glob("step.*/**/state.json")) or any(path.glob("step.*/**/*.kept.json")):
            raise ValueError(
                f"{path} holds unfinished work of another run (other: {', '.join(differs)}); "
                "choose another output, or discard it with resume=False (--no-resume)"
            )
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    _write_json(mark, identity)
    return path


def _once(path: pathlib.Path, compute: Callable[[], Any]) -> Any:
    """The JSON value at `path`, computed and kept there the first time."""
    if not path.exists():
        _write_json(path, compute())
    return json.loads(path.read_text())


def _write_json(path: pathlib.Path, value: Any) -> None:
    write_whole(path, lambda f: f.write(json.dumps(value).encode()))


def _save(loaded: Loaded, report: Report, out: pathlib.Path, overwrite: bool) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = pathlib.Path(scratch) / "tokenizer"
        loaded.tokenizer.save_pretrained(tokenizer)
        pictures = draw_pictures(report, scratch)
        files = {f"tokenizer/{p.name}": p for p in tokenizer.iterdir()}
        files["report.html"] = render_html(report, loaded.model).encode()
        artefact.save(
            loaded.model,
            out,
            recipe=report.recipe,
            report=to_json(report),
            files={**loaded.files, **files, **{p.name: p for p in pictures}},
            overwrite=overwrite,
        )


@contextlib.contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - start
