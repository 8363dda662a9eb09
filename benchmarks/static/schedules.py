"""What the compilers of absent chips say of every kernel: cycles of a step, spills, registers.

    JAX_PLATFORMS=cpu python benchmarks/static/schedules.py                 # every chip
    JAX_PLATFORMS=cpu python benchmarks/static/schedules.py --chips v6e     # one; others stay

Needs `pip install -e '.[tpu-aot]'` for TPUs and `'.[gpu-aot]'` for Hopper. Nothing is run. On a TPU
a step of the grid takes about as many cycles as its program has bundles, unless its memory traffic
or its products take longer: `memory` and `products` are the least cycles of these, at the chip's
peaks, and `× bound` is bundles over the larger. Writes `schedules.json` and `schedules.md` beside
this script.

A list of kernels is a module of this folder with `entries(chip_name)`, which yields objects with
the fields of `tpu_kron.Entry`; of a GPU's `kernel`, `case`, `function` and `arguments` will do.
"""

import argparse
import importlib
import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import environment  # noqa: E402
from pallas_kernels.aot import Report, compile_for, missing  # noqa: E402
from pallas_kernels.chips import CHIPS  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
LISTS = {"tpu": ("tpu_matmul", "tpu_kron"), "gpu": ("hopper",)}
LISTED = [name for name, chip in CHIPS.items() if LISTS.get(chip.platform)]
PACKAGES = ("jax", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
# Cycles a second: the peak in bfloat16 over the products of a cycle. For v5e those of four units of
# 128·128. For v6e this is inferred: its clock is not published, and schedules show more than three
# rows of 256·256 a cycle (242 bundles for 768 of them), so that the peak is taken for four.
CLOCK = {"v5e": 197e12 / (2 * 4 * 128**2), "v6e": 918e12 / (2 * 4 * 256**2)}
TPU_COLUMNS = "kernel,case,tile,bundles,memory,products,× bound,spills,seconds"
GPU_COLUMNS = "kernel,case,registers,spills,shared,HGMMA,IGMMA,UTMALDG,I2F,seconds"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chips", nargs="+", default=LISTED, choices=LISTED)
    parser.add_argument("--only", default="", help="kernels whose name begins so; writes nothing")
    parser.add_argument("--json", type=pathlib.Path, default=HERE / "schedules.json")
    args = parser.parse_args()
    found = json.loads(args.json.read_text()) if args.json.exists() else {}
    for name in args.chips:
        absent = missing(name)
        if absent:
            print(absent)
            continue
        rows = list(measured(name, args.only))
        found[name] = {"environment": environment(PACKAGES), "rows": rows}
        print(markdown(name, found[name]))
    if not args.only:
        args.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        text = "\n".join(markdown(name, of) for name, of in found.items())
        args.json.with_suffix(".md").write_text(text)


def measured(chip_name: str, only: str) -> Iterator[dict[str, Any]]:
    """A row for every kernel of a chip, also for one that its compiler refuses."""
    platform = CHIPS[chip_name].platform
    directory = pathlib.Path(tempfile.gettempdir()) / f"jaxcomp-schedules-{platform}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for module in LISTS[platform]:
        for entry in importlib.import_module(f"benchmarks.static.{module}").entries(chip_name):
            if not entry.kernel.startswith(only):
                continue
            row = {"kernel": entry.kernel, "case": entry.case}
            try:
                report = compile_for(
                    chip_name, entry.function, *entry.arguments, dump=directory
                ).report
                yield row | figures(entry, report)
            except Exception as error:  # what a compiler refuses is a row of the table
                yield row | {"refused": str(error).strip().partition("\n")[0][:200]}
            for path in directory.iterdir():  # hundreds of files for a kernel
                path.unlink()


def figures(entry: Any, report: Report) -> dict[str, Any]:
    """The figures of the entry's own kernel; XLA's beside it are counted as `others`."""
    own = [k for k in report.kernels if k.name.startswith(entry.kernel)]
    if not own:
        return {"refused": f"no kernel of this name among {[k.name for k in report.kernels]}"}
    row = {k: round(v, 1) for k, v in own[-1].figures.items()}
    row |= {"seconds": round(report.seconds, 1), "others": len(report.kernels) - len(own)}
    chip = CHIPS[report.chip]
    if chip.platform == "tpu":
        hertz = CLOCK[report.chip]
        memory = entry.step_bytes / chip.bandwidth * hertz
        products = entry.step_operations / getattr(chip, entry.unit) * hertz
        row |= {
            "tile": str(tuple(entry.tile) if isinstance(entry.tile, tuple) else entry.tile),
            "memory": round(memory),
            "products": round(products),
            "× bound": round(row["bundles"] / max(memory, products), 2),
        }
    return row


def markdown(chip_name: str, found: dict[str, Any]) -> str:
    """The table of a chip."""
    columns = TPU_COLUMNS if CHIPS[chip_name].platform == "tpu" else GPU_COLUMNS
    columns = columns.split(",")
    env = found["environment"]
    versions = ", ".join(f"{name} {env[name]}" for name in PACKAGES if env.get(name))
    lines = [f"## {chip_name}", "", f"{env['date'][:10]}; {versions}.", ""]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in found["rows"]:
        cells = [str(row.get(c, "")) for c in columns]
        if "refused" in row:
            cells[2] = f"refused: {row['refused']}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
