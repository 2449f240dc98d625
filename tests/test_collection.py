"""The embedded collection is whole, is what its provenance says, and keeps test queries out of training."""

from __future__ import annotations

import collections
import gzip
import hashlib
import json
import math
import pathlib
import re
import sys

import pytest

from inranker_jax.corpora import beir
from inranker_jax.prompts import Tokenizer, preset
from inranker_jax.records import numbered_lines, read_run

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "inranker_jax" / "collections" / "python_docs"
LIST_SIZE = 10


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+", text.lower()))


@pytest.fixture(scope="module")
def documents() -> dict[str, beir.Document]:
    return {document.id: document for document in beir.read_corpus(FOLDER)}


@pytest.fixture(scope="module")
def queries() -> dict[str, beir.Query]:
    return {query.id: query for query in beir.read_queries(FOLDER)}


@pytest.fixture(scope="module")
def kinds() -> dict[str, tuple[str, str]]:
    rows = [json.loads(line) for _, line in numbered_lines(FOLDER / "queries.jsonl.gz")]
    return {row["_id"]: (row["metadata"]["split"], row["metadata"]["kind"]) for row in rows}


@pytest.fixture(scope="module")
def qrels() -> dict[str, dict[str, dict[str, int]]]:
    return {split: beir.read_qrels(FOLDER, split) for split in ("train", "dev", "test")}


@pytest.fixture(scope="module")
def lists() -> dict[str, list[list[tuple[float, float, str, str]]]]:
    """Split -> lists of (true logit, false logit, query id, document id)."""
    found = {}
    for split in ("train", "dev"):
        rows = [line.split("\t") for _, line in numbered_lines(FOLDER / "teacher" / f"{split}.tsv.gz")]
        labels = [(float(true), float(false), query, document) for true, false, query, document in rows]
        found[split] = [labels[n : n + LIST_SIZE] for n in range(0, len(labels), LIST_SIZE)]
    return found


def test_content_is_what_provenance_records() -> None:
    provenance = json.loads((FOLDER / "provenance.json").read_text(encoding="utf-8"))
    recorded = provenance["sha256_of_content"]
    found = {}
    for path in FOLDER.rglob("*"):
        if path.is_file() and path.name not in ("provenance.json", "README.md"):
            data = path.read_bytes()
            content = gzip.decompress(data) if path.suffix == ".gz" else data
            found[path.relative_to(FOLDER).as_posix()] = hashlib.sha256(content).hexdigest()
    assert found == recorded
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 6_000_000


def test_licence_lies_beside_the_text() -> None:
    text = (FOLDER / "LICENSE.txt").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in text
    assert "LICENSE.txt" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_every_label_names_a_known_pair_and_the_positive_comes_first(
    lists, documents, queries, qrels
) -> None:
    for split, groups in lists.items():
        for group in groups:
            ids = {query for _, _, query, _ in group}
            assert ids <= set(queries)
            (query,) = ids
            names = [name for *_, name in group]
            assert len(set(names)) == LIST_SIZE
            assert set(names) <= set(documents)
            assert query.rpartition("?")[0] == names[0]
            if query in qrels[split]:
                assert list(qrels[split][query]) == [names[0]]


def test_logits_are_finite_centred_and_not_judgments(lists) -> None:
    rows = [row for groups in lists.values() for group in groups for row in group]
    assert all(math.isfinite(true) and true == -false for true, false, *_ in rows)
    margins = [true - false for true, false, *_ in rows]
    assert abs(sum(margins) / len(margins)) < 0.05
    assert len(set(margins)) > 1000
    # A teacher made from the judgments would put every positive first; a real one puts most of them first.
    first = [max(group, key=lambda row: row[0]) is group[0] for groups in lists.values() for group in groups]
    assert 0.5 < sum(first) / len(first) < 0.999


def test_held_out_queries_leave_no_trace_in_training(lists, documents, queries, kinds, qrels) -> None:
    held_out = {query for query, (split, _) in kinds.items() if split != "train"}
    assert {kinds[query][1] for query in held_out} == {"summary"}
    labelled = {row[2] for group in lists["train"] for row in group}
    assert labelled == {query for query, (split, _) in kinds.items() if split == "train"}
    texts = {_words(queries[query].text) for query in labelled}
    passages = {query.rpartition("?")[0] for query in held_out}
    assert not [query for query in held_out if _words(queries[query].text) in texts]
    assert not [query for query in labelled if query.rpartition("?")[0] in passages]
    # Their passages stay in the corpus, and hold the query's words nowhere in a row.
    assert passages <= set(documents)
    for query in held_out:
        assert _words(queries[query].text) not in _words(documents[query.rpartition("?")[0]].text)
    for split, size in (("test", 300), ("dev", 150)):
        assert set(qrels[split]) == {query for query, (name, _) in kinds.items() if name == split}
        assert len(qrels[split]) == size


def test_query_texts_are_distinct(queries) -> None:
    repeated = collections.Counter(_words(query.text) for query in queries.values())
    assert [text for text, count in repeated.items() if count > 1] == []


def test_teacher_run_reranks_the_bm25_candidates(documents, queries, qrels) -> None:
    from inranker_jax.retrieval.bm25 import BM25Index

    run = read_run(FOLDER / "teacher" / "test.run.gz")
    judged = [queries[name] for name in qrels["test"]]
    candidates = BM25Index.build(documents.values(), "english", k1=0.9, b=0.4).search(judged, k=50)
    assert {query: set(hits) for query, hits in run.items()} == {
        query: set(hits) for query, hits in candidates.items()
    }


def test_recorded_figures_are_those_of_the_files(documents, queries, qrels) -> None:
    import pytrec_eval

    recorded = json.loads((FOLDER / "provenance.json").read_text(encoding="utf-8"))["test_ndcg_cut_10"]
    run = read_run(FOLDER / "teacher" / "test.run.gz")
    values = pytrec_eval.RelevanceEvaluator(qrels["test"], {"ndcg_cut_10"}).evaluate(run)
    mean = sum(value["ndcg_cut_10"] for value in values.values()) / len(qrels["test"])
    assert mean == pytest.approx(recorded["teacher"], abs=1e-3)
    assert recorded["teacher"] > recorded["bm25"] + 0.03


def test_vocabulary_suits_the_monot5_template(documents) -> None:
    tokenizer = Tokenizer.from_pretrained(FOLDER / "vocabulary")
    contract = preset("monot5")
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    assert len(set(contract.label_ids(tokenizer))) == 2
    ids = contract.encode(tokenizer, ["a b"], ["c d"])[0].tolist()
    pieces = ("▁query", ":", "▁document", ":", "▁relevant", ":")
    assert set(map(tokenizer.piece_to_id, pieces)) <= set(ids)
    texts = [document.contents for document in documents.values()]
    counts = [tokenizer.unk_id in encoded for encoded in tokenizer.encode_batch(texts)]
    assert sum(counts) < len(texts) / 1000


@pytest.fixture(scope="module")
def text_rules():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import python_docs_queries
        import python_docs_text

        yield python_docs_text, python_docs_queries
    finally:
        sys.path.remove(str(ROOT / "scripts"))


MODULE = '''"""Tools for tests."""
class Queue:
    """Hold items, e.g. numbers, until they are fetched.

    Items come out in the order in which they went in. The size has no limit unless one is given.

    >>> Queue()
    """
    def put(self, item):
        """Put one item into the queue."""
    def getNext(self):
        """Take the oldest item out of the queue."""
def copy_items(queue):
    """copy_items(queue) -> list

    Copy all items of a queue. The items stay in
    the queue, and other threads may fetch them at the same time.
    """
'''


def test_passages_of_a_small_library(tmp_path, text_rules) -> None:
    text, queries = text_rules
    (tmp_path / "tools.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "_copy.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_tools.py").write_text('"""A test. ' + "word " * 20 + '"""', encoding="utf-8")
    passages, dropped = text.deduplicate(list(text.stdlib_passages(tmp_path)), 0.5)
    found = {passage.id: (passage.title, passage.summary, passage.text) for passage in passages}
    assert found == {
        "tools:Queue": (
            "tools queue",
            "Hold items, e.g. numbers, until they are fetched.",
            "Items come out in the order in which they went in. The size has no limit unless one is given.",
        ),
        "tools:copy_items": (
            "tools copy items",
            "Copy all items of a queue.",
            "The items stay in the queue, and other threads may fetch them at the same time.",
        ),
        "tools:Queue:members": (
            "tools queue",
            "",
            "put: Put one item into the queue. get next: Take the oldest item out of the queue.",
        ),
    }
    assert dropped == 3  # the private copy, not the public one
    held_out = queries.hold_out(passages, 1, 0, seed=1)
    made = queries.make_queries(passages, held_out, seed=1)
    assert made == queries.make_queries(passages, held_out, seed=1)
    (test_query,) = [query for query in made if query.split == "test"]
    assert [query for query in made if query.passage_id == test_query.passage_id] == [test_query]


def test_long_bodies_are_cut_at_sentences(text_rules) -> None:
    text, _ = text_rules
    sentences = [f"Sentence number {n} " + "word " * 17 + "end." for n in range(7)]
    groups = text.pack(sentences, limit=64)
    assert [len(group) for group in groups] == [3, 3, 1]
    assert [sentence for group in groups for sentence in group] == [" ".join(s.split()) for s in sentences]
    assert [len(piece.split()) for group in text.pack(["word " * 130]) for piece in group] == [64, 64, 2]


def test_negatives_exclude_the_positive_and_its_copies(text_rules) -> None:
    text, queries = text_rules
    passages = {
        name: text.Passage(name, name.partition("#")[0], "", "", "docstring", summary)
        for name, summary in [
            ("a", "Say it."),
            ("a#2", ""),
            ("b", "say it"),
            *((f"n{n}", "") for n in range(20)),
        ]
    }
    query = queries.MadeQuery("a?summary", "Say it.", "summary", "a", "train")
    hits = {name: 1.0 for name in ["a", "a#2", "b", "n3", "n4", "n5"]}
    drawn = queries.sample_negatives(query, hits, passages, count=9, depth=5, seed=3)
    assert len(set(drawn)) == 9
    assert not {"a", "a#2", "b"} & set(drawn)
    # All that BM25 found within the depth come first; "n5" is beyond it.
    assert set(drawn[:2]) == {"n3", "n4"}
    assert drawn == queries.sample_negatives(query, hits, passages, count=9, depth=5, seed=3)
