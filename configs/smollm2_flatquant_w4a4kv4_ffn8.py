"""FlatQuant W4A4KV4 of SmolLM2-135M with the input of `down` and its weight at eight bits.

Run: jaxcomp compress demo:smollm2 configs/smollm2_flatquant_w4a4kv4_ffn8.py --out OUT
Expect: perplexity 25.60 without GPTQ, dense 20.12 (2026-11-25, 2 CPU cores, jax 0.10.2).
"""

from jaxcomp import CalibSpec, FlatQuant, Override, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    act = QuantSpec(bits=4, granularity="token", dynamic=True)
    kv = QuantSpec(bits=4, granularity="head", symmetric=False, dynamic=True)
    return Recipe(
        steps=(
            FlatQuant(
                weight=QuantSpec(bits=4),
                act=act,
                kv=kv,
                epochs=2,
                init="hadamard",
                lr=4e-2,
                clip_lr=0.4,
                token_limit=10.0,
                overrides=(Override(sites=("ffn_mid",), weight_bits=8, act_bits=8),),
            ),
        ),
        calib=CalibSpec("wiki_calib", samples=16, length=1024, batch=1),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
