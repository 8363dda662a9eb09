"""What every benchmark here needs: where it ran, contestants in processes of their own, tables.

A contestant is the same script run again with `--worker JSON`: memory, threads and compiled
programs of one never reach another. It answers with one JSON object on its last line of output.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = pathlib.Path(__file__).resolve().parent / "results"
MARK = "result "  # begins the line that carries a worker's answer


def device_name() -> str:
    """The folder of results for this machine, such as `cpu-2core`; asks JAX in another process."""
    code = "import jax; d = jax.devices(); print(len(d), d[0].platform, d[0].device_kind, sep='|')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, kind, name = done.stdout.strip().splitlines()[-1].split("|")
    if kind == "cpu":
        return f"cpu-{usable_cores()}core"
    return f"{count}x-{name.lower().replace(' ', '-')}"


def usable_cores() -> int:
    """Cores this process may run on, which a container can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Versions (None: not installed), processor, date and load of a run."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "device": device_name(),
        "processor": _processor(),
        "cores": usable_cores(),
        "load_before": load(),
    }


def version(package: str) -> str | None:
    """The installed version of a distribution, None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def load() -> list[float]:
    """Load average of the last 1, 5 and 15 minutes; [] where the system has none."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else []


def memory(field: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS is the memory held now, VmHWM the most so far."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def clocked(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall seconds, CPU seconds of all threads, and what `run` returned."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = run()
    return time.perf_counter() - wall, time.process_time() - cpu, value


def run_worker(script: str, task: dict[str, Any], limit: float | None = None) -> dict[str, Any]:
    """Runs `script --worker TASK` and returns its answer.

    What goes wrong is an answer too: `{"error": …}`, and with it `"timeout": limit` when the
    worker took longer than `limit` seconds.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # A warm compilation cache would hide what compiling costs.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAXCOMP_CACHE": "off"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, script, "--worker", json.dumps(task)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=env)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {limit:.0f} s", "timeout": limit}
    answers = [x for x in done.stdout.splitlines() if x.startswith(MARK)]
    if done.returncode or not answers:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        return {"error": f"exit status {done.returncode}: {last}"}
    return json.loads(answers[-1].removeprefix(MARK))


def answer(value: dict[str, Any]) -> None:
    """Hands a worker's result to the process that started it."""
    print(MARK + json.dumps(value), flush=True)


def alternate(contestants: Sequence[Any], rounds: int) -> Iterator[Any]:
    """A B A B …: what else the machine does falls on all alike."""
    for _ in range(rounds):
        yield from contestants


def header(title: str, facts: dict[str, Any]) -> None:
    """Prints what was measured and where, before any number."""
    print(f"{title}\n{'=' * len(title)}")
    for name, value in facts.items():
        print(f"{name:<16} {'not installed' if value is None else value}")
    print(flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints rows under their names; numbers to the right, a missing one as a dash."""
    texts = [[_cell(x) for x in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(columns), *texts]) for i in range(len(columns))]
    number = [any(isinstance(row[i], int | float) for row in rows) for i in range(len(columns))]
    for row in [list(columns), ["-" * w for w in widths], *texts]:
        cells = zip(row, widths, number, strict=True)
        print("  ".join(x.rjust(w) if n else x.ljust(w) for x, w, n in cells).rstrip())
    print(flush=True)


def write_results(name: str, facts: dict[str, Any], results: Any, path: str | None = None) -> None:
    """Writes `results/<device>/<name>.json`, or the file at `path`."""
    target = pathlib.Path(path) if path else RESULTS / facts["device"] / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    data = {"environment": facts | {"load_after": load()}, "results": results}
    target.write_text(json.dumps(data, indent=1) + "\n")
    shown = target.relative_to(ROOT) if target.is_relative_to(ROOT) else target
    print(f"written to {shown}; load average now {load()}")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 10 else f"{value:,.0f}"
    return str(value)


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    return next(names, platform.machine())
