"""FlatQuant W4A4KV4 of SmolLM2-135M, then GPTQ: the long fit, 80 steps of 1,024 tokens a block.

Run: jaxcomp compress demo:smollm2 configs/smollm2_flatquant_w4a4kv4.py --out OUT
Expect: perplexity 26.10, dense 20.12; 16 minutes of fit and 7 of GPTQ on a machine that other work
shared (2026-11-25, 2 CPU cores, jax 0.10.2).
"""

from jaxcomp import GPTQ, CalibSpec, FlatQuant, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    int4 = QuantSpec(bits=4)
    act = QuantSpec(bits=4, granularity="token", dynamic=True)
    kv = QuantSpec(bits=4, granularity="head", symmetric=False, dynamic=True)
    return Recipe(
        steps=(
            FlatQuant(
                weight=int4,
                act=act,
                kv=kv,
                epochs=2,
                init="hadamard",
                lr=4e-2,
                clip_lr=0.4,
                token_limit=10.0,
                finish="keep",
            ),
            GPTQ(weight=int4, clip="output", first_token_weight=16.0, quantized_activations=True),
        ),
        calib=CalibSpec("wiki_calib", samples=40, length=1024, batch=1),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
