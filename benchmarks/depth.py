"""Speed of a model without some of its blocks beside the model itself, and what to expect.

Head and embedding stay: `bytes ×` is by how much the bytes of a decoding step shrink, `blocks ×` by
how much the blocks do. Many small weights are read more slowly than one large head, so expect
something between the two. Ratios are medians over turns, each with the model itself in the same
turn. Which blocks go does not change the speed; here every other one goes.

Run: python benchmarks/depth.py [--model demo:smollm2] [--removed 3 5 8] [--repeats 5]
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from benchmarks import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2", help="what jaxcomp loads")
    parser.add_argument("--removed", type=int, nargs="+", default=[3, 5, 8], help="blocks")
    parser.add_argument("--prompt", type=int, default=512, help="tokens that are read")
    parser.add_argument("--new", type=int, default=64, help="tokens that are decoded")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, taking turns")
    parser.add_argument("--json", help="where to write the results")
    args = parser.parse_args()
    facts = common.environment(["jaxcomp", "jax", "jaxlib", "numpy"])
    common.header("Blocks removed: speed", facts)
    from jaxcomp import PruneBlocks, Recipe, compress, load
    from jaxcomp.bench import Contender, bench

    with tempfile.TemporaryDirectory() as scratch:
        contenders = [Contender(args.model, "0")]
        for removed in args.removed:
            out = f"{scratch}/{removed}"
            compress(args.model, Recipe((PruneBlocks(removed, "every_other"),)), out)
            contenders.append(Contender(out, f"{removed}"))
        settings = dict(prompt=args.prompt, new=args.new, repeats=args.repeats)
        found = bench(contenders, (1,), progress=lambda text: print(f"  {text}"), **settings)
    for model in found["models"]:
        model["source"] = args.model  # the others were made from it, in a place that is gone
    n_blocks = len(load(args.model, lazy=True).model.blocks)
    rows = [row(model, found["models"][0], n_blocks) for model in found["models"]]
    print()
    common.table(list(rows[0]), [list(r.values()) for r in rows])
    common.write_results("depth", facts, found, args.json)


def row(model: dict[str, Any], dense: dict[str, Any], n_blocks: int) -> dict[str, Any]:
    """A line of the table."""
    (run,), (whole,) = model["runs"], dense["runs"]
    removed = int(model["name"])

    def ratio(name: str) -> float:
        turns = zip(run["values"][name], whole["values"][name], strict=True)
        return statistics.median(ours / theirs for ours, theirs in turns)

    return {
        "removed": removed,
        "decode tok/s": run["decode_tokens_per_s"],
        "×": ratio("decode_tokens_per_s"),
        "bytes ×": whole["step_bytes"] / run["step_bytes"],
        "blocks ×": n_blocks / (n_blocks - removed),
        "prefill tok/s": run["prefill_tokens_per_s"],
        "prefill ×": ratio("prefill_tokens_per_s"),
        "MB a step": run["step_bytes"] / 1e6,
        "peak MB": model["peak_rss_bytes"] / 1e6,
    }


if __name__ == "__main__":
    main()
