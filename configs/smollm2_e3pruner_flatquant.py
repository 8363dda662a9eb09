"""Fewer blocks and fewer bits of SmolLM2-135M: E³-Pruner, then LinearPatch, then FlatQuant W4A4KV4.

Five of thirty blocks go, searched for on 61,440 tokens; what is left is distilled on 32,768, the
cuts get their least-squares maps, and FlatQuant rounds weights, activations and cache to 4 bits.

Run: jaxcomp compress demo:smollm2 configs/smollm2_e3pruner_flatquant.py --out OUT
Ours: perplexity 39.76, dense 20.12, 163 MB of 236; 24 minutes, of which E³-Pruner 16 (2026-11-27,
2 CPU cores, in part beside tests, jax 0.10.2). FlatQuant alone, on fewer tokens, leaves all thirty
blocks at 39.35 (configs/smollm2_flatquant_w4a4kv4_demo.py).
"""

from jaxcomp import (
    CalibSpec,
    Descent,
    E3Pruner,
    FlatQuant,
    LinearPatch,
    MaskSearch,
    Perplexity,
    QuantSpec,
    Recipe,
    Recovery,
    TopKLoss,
    Trainable,
)


def recipe() -> Recipe:
    search = MaskSearch(steps=60, batch=2, lr=0.03, init_windows=8)
    fit = Descent(lr=2e-4, batch=2, validation=4)
    recover = Recovery(Trainable("blocks"), TopKLoss(entropy="up"), fit)
    token = QuantSpec(bits=4, granularity="token", dynamic=True)
    head = QuantSpec(bits=4, granularity="head", symmetric=False, dynamic=True)
    flat = dict(epochs=1, init="hadamard", lr=4e-2, clip_lr=0.4, token_limit=10.0)
    return Recipe(
        steps=(
            E3Pruner(5, search=search, recover=recover),
            LinearPatch("lstsq"),
            FlatQuant(weight=QuantSpec(bits=4), act=token, kv=head, **flat),
        ),
        calib=CalibSpec("wiki_calib", samples=68, length=512, batch=4),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
