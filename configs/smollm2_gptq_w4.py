"""GPTQ W4 per-channel symmetric of SmolLM2-135M, on 32 windows of 1024 tokens.

Run: jaxcomp compress demo:smollm2 configs/smollm2_gptq_w4.py --out OUT
Expect: perplexity 23.97; rounding 36.89, dense 20.12 (2026-11-24, 2 CPU cores, jax 0.10.2;
`python benchmarks/quality.py`).
"""

from jaxcomp import GPTQ, CalibSpec, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    return Recipe(
        steps=(GPTQ(weight=QuantSpec(bits=4), clip="output", first_token_weight=16.0),),
        calib=CalibSpec("wiki_calib", samples=32, length=1024, batch=4),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
