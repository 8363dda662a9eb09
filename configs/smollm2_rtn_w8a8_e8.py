"""SmolLM2-135M in eight bits throughout, embedding and head too: what a CPU generates from fastest.

Run: jaxcomp compress demo:smollm2 configs/smollm2_rtn_w8a8_e8.py --out OUT
     jaxcomp generate OUT --execution integer --prompt "The Atlantic Ocean is"
Expect: perplexity 20.61; 20.58 with the embedding in floats, dense 20.12 (2026-11-26, 2 CPU cores,
jax 0.10.2).
"""

from jaxcomp import RTN, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    act = QuantSpec(bits=8, granularity="token", dynamic=True)
    return Recipe(
        steps=(RTN(weight=QuantSpec(bits=8), act=act, ends=QuantSpec(bits=8)),),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
