"""Round-to-nearest W4 g64 symmetric of SmolLM2-135M: the floor that other methods are read against.

Run: jaxcomp compress demo:smollm2 configs/smollm2_rtn_w4g64.py --out OUT
Expect: the README's table, which `python benchmarks/quality.py` prints.
"""

from jaxcomp import RTN, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    return Recipe(
        steps=(RTN(weight=QuantSpec(bits=4, group_size=64)),),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
