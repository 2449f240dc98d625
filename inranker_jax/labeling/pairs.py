"""The unit of labelling: a (query, document) pair with its ids and its texts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PairText:
    """A pair as a teacher gets it.

    Attributes:
      query_id: id of the query; only teachers that look labels up (a TREC run) need it.
      document_id: id of the document.
      query: text of the query, stripped.
      document: contents of the document (title and text joined), stripped.
    """

    query_id: str
    document_id: str
    query: str
    document: str
