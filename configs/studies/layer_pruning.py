"""Three, five and eight of SmolLM2's thirty blocks removed: who chooses, what mends, what trains.

Rows without training choose and patch on 8,192 tokens. Rows that train get the same 65,536 tokens
once, and 4,096 more that most set aside; FuseGPT reads all once for every block that goes. What
they train is the blocks, a patch, or low-rank additions. Perplexity is on Wikipedia text, bits a
byte on gold solutions, `retained` the mean over tasks of accuracy over the dense model's.
`curves.png` shows all along the number of blocks.

Run: jaxcomp study configs/studies/layer_pruning.py --out OUT
Less: jaxcomp study configs/studies/layer_pruning.py --out OUT --only "bi 5" --only "bi + lstsq 5"
"""

from jaxcomp import (
    GPTQ,
    CalibSpec,
    Descent,
    Distill,
    E3Pruner,
    FuseGPT,
    LinearPatch,
    MaskSearch,
    MergeBlocks,
    Perplexity,
    PruneBlocks,
    QuantSpec,
    Recipe,
    Recovery,
    Study,
    StudyRow,
    TopKLoss,
    Trainable,
)
from jaxcomp.evals import Choice, Cost, Gold

FREE = CalibSpec("wiki_calib", samples=16, length=512, batch=4)
TRAIN = CalibSpec("wiki_calib", samples=136, length=512, batch=2)
CHOOSE = dict(bi=16, block_cos=16, taylor=8, ppl=8, sleb=4, macro_influence=4)
CONTROLS = dict(random=None, deepest=None)
RANDOM = tuple(f"steps.0.seed={seed}" for seed in range(3))
PATCHES = ("scalar", "diag", "hadamard", "lstsq", "mlp_branch")
FIT = Descent(lr=2e-4, batch=2, validation=8)
W4 = GPTQ(weight=QuantSpec(bits=4, group_size=64), clip="output", first_token_weight=16.0)


def study() -> Study:
    wiki = Perplexity("wiki_eval", context=1024, tokens=8184)
    return Study(
        model="demo:smollm2",
        title="SmolLM2-135M without some of its 30 blocks",
        rows=(
            *(row for metric in CHOOSE | CONTROLS for row in chosen(metric)),
            *(row for kind in PATCHES for row in patched(kind)),
            *merged(5),
            *map(quantized, (0, 3, 5, 8)),
            *trained(5),
        ),
        evals=(
            wiki,
            Gold("minerva_math_500/gold_bpb_0shot", limit=25),
            Gold("gsm8k/gold_bpb_5shot", limit=25),
            Choice("piqa", limit=100),
            Choice("arc_easy", limit=100),
            Choice("hellaswag", limit=100),
            Cost(prompt=256, new=64),
        ),
        show=(f"{wiki.name}: perplexity", "bits_per_byte", "retained", "decode_tokens_per_s"),
        along="removed",
    )


def chosen(metric: str) -> list[StudyRow]:
    repeats = RANDOM if metric == "random" else ()
    return [row(metric, n, FREE, prune(n, metric), repeats=repeats) for n in (3, 5, 8)]


def patched(kind: str) -> list[StudyRow]:
    return [row(f"bi + {kind}", n, FREE, prune(n), LinearPatch(kind)) for n in (3, 5, 8)]


def merged(n: int) -> list[StudyRow]:
    """Neighbours made one, where the walk goes and at the end."""
    return [
        row("LaCo, two at a time", n, FREE, MergeBlocks("laco", remove=n, span=2)),
        row("the last two merged", n, FREE, MergeBlocks("last", remove=n)),
    ]


def quantized(n: int) -> StudyRow:
    """Fewer blocks and fewer bits; 0 is quantization alone."""
    steps = (prune(n), LinearPatch("lstsq"), W4) if n else (W4,)
    return row("bi + lstsq, GPTQ W4 g64", n, FREE, *steps)


def trained(n: int) -> list[StudyRow]:
    """What is trained on equal text; searches choose on the first windows of it."""
    blocks, lora = Trainable("blocks"), Trainable("lora", rank=32)
    fuse = dict(group_size=5, rank=32, lora_rank=32, lr=2e-2, lora_lr=3e-3, norm_lr=1e-4, batch=2)
    fuse |= dict(epochs=1, windows=4)
    search = MaskSearch(steps=120, batch=2, lr=0.03, init_windows=8, validation=8)
    patch, dense = LinearPatch("lstsq"), LinearPatch("hadamard", form="dense")
    entropy = Recovery(blocks, TopKLoss(entropy="up"), FIT)
    steps = {
        "bi, blocks distilled": (prune(n), Distill(blocks, fit=FIT)),
        "bi + lstsq, blocks distilled": (prune(n), patch, Distill(blocks, fit=FIT)),
        "bi + hadamard, patch distilled": (prune(n), dense, Distill(Trainable("patches"), fit=FIT)),
        "bi + lstsq, patch distilled": (prune(n), patch, Distill(Trainable("patches"), fit=FIT)),
        "bi, LoRA distilled": (
            prune(n),
            Distill(lora, fit=Descent(lr=1e-3, batch=2, validation=8)),
        ),
        "random, blocks distilled": (prune(n, "random"), Distill(blocks, fit=FIT)),
        "FuseGPT": (FuseGPT(remove=n, **fuse),),
        "FuseGPT's control, LoRA": (FuseGPT(remove=n, control="lora", **fuse),),
        "E³-Pruner, search alone": (E3Pruner(n, search=search, recover=None),),
        "E³-Pruner": (E3Pruner(n, search=search, recover=entropy),),
    }
    return [row(name, n, TRAIN, *chain) for name, chain in steps.items()]


def prune(n: int, metric: str = "bi") -> PruneBlocks:
    return PruneBlocks(n, metric, windows=(CHOOSE | CONTROLS)[metric])


def row(name: str, n: int, calib: CalibSpec, *steps, repeats: tuple[str, ...] = ()) -> StudyRow:
    labels = {"removed": str(n)}
    return StudyRow(f"{name} {n}", Recipe(steps, calib), labels, group=name, repeats=repeats)
