"""Compression methods: frozen settings, called on a model. One file each."""

from jaxcomp.methods.gptq import GPTQ
from jaxcomp.methods.quarot import QuaRot
from jaxcomp.methods.rtn import RTN

METHODS = {
    "RTN": RTN,  # round to nearest; no data
    "GPTQ": GPTQ,  # round in turn, let later channels make up for the error
    "QuaRot": QuaRot,  # rotate by Hadamard matrices; quantizes nothing itself
}

__all__ = ["GPTQ", "METHODS", "RTN", "QuaRot"]
