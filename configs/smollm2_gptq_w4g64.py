"""GPTQ W4 g64 symmetric of SmolLM2-135M, on 32 windows of 1024 tokens.

Run: jaxcomp compress demo:smollm2 configs/smollm2_gptq_w4g64.py --out OUT
Expect: the README's table, which `python benchmarks/quality.py` prints.
"""

from jaxcomp import GPTQ, CalibSpec, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    return Recipe(
        steps=(
            GPTQ(weight=QuantSpec(bits=4, group_size=64), clip="output", first_token_weight=16.0),
        ),
        calib=CalibSpec("wiki_calib", samples=32, length=1024, batch=4),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
