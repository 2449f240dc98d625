"""A tiny collection, as an object and as a BEIR folder."""

from __future__ import annotations

import json
import pathlib

from inranker_jax.corpora.beir import BeirCollection
from inranker_jax.records import Document, Query

TEXTS = {
    "d1": "shock waves over a flat plate",
    "d2": "heat transfer in a flat plate",
    "d3": "a wave of heat",
    "d4": "wing in a slipstream",
    "d5": "shock shock shock",
    "d6": "plate",
}
QUERIES = {"q1": "shock wave", "q2": "flat plate", "q3": "slipstream wing", "q4": "never judged plate"}
QRELS = {"q1": {"d1": 2, "d5": 1}, "q2": {"d2": 1, "d6": 0}, "q3": {"d4": 1}}


def collection(name: str = "mini") -> BeirCollection:
    """The collection in memory."""
    documents = {key: Document(key, text) for key, text in TEXTS.items()}
    return BeirCollection(name, documents, {key: Query(key, text) for key, text in QUERIES.items()}, QRELS)


def write_beir(folder: pathlib.Path) -> pathlib.Path:
    """Writes the collection as a BEIR folder."""
    (folder / "qrels").mkdir(parents=True)
    rows = [json.dumps({"_id": key, "title": "", "text": text}) for key, text in TEXTS.items()]
    (folder / "corpus.jsonl").write_text("\n".join(rows) + "\n")
    rows = [json.dumps({"_id": key, "text": text}) for key, text in QUERIES.items()]
    (folder / "queries.jsonl").write_text("\n".join(rows) + "\n")
    rows = [
        f"{query}\t{document}\t{grade}" for query, row in QRELS.items() for document, grade in row.items()
    ]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(rows) + "\n")
    return folder


def overlap(pairs: list[tuple[str, str]]) -> list[float]:
    """A scorer for tests: shared words, per word of the document."""
    return [len(set(q.split()) & set(d.split())) / len(d.split()) for q, d in pairs]
