"""GPTQ of SmolLM2-135M per channel, in as many bits as uniform W4, which AutoBits spends by site.

Run: jaxcomp compress demo:smollm2 configs/smollm2_autobits_gptq_w4.py --out OUT
Expect: perplexity 24.40, worse than the 23.97 of uniform W4 at the same 4.05 bits: prices are
those of rounding, and GPTQ makes other linears dear (2026-11-25, 2 CPU cores, jax 0.10.2).
"""

from jaxcomp import GPTQ, AutoBits, CalibSpec, Perplexity, QuantSpec, Recipe

UNIFORM = 4.046875  # stored bits of a weight where every linear has four, scales included


def recipe() -> Recipe:
    solve = GPTQ(weight=QuantSpec(bits=4), clip="output", first_token_weight=16.0)
    return Recipe(
        steps=(AutoBits(solve, target_bits=UNIFORM, bits=(3, 4, 5, 6), windows=2),),
        calib=CalibSpec("wiki_calib", samples=32, length=1024, batch=4),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
