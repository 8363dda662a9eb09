"""GPTQ W4A16 in groups of 64 of SmolLM2-135M, embedding and head in eight bits.

Run: jaxcomp compress demo:smollm2 configs/smollm2_gptq_w4g64_e8.py --out OUT
Expect: perplexity 22.17; 22.16 with the embedding in floats, dense 20.12; 88 MB in all, 269 at
16 bits (2026-11-26, 2 CPU cores, jax 0.10.2).
"""

from jaxcomp import GPTQ, RTN, CalibSpec, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    return Recipe(
        steps=(
            GPTQ(weight=QuantSpec(bits=4, group_size=64), clip="output", first_token_weight=16.0),
            RTN(weight=None, ends=QuantSpec(bits=8)),
        ),
        calib=CalibSpec("wiki_calib", samples=32, length=1024, batch=4),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
