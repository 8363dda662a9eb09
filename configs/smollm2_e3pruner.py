"""SmolLM2-135M without five of its thirty blocks, searched for and distilled: E³-Pruner.

The settings are for two CPU cores: short windows, few steps at high rates. The original's budget is
half a billion tokens; this one reads 131,072.

Run: jaxcomp compress demo:smollm2 configs/smollm2_e3pruner.py --out OUT
Ours: not run yet.
"""

from jaxcomp import (
    CalibSpec,
    Descent,
    E3Pruner,
    MaskSearch,
    Perplexity,
    Recipe,
    Recovery,
    Trainable,
)


def recipe() -> Recipe:
    search = MaskSearch(steps=120, lr=0.03, init_windows=8, windows=128, validation=8)
    recover = Recovery(Trainable("blocks"), fit=Descent(lr=3e-4, validation=8))
    return Recipe(
        steps=(E3Pruner(5, search=search, recover=recover),),
        calib=CalibSpec("wiki_calib", samples=512, length=256, batch=4),
        evals=(Perplexity("wiki_eval", context=1024, tokens=4092),),
    )
