"""GPTQ W4 g64 of SmolLM2-135M on a small calibration budget, in about a minute.

Run: jaxcomp compress demo:smollm2 configs/smollm2_gptq_w4g64_demo.py --out OUT
Expect: perplexity 22.30, dense 20.12 (2026-11-24, 2 CPU cores, jax 0.10.2).
"""

from jaxcomp import GPTQ, CalibSpec, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    return Recipe(
        steps=(
            GPTQ(weight=QuantSpec(bits=4, group_size=64), clip="output", first_token_weight=16.0),
        ),
        calib=CalibSpec("wiki_calib", samples=16, length=1024, batch=4),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
