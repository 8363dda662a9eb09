"""SmolLM2-135M rounded to nearest in the size of uniform W4, in widths that AutoBits chooses.

Run: jaxcomp compress demo:smollm2 configs/smollm2_autobits_rtn_w4.py --out OUT
Expect: perplexity 32.61; uniform W4 of the same 4.05 bits and clip search 51.59, dense 20.12
(2026-11-25, 2 CPU cores, jax 0.10.2).
"""

from jaxcomp import RTN, AutoBits, CalibSpec, Perplexity, QuantSpec, Recipe

UNIFORM = 4.046875  # stored bits of a weight where every linear has four, scales included


def recipe() -> Recipe:
    rounding = RTN(weight=QuantSpec(bits=4), clip=True)
    return Recipe(
        steps=(AutoBits(rounding, target_bits=UNIFORM, bits=(3, 4, 5, 6), windows=2),),
        calib=CalibSpec("wiki_calib", samples=2, length=1024, batch=2),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
