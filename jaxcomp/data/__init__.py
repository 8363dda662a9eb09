"""Texts by name and the token windows cut from them; numpy only, nothing of ours is imported."""

from jaxcomp.data.batches import Windows, evaluation_windows, sample_hash, sample_windows
from jaxcomp.data.corpora import CORPORA, Corpus, load_text

__all__ = [
    "CORPORA",
    "Corpus",
    "Windows",
    "evaluation_windows",
    "load_text",
    "sample_hash",
    "sample_windows",
]
