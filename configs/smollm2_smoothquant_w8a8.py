"""SmoothQuant W8A8 of SmolLM2-135M: weights per channel, activations per token at run time.

Run: jaxcomp compress demo:smollm2 configs/smollm2_smoothquant_w8a8.py --out OUT
Expect: perplexity 20.36; 20.58 without SmoothQuant, dense 20.12 (2026-11-24, 2 CPU cores, jax
0.10.2).
"""

from jaxcomp import RTN, CalibSpec, Perplexity, QuantSpec, Recipe, SmoothQuant


def recipe() -> Recipe:
    act = QuantSpec(bits=8, granularity="token", dynamic=True)
    return Recipe(
        steps=(SmoothQuant(alpha=0.5), RTN(weight=QuantSpec(bits=8), act=act)),
        calib=CalibSpec("wiki_calib", samples=16, length=1024, batch=4),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
