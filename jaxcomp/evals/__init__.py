"""Evaluations: frozen settings, called on a model and a tokenizer's encode; each gives numbers.

`Agreement` alone takes two models, and is therefore none of the evaluations of a recipe.
"""

from jaxcomp.evals.agreement import Agreement
from jaxcomp.evals.choice import Choice
from jaxcomp.evals.cost import Cost
from jaxcomp.evals.gold import Gold
from jaxcomp.evals.perplexity import Perplexity

EVALS = {
    "Perplexity": Perplexity,  # exp of the mean next-token loss on a text
    "Choice": Choice,  # accuracy on a multiple-choice task, by likelihood
    "Gold": Gold,  # bits a byte of a task's right answers
    "Cost": Cost,  # bytes, bits a weight, tokens a second, peak memory
}

__all__ = ["EVALS", "Agreement", "Choice", "Cost", "Gold", "Perplexity"]
