"""Compression methods: frozen settings, called on a model. One file each."""

from jaxcomp.methods.autobits import AutoBits
from jaxcomp.methods.awq import AWQ
from jaxcomp.methods.distill import Distill
from jaxcomp.methods.e3pruner import E3Pruner
from jaxcomp.methods.flatquant import FlatQuant
from jaxcomp.methods.fusegpt import FuseGPT
from jaxcomp.methods.gptq import GPTQ
from jaxcomp.methods.linearpatch import LinearPatch
from jaxcomp.methods.merge_blocks import MergeBlocks
from jaxcomp.methods.prune_blocks import PruneBlocks
from jaxcomp.methods.quarot import QuaRot
from jaxcomp.methods.rtn import RTN
from jaxcomp.methods.sensitivity import Sensitivity
from jaxcomp.methods.smoothquant import SmoothQuant

METHODS = {
    "RTN": RTN,  # round to nearest; no data
    "GPTQ": GPTQ,  # round in turn, let later channels make up for the error
    "QuaRot": QuaRot,  # rotate by Hadamard matrices; quantizes nothing itself
    "SmoothQuant": SmoothQuant,  # move outliers into the weights; quantizes nothing itself
    "FlatQuant": FlatQuant,  # fit small transforms until weights and activations are flat, round
    "AWQ": AWQ,  # scale up the weights that matter, clamp the rest, round to nearest
    "Sensitivity": Sensitivity,  # measure what each weight can bear; changes nothing
    "Distill": Distill,  # train weights, additions, norms or patches on the original's top words
    "AutoBits": AutoBits,  # choose widths under a budget by that, then let a method quantize
    "PruneBlocks": PruneBlocks,  # remove the blocks that are missed least
    "MergeBlocks": MergeBlocks,  # neighbours become one by a weighted sum; a baseline
    "LinearPatch": LinearPatch,  # put a linear map where blocks were removed
    "E3Pruner": E3Pruner,  # search which blocks go by descent on scores, then distil the rest
    "FuseGPT": FuseGPT,  # remove blocks one by one, fuse their weights into their neighbours
}

__all__ = [
    "AWQ",
    "GPTQ",
    "METHODS",
    "RTN",
    "AutoBits",
    "Distill",
    "E3Pruner",
    "FlatQuant",
    "FuseGPT",
    "LinearPatch",
    "MergeBlocks",
    "PruneBlocks",
    "QuaRot",
    "Sensitivity",
    "SmoothQuant",
]
