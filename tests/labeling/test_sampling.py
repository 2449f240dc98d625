"""Sampling of lists: what is chosen, what is left out and counted, and what a list depends on."""

from __future__ import annotations

from collections import Counter

import pytest

from inranker_jax.corpora.label_store import pair_key
from inranker_jax.errors import InputError
from inranker_jax.labeling.sampling import Positives, SampledList, Sampler, Sampling

DOCUMENTS = {f"d{i}": f"text {i}" for i in range(50)}
QUERIES = {f"q{i}": f"query {i}" for i in range(8)}
RANKED = [f"d{i}" for i in range(50)]
DEFAULT = Sampling()


def sampler(positives: dict[str, list[str]], sampling: Sampling = DEFAULT, **changes: object) -> Sampler:
    texts = {**{"queries": QUERIES, "documents": DOCUMENTS}, **changes}
    skip = bool(texts.pop("skip_unknown", False))
    return Sampler(
        texts["queries"],  # type: ignore[arg-type]
        texts["documents"],  # type: ignore[arg-type]
        Positives(positives, "a test"),
        sampling,
        skip_unknown=skip,
    )


def ids(sampled: SampledList | None) -> list[str]:
    assert sampled is not None
    return [document for document, _ in sampled.documents]


def test_one_positive_first_and_nine_negatives() -> None:
    sampled = sampler({"q1": ["d7"]}).sample("q1", RANKED)
    assert sampled is not None
    assert ids(sampled)[0] == "d7"
    assert len(set(ids(sampled))) == 10
    assert [relevance for _, relevance, _ in sampled.rows()] == [1] + [0] * 9
    for document, key in sampled.documents:
        assert key == pair_key("query 1", DOCUMENTS[document])


def test_a_list_depends_on_its_own_query_and_the_seed_alone() -> None:
    positives = {query: ["d3", "d4"] for query in QUERIES}
    alone = ids(sampler(positives).sample("q5", RANKED))
    among = {
        s.query_id: ids(s)
        for s in sampler(positives).lists([(q, [(d, 0.0) for d in RANKED]) for q in QUERIES])
    }
    assert among["q5"] == alone
    assert len({tuple(one) for one in among.values()}) == len(QUERIES)
    assert ids(sampler(positives, Sampling(seed=1)).sample("q5", RANKED)) != alone
    # The order in which positives are listed does not matter. These ids are the published ones of seed 0:
    # a change of the sampling would silently change everybody's training sets.
    assert ids(sampler({"q5": ["d4", "d3"]}).sample("q5", RANKED)) == alone
    assert alone == PUBLISHED


PUBLISHED = ["d4", "d39", "d23", "d34", "d41", "d15", "d29", "d43", "d5", "d19"]


def test_negatives_are_drawn_evenly_from_the_top() -> None:
    counts: Counter[str] = Counter()
    for seed in range(400):
        drawn = ids(sampler({"q1": ["d45"]}, Sampling(negatives=5, depth=20, seed=seed)).sample("q1", RANKED))
        counts.update(drawn[1:])
    assert set(counts) == {f"d{i}" for i in range(20)}
    # 400 * 5 / 20 = 100 draws of each document expected, with a standard deviation of 8.7.
    assert min(counts.values()) > 60
    assert max(counts.values()) < 140


def test_all_judged_positives_take_turns_and_are_never_negatives() -> None:
    positives = {"q1": ["d1", "d2", "d3"]}
    chosen = set()
    for seed in range(40):
        drawn = ids(sampler(positives, Sampling(negatives=40, seed=seed)).sample("q1", RANKED))
        chosen.add(drawn[0])
        assert not set(drawn[1:]) & {"d1", "d2", "d3"}
    assert chosen == {"d1", "d2", "d3"}


def test_qrels_of_grade_one_and_more() -> None:
    positives = Positives.from_qrels({"q1": {"d1": 0, "d2": 1, "d3": -1, "d4": 3}}, "qrels")
    assert positives.of == {"q1": ["d2", "d4"]}


def test_duplicates_by_text() -> None:
    documents = {**DOCUMENTS, "d8": " text 7\n", "d10": "text 9"}
    made = sampler({"q1": ["d7", "d20"]}, Sampling(negatives=60), documents={**documents, "d21": "text 20"})
    drawn = ids(made.sample("q1", RANKED))
    assert "d8" not in drawn, "the text of the positive"
    assert "d21" not in drawn, "the text of another document judged relevant"
    assert len({"d9", "d10"} & set(drawn)) == 1, "one of two documents with one text"
    assert made.report.counts["same_text_as_positive"] == 2
    assert made.report.counts["same_text_in_list"] == 1
    assert made.report.counts["short_lists"] == 1
    assert len(drawn) == 1 + 50 - 2 - 2 - 1


def test_queries_that_give_no_list_are_counted() -> None:
    positives = {"q1": ["d1"], "q2": ["d1"], "q3": ["nowhere"], "q4": ["d1"], "q5": [], "q9": ["d1"]}
    made = sampler(positives, Sampling(negatives=3))
    run = {"q1": RANKED, "q2": ["d1"], "q3": RANKED, "q5": RANKED, "q7": RANKED, "q9": RANKED}
    lists = list(made.lists((query, [(document, 0.0) for document in own]) for query, own in run.items()))
    assert [one.query_id for one in lists] == ["q1"]
    assert made.report.to_dict() == {
        "no_candidates": 1,
        "no_negatives": 1,
        "no_positive": 2,
        "no_query_text": 1,
        "positive_not_in_corpus": 1,
    }
    text = "\n".join(made.report.lines())
    assert "without a positive, left out: 2 (such as q5, q7)" in text
    assert "that the run does not have, left out: 1" in text


def test_no_list_at_all() -> None:
    with pytest.raises(InputError, match=r"no query has a list .*without a positive.*q1.*a test"):
        list(sampler({}).lists([("q1", [("d1", 1.0)])]))
    with pytest.raises(InputError, match="the run is empty"):
        list(sampler({}).lists([]))


def test_candidates_that_are_not_in_the_corpus() -> None:
    with pytest.raises(InputError, match=r"'x1' of query 'q1' is not in the corpus.*skip_malformed"):
        sampler({"q1": ["d1"]}).sample("q1", ["x1"])
    made = sampler({"q1": ["d1"]}, skip_unknown=True)
    assert set(ids(made.sample("q1", ["x1", "d2", "x2"]))) == {"d1", "d2"}
    assert made.report.counts["unknown_documents"] == 2
    assert made.report.counts["short_lists"] == 1


def test_documents_without_text() -> None:
    documents = {**DOCUMENTS, "d2": "  ", "d3": ""}
    made = sampler({"q1": ["d2", "d1"], "q2": ["d3"]}, Sampling(negatives=60), documents=documents)
    drawn = ids(made.sample("q1", RANKED))
    assert drawn[0] == "d1"
    assert not {"d2", "d3"} & set(drawn)
    assert made.sample("q2", RANKED) is None
    assert made.report.to_dict() == {"empty_documents": 1, "positive_not_in_corpus": 1, "short_lists": 1}


def test_only_drawn_texts_are_read() -> None:
    read: list[str] = []

    class Counting(dict[str, str]):
        def __getitem__(self, key: str) -> str:
            read.append(key)
            return super().__getitem__(key)

    sampler({"q1": ["d1"]}, Sampling(negatives=2), documents=Counting(DOCUMENTS)).sample("q1", RANKED)
    assert len(set(read)) == 3
