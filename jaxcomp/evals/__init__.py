"""Evaluations: frozen settings, called on a model and a tokenizer's encode; each gives numbers."""

from jaxcomp.evals.cost import Cost
from jaxcomp.evals.perplexity import Perplexity

EVALS = {
    "Perplexity": Perplexity,  # exp of the mean next-token loss on a text
    "Cost": Cost,  # bytes, bits a weight, tokens a second, peak memory
}

__all__ = ["EVALS", "Cost", "Perplexity"]
