"""Five of SmolLM2's thirty blocks removed: who chooses, and what a patch mends; nothing is trained.

Of the first rows, on half of the text: by influence 35.70, with least-squares maps 28.67; dense
18.62 (2026-11-26, 2 CPU cores, jax 0.10.2; the command below with calib.samples=8).

Run: jaxcomp study configs/studies/block_removal.py --out OUT
"""

from jaxcomp import CalibSpec, LinearPatch, Perplexity, PruneBlocks, Recipe, Study, StudyRow

CALIB = CalibSpec("wiki_calib", samples=16, length=512, batch=4)
REMOVE = 5
# Greedy searches pass over the text about 70 times, the others once or a few times.
WINDOWS = {"sleb": 4, "macro_influence": 4, "ppl": 8, "taylor": 4, "taylor+": 4}
CHOSEN_BY = (
    *("bi", "block_cos", "ppl", "taylor", "angular", "deepest", "every_other", "macro_influence"),
    *("sleb", "taylor+", "magnitude", "relative_change", "channel_cos"),
)
RANDOM = tuple(f"steps.0.seed={seed}" for seed in range(3))
PATCHES = {
    "lstsq": LinearPatch("lstsq"),
    "hadamard": LinearPatch("hadamard"),
    "scalar": LinearPatch("scalar"),
    "diag": LinearPatch("diag"),
    "mlp_branch": LinearPatch("mlp_branch"),
    "hadamard, first token left alone": LinearPatch("hadamard", skip_first=True),
    "lstsq, first token left alone": LinearPatch("lstsq", skip_first=True),
    "hadamard, mean of ratios": LinearPatch("hadamard", reduction="mean_of_ratios"),
}


def study() -> Study:
    first, *later = map(plain, CHOSEN_BY)
    return Study(
        model="demo:smollm2",
        title=f"SmolLM2-135M without {REMOVE} of its 30 blocks, nothing trained",
        rows=(
            first,
            *(patched("bi", name) for name in ("lstsq", "hadamard")),
            patched("bi", "lstsq", inputs="compressed"),
            *later,
            *(patched("block_cos", name) for name in PATCHES),
            plain("random", repeats=RANDOM),
            *(patched("sleb", name) for name in ("lstsq", "hadamard")),
        ),
        evals=(Perplexity("wiki_eval", context=1024, tokens=4092),),
        show=("perplexity",),
    )


def prune(metric: str) -> PruneBlocks:
    return PruneBlocks(REMOVE, metric, windows=WINDOWS.get(metric))


def plain(metric: str, repeats: tuple[str, ...] = ()) -> StudyRow:
    return StudyRow(metric, Recipe((prune(metric),), CALIB), group="removed", repeats=repeats)


def patched(metric: str, name: str, **settings: str) -> StudyRow:
    patch = LinearPatch(**{**vars(PATCHES[name]), **settings})
    note = "".join(f", {value} inputs" for value in settings.values())
    recipe = Recipe((prune(metric), patch), CALIB)
    return StudyRow(f"{metric} + {name}{note}", recipe, group=f"{metric}, patched")
