"""FlatQuant W4A4KV4 of SmolLM2-135M in a few minutes: 10 steps of 1,024 tokens a block.

Run: jaxcomp compress demo:smollm2 configs/smollm2_flatquant_w4a4kv4_demo.py --out OUT
Expect: perplexity 39.35, dense 20.12, after 129 s of fit (2026-11-25, 2 CPU cores, jax 0.10.2;
`make demo`).
"""

from jaxcomp import CalibSpec, FlatQuant, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    act = QuantSpec(bits=4, granularity="token", dynamic=True)
    kv = QuantSpec(bits=4, granularity="head", symmetric=False, dynamic=True)
    return Recipe(
        steps=(
            FlatQuant(
                weight=QuantSpec(bits=4),
                act=act,
                kv=kv,
                epochs=1,
                init="hadamard",
                lr=4e-2,
                clip_lr=0.4,
                token_limit=10.0,
            ),
        ),
        calib=CalibSpec("wiki_calib", samples=10, length=1024, batch=1),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
