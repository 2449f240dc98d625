"""First-stage retrieval: who becomes a candidate before a model reads a word."""

from __future__ import annotations

from inranker_jax.retrieval.bm25 import LANGUAGES, BM25Index

__all__ = ["LANGUAGES", "BM25Index"]
