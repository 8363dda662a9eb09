"""GPTQ of SmolLM2-135M at 3.5 stored bits a weight, in widths that AutoBits chooses by site.

Run: jaxcomp compress demo:smollm2 configs/smollm2_autobits_gptq_3p5.py --out OUT
Expect: not measured yet.
"""

from jaxcomp import GPTQ, AutoBits, CalibSpec, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    grid = QuantSpec(bits=3, group_size=64, symmetric=False)
    solve = GPTQ(weight=grid, clip="output", first_token_weight=16.0)
    return Recipe(
        steps=(AutoBits(solve, target_bits=3.5, bits=(2, 3, 4, 5), windows=2),),
        calib=CalibSpec("wiki_calib", samples=16, length=1024, batch=4),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
