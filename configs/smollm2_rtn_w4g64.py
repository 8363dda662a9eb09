"""Round-to-nearest W4 g64 symmetric of SmolLM2-135M: the floor that other methods are read against.

Run: jaxcomp compress demo:smollm2 configs/smollm2_rtn_w4g64.py --out OUT
Expect: perplexity 30.41, dense 20.12 (2026-11-24, 2 CPU cores, jax 0.10.2;
`python benchmarks/quality.py`).
"""

from jaxcomp import RTN, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    return Recipe(
        steps=(RTN(weight=QuantSpec(bits=4, group_size=64)),),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
