"""QuaRot taken apart: which rotation, with the cache or without, with the authors' clip ratios.

SmolLM2-135M with weights and activations at four bits, rounded to nearest. One factor at a time
changes against the first row; three seeds each, for the rotations are random. The authors cut the
ranges of activations to 0.9 and those of the cache to 0.95 (arXiv 2404.00456).

The cache costs 420 against 371 (means), clip ratios save more, 314, and Hadamard or orthogonal
makes no difference that three seeds show. The residual stream alone is not enough, 4,479. With the
weights left alone it is 35.1: rounding rotated weights to nearest is what fails here, and GPTQ
mends that to 44 (2026-11-25, 2 CPU cores, jax 0.10.2; dense 20.12).

Run: jaxcomp study configs/studies/quarot_parts.py --out OUT
"""

from jaxcomp import Perplexity, QuantSpec, Recipe, Study, StudyRow
from jaxcomp.methods import RTN, QuaRot

WEIGHT = QuantSpec(bits=4)
ACT = QuantSpec(bits=4, granularity="token", dynamic=True)
KV = QuantSpec(bits=4, granularity="head", symmetric=False, dynamic=True)
SEEDS = tuple(f"steps.0.seed={seed}" for seed in range(3))


def study() -> Study:
    hadamard = QuaRot(head_mix="orthogonal")
    orthogonal = QuaRot(head_mix="orthogonal", rotation="orthogonal")
    stream = QuaRot(values=False, keys=False, ffn=False, head_mix="none", rotation="orthogonal")
    return Study(
        model="demo:smollm2",
        title="QuaRot taken apart: SmolLM2-135M at four bits",
        rows=(
            row("W4A4KV4", hadamard, RTN(WEIGHT, ACT, KV)),
            row("W4A4", hadamard, RTN(WEIGHT, ACT)),
            row("W4A4, orthogonal", orthogonal, RTN(WEIGHT, ACT)),
            row("W4A4, orthogonal, residual stream alone", stream, RTN(WEIGHT, ACT)),
            row("W4A4KV4, clip ratios", hadamard, RTN(WEIGHT, ACT, KV, act_clip=0.9, kv_clip=0.95)),
            row("A4", hadamard, RTN(None, ACT)),
        ),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
        show=("perplexity",),
    )


def row(name: str, *steps) -> StudyRow:
    return StudyRow(name, Recipe(steps), repeats=SEEDS)
