"""SmoothQuant W4A4KV4 of SmolLM2-135M: what scales alone do for four bits, a floor for rotations.

Run: jaxcomp compress demo:smollm2 configs/smollm2_smoothquant_w4a4kv4.py --out OUT
Expect: perplexity 4,625; 10,536 without SmoothQuant, dense 20.12 (2026-11-24, 2 CPU cores, jax
0.10.2).
"""

from jaxcomp import RTN, CalibSpec, Perplexity, QuantSpec, Recipe, SmoothQuant


def recipe() -> Recipe:
    act = QuantSpec(bits=4, granularity="token", dynamic=True)
    kv = QuantSpec(bits=4, granularity="head", symmetric=False, dynamic=True)
    return Recipe(
        steps=(SmoothQuant(alpha=0.5), RTN(weight=QuantSpec(bits=4), act=act, kv=kv)),
        calib=CalibSpec("wiki_calib", samples=16, length=1024, batch=4),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
