"""Readers of collections and label files in their published formats: one module per format, text only.

`open_corpus` and `open_queries_any` open any of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inranker_jax.corpora.corpus import Corpus, QuerySet, open_corpus, open_queries_any
    from inranker_jax.corpora.malformed import MalformedReport

__all__ = ["Corpus", "MalformedReport", "QuerySet", "open_corpus", "open_queries_any"]

_HOMES = {
    "Corpus": "inranker_jax.corpora.corpus",
    "MalformedReport": "inranker_jax.corpora.malformed",
    "QuerySet": "inranker_jax.corpora.corpus",
    "open_corpus": "inranker_jax.corpora.corpus",
    "open_queries_any": "inranker_jax.corpora.corpus",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'inranker_jax.corpora' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
