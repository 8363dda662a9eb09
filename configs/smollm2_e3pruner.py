"""SmolLM2-135M without five of its thirty blocks, searched for and distilled: E³-Pruner.

The settings are for two CPU cores: few steps at high rates. The original's budget is half a billion
tokens; this one searches on 122,880 and learns from 65,536.

Run: jaxcomp compress demo:smollm2 configs/smollm2_e3pruner.py --out OUT
Ours: perplexity 26.39, dense 20.12; the search alone 36.62, which went from blocks 12, 13, 14, 16,
17 to 12, 14, 16, 17, 18; 19 minutes (2026-11-27, 2 CPU cores beside tests, jax 0.10.2; rows
"E³-Pruner 5" and "E³-Pruner, search alone 5" of configs/studies/layer_pruning.py, whose settings
these are).
"""

from jaxcomp import (
    CalibSpec,
    Descent,
    E3Pruner,
    MaskSearch,
    Perplexity,
    Recipe,
    Recovery,
    TopKLoss,
    Trainable,
)


def recipe() -> Recipe:
    search = MaskSearch(steps=120, batch=2, lr=0.03, init_windows=8, validation=8)
    fit = Descent(lr=2e-4, batch=2, validation=8)
    recover = Recovery(Trainable("blocks"), TopKLoss(entropy="up"), fit)
    return Recipe(
        steps=(E3Pruner(5, search=search, recover=recover),),
        calib=CalibSpec("wiki_calib", samples=136, length=512, batch=2),
        evals=(Perplexity("wiki_eval", context=1024, tokens=8184),),
    )
