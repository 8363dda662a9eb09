"""What a FlatQuant fit costs: seconds a step and a block, tokens/s, FLOP utilisation, memory.

Fits a few real blocks of SmolLM2-135M at W4A4KV4, in a process of its own for each dtype. The
ceiling is a square float32 or bfloat16 matrix product of the same process, alternating with the
steps. Counted are the products of the block alone, three times those of its forward pass (output,
gradient of the input, gradient of the weight); transforms, rounding and softmax are work too and
count as none.

Run: python benchmarks/calibrate.py [--length 1024] [--batch 1] [--steps 20] [--blocks 3]
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from benchmarks import common

GOAL = 0.5  # of the ceiling
SQUARE = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=1, help="windows a step")
    parser.add_argument("--steps", type=int, default=20, help="steps timed")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of the whole method")
    parser.add_argument("--json", help="default: benchmarks/results/<device>/calibrate.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return common.answer(work(json.loads(args.worker)))
    facts = common.environment(["jax", "optax"])
    facts |= {k: getattr(args, k) for k in ("length", "batch", "steps", "blocks")}
    common.header("Fit of FlatQuant, W4A4KV4, blocks of SmolLM2-135M", facts)
    results = []
    for dtype in args.dtypes:
        task = {k: getattr(args, k) for k in ("length", "batch", "steps", "blocks")}
        results.append({"dtype": dtype} | common.run_worker(__file__, task | {"dtype": dtype}))
    columns = ["dtype", "s/step", "CPU s/step", "tokens/s", "GFLOP/s", "ceiling", "utilisation"]
    columns += ["s/block", "compile s", "compilations", "peak MB"]
    keys = ["dtype", "step", "step_cpu", "tokens_per_second", "gflops", "ceiling", "utilisation"]
    keys += ["block", "compile", "compilations", "peak_mb"]
    common.table(columns, [[r.get(k, r.get("error")) for k in keys] for r in results])
    print(f"goal: utilisation of {GOAL} or more\n")
    common.write_results("calibrate", facts, results, args.json)


def work(task: dict[str, Any]) -> dict[str, Any]:
    """Times the steps of one block, then the whole method on a few blocks."""
    import jax
    import jax.numpy as jnp

    from jaxcomp import job
    from jaxcomp.calibrate import Calibration
    from jaxcomp.calibrate.fit import fit_init, fit_step
    from jaxcomp.core.quantize import QuantSpec
    from jaxcomp.data.batches import sample_windows
    from jaxcomp.data.corpora import load_text
    from jaxcomp.methods import FlatQuant, flatquant
    from jaxcomp.models.decoder import load_block
    from jaxcomp.models.scaling import as_float32
    from jaxcomp.models.stream import embed_batches, step_batches

    loaded = job.load("demo:smollm2", lazy=True)
    ids = loaded.encode(load_text("wiki_calib").text)
    windows = sample_windows(ids, 8 * task["batch"], task["length"], 0)
    cfg = FlatQuant(
        act=QuantSpec(4, granularity="token", dynamic=True),
        kv=QuantSpec(4, granularity="head", symmetric=False, dynamic=True),
        init="hadamard",
        epochs=1,
        dtype=task["dtype"],
        alpha=None,
    )
    block = as_float32(jax.device_put(load_block(loaded.model.blocks[0])))
    hidden = embed_batches(loaded.model, windows, task["batch"])
    targets = step_batches(block, hidden)
    setting = cfg.setting(block, 0, 1)
    params = flatquant._init(cfg, block, setting, {}, 0)
    fixed = dict(loss=flatquant.block_loss, setting=setting, spec=flatquant._spec(cfg, 8))
    state = fit_init(params, fixed["spec"])

    def step(i: int) -> float:
        nonlocal state
        state, value = fit_step(state, (block, hidden[i % 8], targets[i % 8]), **fixed)
        return float(value)

    square = jnp.ones((SQUARE, SQUARE), task["dtype"])
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    first, _, _ = common.clocked(lambda: step(0))
    jax.block_until_ready(product(square))
    steps, ceilings = [], []
    for i in range(task["steps"]):
        steps.append(common.clocked(lambda i=i: step(i))[:2])
        wall, _, _ = common.clocked(lambda: jax.block_until_ready(product(square)))
        ceilings.append(2 * SQUARE**3 / wall / 1e9)
    seconds, cpu = (statistics.median(x) for x in zip(*steps, strict=True))
    ceiling, tokens = statistics.median(ceilings), task["length"] * task["batch"]
    gflops = 3 * forward_flops(block, task["length"]) * task["batch"] / seconds / 1e9
    model = loaded.model.replace(blocks=loaded.model.blocks[: task["blocks"]])
    started = time.perf_counter()
    result = cfg(model, Calibration(windows, task["batch"]))
    whole = time.perf_counter() - started
    rows = [row.seconds for row in result.rows if row.linear is None]
    return {
        "step": seconds,
        "step_cpu": cpu,
        "compile": first - seconds,
        "tokens_per_second": tokens / seconds,
        "gflops": gflops,
        "ceiling": ceiling,
        "utilisation": gflops / ceiling,
        "block": statistics.median(rows[1:] or rows),
        "whole": whole,
        "compilations": fit_step._cache_size(),
        "peak_mb": common.memory("VmHWM") / 1e6,
    }


def forward_flops(block: Any, length: int) -> float:
    """Floating-point operations of the block's products on one window, attention causal."""
    from jaxcomp.core.tree import get_at
    from jaxcomp.models.anatomy import anatomy

    weights = sum(get_at(block, path).w.size for path in anatomy(block).linears)
    pairs = length * (length + 1) / 2
    return 2 * weights * length + 4 * pairs * block.attn.n_heads * block.attn.head_dim


if __name__ == "__main__":
    main()
