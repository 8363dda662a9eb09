"""GPTQ of SmolLM2-135M per channel, in as many bits as uniform W4, which AutoBits spends by site.

Run: jaxcomp compress demo:smollm2 configs/smollm2_autobits_gptq_w4.py --out OUT
Expect: not measured yet.
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
