"""Models side by side on the clock: each in a process of its own, taking turns.

In its own process a model has its own peak of memory, and what one compiled or keeps does not help
the next. All are started once, and run by run it is another one's turn, so that what else the
machine does falls on all alike; the others wait meanwhile.

A process is `python -m jaxcomp.bench`: it reads one JSON task a line and answers with one.
"""

import dataclasses
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from jaxcomp import artefact

MARK = "result "  # begins the line that carries an answer
SOURCES = 8  # artefacts made from artefacts, at most so many deep
# What may change how many threads work, and on which kernels.
THREADS = ("XLA_FLAGS", "JAXCOMP_NATIVE", "JAXCOMP_NATIVE_THREADS")


@dataclasses.dataclass(frozen=True)
class Contender:
    """A model to measure.

    Attributes:
      source: what `jaxcomp.job.load` takes.
      name: what tables and pictures call it.
      compute_dtype, integer, allow_config: as `job.load` takes them.
    """

    source: str
    name: str
    compute_dtype: str | None = None
    integer: bool = False
    allow_config: tuple[str, ...] = ()


def dense_source(source: str) -> str | None:
    """The model that an artefact was made from; None for what is no artefact."""
    found = None
    for _ in range(SOURCES):
        if not artefact.is_artefact(source):
            return found
        found = source = artefact.read_json(pathlib.Path(source), "report.json")["source"]
    return None


def bench(
    contenders: Sequence[Contender],
    batches: Sequence[int] = (1, 8, 32),
    prompt: int = 512,
    new: int = 64,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda _: None,
    stream_bytes: int = 1 << 28,
) -> dict[str, Any]:
    """Measures all contenders at every batch, `repeats` times after a run that compiles.

    Args:
      batches, prompt, new: see `evals.speed.Workload`.
      progress: is told what is done next.
      stream_bytes: of each of three arrays that bandwidth is measured on; more than caches hold.

    Returns:
      JSON values: `settings`, `bandwidth` (bytes a second, and the `limit` that shares are of),
      `environment`, and `models`, each with `name`, `source`, `weight_bytes`, memory in bytes, and
      `runs`, one a batch: medians of what `evals.speed.measure` gives, `values` of the repeats,
      `step_bytes`, and `share`, that of the bandwidth at which the step would take no longer.

    Raises:
      ValueError: a contender cannot be loaded or run; the message is its process's.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} is below 1")
    works = [dict(batch=batch, prompt=prompt, new=new) for batch in batches]
    workers: list[_Worker] = []
    try:
        machine = _Worker("the machine")
        workers.append(machine)
        progress("bandwidth of memory")
        stream = dict(task="bandwidth", size=stream_bytes)
        streams, environment = [machine.ask(**stream)], machine.ask(task="environment")
        models = []
        for contender in contenders:
            progress(f"loading {contender.name}")
            workers.append(_Worker(contender.name))
            held = workers[-1].ask(task="load", contender=dataclasses.asdict(contender))
            models.append({"name": contender.name, "source": contender.source, **held, "runs": []})
        for work in works:
            turns: list[list[dict[str, float]]] = [[] for _ in contenders]
            for repeat in range(repeats + 1):
                for worker, turn, contender in zip(workers[1:], turns, contenders, strict=True):
                    what = f"run {repeat} of {repeats}" if repeat else "compiling"
                    progress(f"batch {work['batch']}, {contender.name}: {what}")
                    turn.append(worker.ask(task="measure", work=work))
            streams.append(machine.ask(**stream))
            for model, turn in zip(models, turns, strict=True):
                model["runs"].append(work | _summary(turn))
        for model, worker in zip(models, workers[1:], strict=True):
            model |= worker.ask(task="memory")
    finally:
        for worker in workers:
            worker.close()
    best = {name: max(stream[name] for stream in streams) for name in streams[0]}
    limit = max(best.values())
    for run in (run for model in models for run in model["runs"]):
        run["share"] = run["step_bytes"] / run["step_s"] / limit
    return {
        "settings": dict(batches=list(batches), prompt=prompt, new=new, repeats=repeats),
        "bandwidth": best | {"limit": limit},
        "environment": environment,
        "models": models,
    }


def _summary(turn: list[dict[str, float]]) -> dict[str, Any]:
    first, *timed = turn
    names = ("first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s", "step_s")
    return {
        **{name: statistics.median(run[name] for run in timed) for name in names},
        "compile_s": first["compile_s"],
        "step_bytes": first["step_bytes"],
        "values": {name: [run[name] for run in timed] for name in names},
    }


class _Worker:
    """A process that answers tasks one by one."""

    def __init__(self, name: str):
        self._name, self._errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        root = str(pathlib.Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jaxcomp.bench"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )

    def ask(self, **task: Any) -> dict[str, Any]:
        """The answer to one task."""
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it is gone, and the end of its output says so below
        for line in self._process.stdout:
            if line.startswith(MARK):
                answer = json.loads(line.removeprefix(MARK))
                if "error" in answer:
                    raise ValueError(f"{self._name}: {answer['error']}")
                return answer
        code = self._process.wait()
        self._errors.seek(0)
        last = (self._errors.read().strip() or "no output").splitlines()[-1]
        why = "it was killed, perhaps for want of memory" if code == -9 else last
        raise ValueError(f"{self._name}: its process ended with status {code}: {why}")

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def _serve() -> None:
    """The worker: answers the tasks that come in, until there are none."""
    from jaxcomp import job
    from jaxcomp.evals import speed
    from jaxcomp.models.prepare import prepare
    from jaxcomp.models.sizes import peak_rss, rss

    model = None

    def answer(task: dict[str, Any]) -> dict[str, Any]:
        nonlocal model
        match task.pop("task"):
            case "bandwidth":
                return speed.bandwidth(task["size"])
            case "environment":
                return _environment()
            case "load":
                _import_what_loading_needs()
                baseline, given = peak_rss(), dict(task["contender"])
                name, _ = given.pop("source"), given.pop("name")
                model = prepare(job.load(name, lazy=True, **given).model)
                bytes_held = dict(weight_bytes=speed.weight_bytes(model))
                return bytes_held | dict(baseline_rss_bytes=baseline, loaded_rss_bytes=rss())
            case "measure":
                work = speed.Workload(**task["work"])
                found = speed.measure(model, work)
                return found | dict(step_bytes=speed.step_bytes(model, work))
            case "memory":
                return dict(peak_rss_bytes=peak_rss(), peak_device_bytes=_device_peak())

    for line in sys.stdin:
        try:
            result = answer(json.loads(line))
        except (ValueError, OSError, ModuleNotFoundError) as error:
            result = {"error": str(error)}
        except Exception:  # a bug of ours: all of it, for the one who reports it
            result = {"error": traceback.format_exc()}
        print(MARK + json.dumps(result), flush=True)


def _import_what_loading_needs() -> None:
    """So that it counts as imports and not as the model's memory."""
    import jax
    import orbax.checkpoint  # noqa: F401
    from transformers import PreTrainedTokenizerFast  # noqa: F401

    jax.devices()


def _device_peak() -> int | None:
    """Peak bytes of the default device's own memory; None where it has none or does not tell."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _environment() -> dict[str, Any]:
    import datetime

    from jaxcomp.evals.speed import usable_cores
    from jaxcomp.report import environment

    load = [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else []
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    threads = {name: os.environ[name] for name in THREADS if name in os.environ}
    return {
        "date": date,
        **environment(),
        "processor": _processor(),
        "usable_cores": usable_cores(),
        "thread_settings": threads,
        "load_average": load,
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    return next(names, platform.machine())


if __name__ == "__main__":
    _serve()
