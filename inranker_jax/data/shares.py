"""On which side of a split a query falls. Without TensorFlow, so that any room can ask."""

from __future__ import annotations

import hashlib


def same_query(query: str) -> str:
    """What queries have in common that are one to a split: their text, whatever its case and spacing."""
    return " ".join(query.casefold().split())


def query_share(query: str) -> float:
    """A number in [0, 1) which depends only on the query's text, whatever its case and spacing.

    A query whose share is below the validation fraction is in split "validation". Two queries that differ only
    in case or spacing fall on the same side.
    """
    return int.from_bytes(hashlib.sha256(same_query(query).encode("utf-8")).digest()[:8], "big") / 2**64
