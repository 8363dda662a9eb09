"""FlatQuant W4A16 of Llama-3-8B, per channel and symmetric (arXiv 2410.09426).

Run: jaxcomp compress DIR configs/llama3_8b_flatquant_w4.py --out OUT
Needs: one accelerator of 40 GB or more.
Paper: perplexity 6.54 on WikiText-2, 10.17 on C4 (GPTQ 7.00, 11.80).
Ours: not run yet.
"""

from jaxcomp import CalibSpec, FlatQuant, Perplexity, QuantSpec, Recipe


def recipe() -> Recipe:
    int4 = QuantSpec(bits=4)
    return Recipe(
        steps=(FlatQuant(weight=int4, epochs=15, lr=5e-3, clip_lr=5e-2, dtype="bfloat16"),),
        calib=CalibSpec("wikitext2", samples=128, length=2048, batch=4),
        evals=(Perplexity("wikitext2", context=2048), Perplexity("c4", context=2048)),
    )
