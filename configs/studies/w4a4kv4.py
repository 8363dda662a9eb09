"""W4A4KV4 of SmolLM2-135M, method by method: rounding, SmoothQuant, QuaRot, FlatQuant, with GPTQ.

Every row has the same grids: weights per channel, activations per token, keys and values per token
and head with a zero point. QuaRot's rotation is random, so its rows are three seeds each. SmolLM2
has nine heads, which an orthogonal matrix mixes, for want of a Hadamard matrix of that order.

Run: jaxcomp study configs/studies/w4a4kv4.py --out OUT
Less: jaxcomp study configs/studies/w4a4kv4.py --out OUT calib.samples=8 --only "QuaRot + GPTQ"
"""

import dataclasses

from jaxcomp import CalibSpec, Perplexity, QuantSpec, Recipe, Study, StudyRow
from jaxcomp.methods import GPTQ, RTN, FlatQuant, QuaRot, SmoothQuant

WEIGHT = QuantSpec(bits=4)
ACT = QuantSpec(bits=4, granularity="token", dynamic=True)
KV = QuantSpec(bits=4, granularity="head", symmetric=False, dynamic=True)
SEEDS = tuple(f"steps.0.seed={seed}" for seed in range(3))


LEARNED = dict(init="hadamard", epochs=1, lr=4e-2, clip_lr=0.4, token_limit=10.0)


def study() -> Study:
    rounded = RTN(weight=WEIGHT, act=ACT, kv=KV)
    solved = GPTQ(weight=WEIGHT, clip="output", first_token_weight=16.0)
    sites = RTN(weight=None, act=ACT, kv=KV)  # after GPTQ, whose text passes without quantizers
    rotation = QuaRot(head_mix="orthogonal")
    flat = FlatQuant(weight=WEIGHT, act=ACT, kv=KV, **LEARNED)
    return Study(
        model="demo:smollm2",
        title="SmolLM2-135M at W4A4KV4",
        rows=(
            row("RTN", rounded),
            row("SmoothQuant + RTN", SmoothQuant(alpha=0.5), rounded),
            row("QuaRot + RTN", rotation, rounded, group="QuaRot", repeats=SEEDS),
            row("QuaRot + GPTQ", rotation, solved, sites, group="QuaRot", repeats=SEEDS),
            row("FlatQuant + RTN", flat, group="FlatQuant", batch=1),
            row(
                "FlatQuant + GPTQ",
                dataclasses.replace(flat, finish="keep"),
                dataclasses.replace(solved, quantized_activations=True),
                group="FlatQuant",
                batch=1,
            ),
        ),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
        show=("perplexity",),
    )


def row(
    name: str, *steps, group: str = "", repeats: tuple[str, ...] = (), batch: int = 4
) -> StudyRow:
    """One row; with `batch` 1 the 16 windows are 16 steps of a fit."""
    calib = CalibSpec("wiki_calib", samples=16, length=1024, batch=batch)
    return StudyRow(name, Recipe(steps, calib), group=group, repeats=repeats)
