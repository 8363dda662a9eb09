"""SmolLM2-135M without five of its thirty blocks; neighbours take over their weights: FuseGPT.

Rates are for one pass over 69,632 tokens a round; the paper's are for twenty over two million.

Run: jaxcomp compress demo:smollm2 configs/smollm2_fusegpt.py --out OUT
The same text and steps without the removed weights: add steps.0.control=lora.
Expect: perplexity 27.02, dense 20.12; blocks 12, 14, 16, 17, 18 go; 18 minutes (2026-11-27, 2 CPU
cores beside tests, jax 0.10.2; row "FuseGPT 5" of configs/studies/layer_pruning.py, whose settings
these are).
"""

from jaxcomp import CalibSpec, FuseGPT, Perplexity, Recipe


def recipe() -> Recipe:
    rates = dict(lr=2e-2, lora_lr=3e-3, norm_lr=1e-4)
    fuse = FuseGPT(
        remove=5, group_size=5, rank=32, lora_rank=32, epochs=1, batch=2, windows=4, **rates
    )
    return Recipe(
        steps=(fuse,),
        calib=CalibSpec("wiki_calib", samples=136, length=512, batch=2),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
