"""RTN W4A4KV4 of SmolLM2-135M: what four bits everywhere do to a model with outliers.

Run: jaxcomp compress demo:smollm2 configs/smollm2_rtn_w4a4kv4.py --out OUT
Expect: perplexity 10,536, dense 20.12 (2026-11-25, 2 CPU cores, jax 0.10.2).
"""

from jaxcomp import RTN, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    act = QuantSpec(bits=4, granularity="token", dynamic=True)
    kv = QuantSpec(bits=4, granularity="head", symmetric=False, dynamic=True)
    return Recipe(
        steps=(RTN(weight=QuantSpec(bits=4), act=act, kv=kv),),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
