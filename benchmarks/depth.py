"""Speed of a model without some of its blocks beside the model itself, and what would be the limit.

A decoding step reads all weights and the cache once, so it cannot gain more than those shrink: the
head and the embedding stay. Which blocks go does not change the speed; here every other one goes.

Run: python benchmarks/depth.py [--model demo:smollm2] [--removed 3 5 8] [--repeats 5]
"""

import argparse
import pathlib
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
    from jaxcomp import PruneBlocks, Recipe, compress
    from jaxcomp.bench import Contender, bench

    with tempfile.TemporaryDirectory() as scratch:
        contenders = [Contender(args.model, "0")]
        for removed in args.removed:
            out = f"{scratch}/{removed}"
            compress(args.model, Recipe((PruneBlocks(removed, "every_other"),)), out)
            contenders.append(Contender(out, f"{removed}"))
        settings = dict(prompt=args.prompt, new=args.new, repeats=args.repeats)
        found = bench(contenders, (1,), progress=lambda text: print(f"  {text}"), **settings)
    rows = [row(model, found["models"][0]) for model in found["models"]]
    print()
    common.table(list(rows[0]), [list(r.values()) for r in rows])
    common.write_results("depth", facts, found, args.json)


def row(model: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    (run,), (whole,) = model["runs"], dense["runs"]
    ratio = lambda name: run[name] / whole[name]  # noqa: E731
    return {
        "removed": int(model["name"]),
        "MB a step": run["step_bytes"] / 1e6,
        "decode tok/s": run["decode_tokens_per_s"],
        "×": ratio("decode_tokens_per_s"),
        "limit ×": 1 / ratio("step_bytes"),
        "prefill tok/s": run["prefill_tokens_per_s"],
        "prefill ×": ratio("prefill_tokens_per_s"),
        "peak MB": model["peak_rss_bytes"] / 1e6,
    }


if __name__ == "__main__":
    main()
