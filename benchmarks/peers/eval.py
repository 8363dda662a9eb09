"""Perplexity tokens a second: jaxcomp beside transformers (torch), on the same windows.

Both get SmolLM2-135M from the same GGUF file and the same token windows, batch 1. Each contestant
runs in a process of its own, in turns (A B A B …), and in each: load, score one window (which
compiles), then score all windows `--repeats` times.

Run: python benchmarks/peers/eval.py [--tokens 8184] [--repeats 2] [--rounds 2] [--dtype float32]
"""

import argparse
import json
import math
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from benchmarks import common

CONTESTANTS = ("jaxcomp", "transformers", "jaxcomp-streamed")
CONTEXT = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo:smollm2", help="a GGUF file or demo:smollm2")
    parser.add_argument("--tokens", type=int, default=8184, help="predicted tokens to score")
    parser.add_argument("--repeats", type=int, default=2, help="scorings per process, after one")
    parser.add_argument("--rounds", type=int, default=2, help="processes per contestant and dtype")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--contestants",
        nargs="+",
        default=CONTESTANTS[:2],
        choices=CONTESTANTS,
        help="jaxcomp-streamed reads each block from the file whenever it is needed",
    )
    parser.add_argument("--json", help="default: benchmarks/results/<device>/eval.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(json.loads(args.worker))
    with tempfile.TemporaryDirectory() as scratch:
        compare(args, pathlib.Path(scratch) / "windows.npz")


def compare(args: argparse.Namespace, windows: pathlib.Path) -> None:
    """The whole comparison: windows, contestants in turns, table, JSON."""
    file = save_windows(args.model, args.tokens, windows)
    facts = common.environment(["jax", "torch", "transformers"])
    setting = f"context {CONTEXT}, {args.tokens} predicted tokens of wiki_eval, batch 1"
    common.header(f"Perplexity of {args.model}: {setting}", facts)
    runs: dict[tuple[str, str], list] = {}
    for dtype in args.dtype:
        for who in common.alternate(args.contestants, args.rounds):
            task = {"who": who, "dtype": dtype, "model": args.model, "file": str(file)}
            task |= {"windows": str(windows), "repeats": args.repeats}
            result = common.run_worker(__file__, task) | {"load": common.load()}
            runs.setdefault((dtype, who), []).append(result)
            if "error" in result:
                print(f"{dtype} {who}: {result['error']}", file=sys.stderr)
    results = [summary(dtype, who, list_) for (dtype, who), list_ in runs.items()]
    show(results)
    common.write_results("eval", facts, results, args.json)


def save_windows(model: str, tokens: int, path: pathlib.Path) -> pathlib.Path:
    """Cuts the text once for all contestants; returns the model's file."""
    from jaxcomp.data.batches import evaluation_windows
    from jaxcomp.data.corpora import load_text
    from jaxcomp.hub.locate import locate
    from jaxcomp.job import load

    ids = load(model, lazy=True).encode(load_text("wiki_eval").text)
    windows = evaluation_windows(ids, CONTEXT, tokens=tokens)
    np.savez(path, tokens=windows.tokens, score=windows.score)
    return locate(model)


def work(task: dict[str, Any]) -> None:
    """One contestant: load, first window, then everything several times."""
    with np.load(task["windows"]) as stored:
        tokens, score = stored["tokens"], stored["score"]
    make = torch_scorer if task["who"] == "transformers" else jax_scorer
    load_seconds, _, (nll, imports, baseline) = common.clocked(lambda: make(task))
    first, _, _ = common.clocked(lambda: nll(tokens[:1]))
    second, _, _ = common.clocked(lambda: nll(tokens[:1]))
    walls, cpus = [], []
    for _ in range(task["repeats"]):
        wall, cpu, losses = common.clocked(lambda: nll(tokens))
        walls.append(wall)
        cpus.append(cpu)
    result = {
        "import_seconds": imports,
        "load_seconds": load_seconds - imports,
        "first_window_seconds": first,
        "later_window_seconds": second,
        "wall_seconds": walls,
        "cpu_seconds": cpus,
        "tokens": int(score.sum()),
        "perplexity": math.exp(float(np.mean(losses[score], dtype=np.float64))),
        "baseline_rss": baseline,
        "peak_rss": common.memory("VmHWM"),
    }
    common.answer(result)


def jax_scorer(task: dict[str, Any]):
    start = time.perf_counter()
    import jax

    from jaxcomp.evals.perplexity import window_nll
    from jaxcomp.job import load
    from jaxcomp.models.decoder import iter_blocks

    imports, baseline = time.perf_counter() - start, common.memory("VmHWM")
    model = load(task["model"], compute_dtype=task["dtype"]).model
    if task["who"] == "jaxcomp":
        model = jax.device_put(model.replace(blocks=tuple(iter_blocks(model))))
    return (lambda tokens: window_nll(model, tokens)), imports, baseline


def torch_scorer(task: dict[str, Any]):
    start = time.perf_counter()
    import torch
    import transformers

    imports, baseline = time.perf_counter() - start, common.memory("VmHWM")
    torch.set_num_threads(common.usable_cores())
    file = pathlib.Path(task["file"])
    dtype = getattr(torch, task["dtype"])
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(str(file.parent), gguf_file=file.name, dtype=dtype).eval()

    @torch.inference_mode()
    def nll(tokens: np.ndarray) -> np.ndarray:
        out = []
        for row in torch.from_numpy(tokens.astype(np.int64)):
            logits = model(row[None], use_cache=False).logits[0, :-1].float()
            out.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none"))
        return torch.stack(out).numpy()

    return nll, imports, baseline


def summary(dtype: str, who: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all processes of one contestant and dtype, the raw runs beside them."""
    result = {"dtype": dtype, "contestant": who, "runs": runs}
    good = [run for run in runs if "error" not in run]
    if not good:
        return result
    median = lambda name: statistics.median(run[name] for run in good)  # noqa: E731
    wall = statistics.median(x for run in good for x in run["wall_seconds"])
    cpu = statistics.median(x for run in good for x in run["cpu_seconds"])
    best = min(x for run in good for x in run["wall_seconds"])
    compiling = statistics.median(
        run["first_window_seconds"] - run["later_window_seconds"] for run in good
    )
    return result | {
        "tokens_per_s": good[0]["tokens"] / wall,
        "best_tokens_per_s": good[0]["tokens"] / best,
        "cpu_seconds": cpu,
        "cores_busy": cpu / wall,
        "load_seconds": median("load_seconds"),
        "compile_seconds": max(0.0, compiling),
        "perplexity": good[0]["perplexity"],
        "baseline_rss": median("baseline_rss"),
        "peak_rss": max(run["peak_rss"] for run in good),
    }


def show(results: list[dict[str, Any]]) -> None:
    """The table: one row per dtype and contestant, compared with transformers in that dtype."""
    columns = "dtype,contestant,tok/s,best tok/s,× peer,CPU s,cores,load s,compile s"
    columns += ",ppl,Δppl,peak MB"
    peers = {r["dtype"]: r for r in results if r["contestant"] == "transformers"}
    rows = []
    for r in results:
        peer = peers.get(r["dtype"], {})
        ratio = delta = None
        if "tokens_per_s" in r and "tokens_per_s" in peer:
            ratio = r["tokens_per_s"] / peer["tokens_per_s"]
            delta = f"{r['perplexity'] / peer['perplexity'] - 1:+.4%}"
        names = "tokens_per_s best_tokens_per_s cpu_seconds cores_busy load_seconds compile_seconds"
        speed, best, *rest = (r.get(name) for name in names.split())
        ppl = f"{r['perplexity']:.4f}" if "perplexity" in r else None
        peak = r["peak_rss"] / 1e6 if "peak_rss" in r else None
        rows.append([r["dtype"], r["contestant"], speed, best, ratio, *rest, ppl, delta, peak])
    common.table(columns.split(","), rows)
    print("× peer, Δppl: against transformers in that dtype. compile s: first minus later window.")


if __name__ == "__main__":
    main()
