"""AWQ W4 g64 asymmetric of SmolLM2-135M, on 16 windows of 1024 tokens.

The model's width of 576 is no multiple of the usual group of 128.

Run: jaxcomp compress demo:smollm2 configs/smollm2_awq_w4g64.py --out OUT
Expect: perplexity 22.80; rounding to nearest 25.20, dense 20.12 (2026-11-24, 2 CPU cores, jax
0.10.2).
"""

from jaxcomp import AWQ, CalibSpec, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    return Recipe(
        steps=(AWQ(weight=QuantSpec(bits=4, group_size=64, symmetric=False)),),
        calib=CalibSpec("wiki_calib", samples=16, length=1024, batch=4),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
