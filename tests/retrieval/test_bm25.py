"""BM25: Lucene's formula by hand, the published figures on real collections, and the edges."""

from __future__ import annotations

import itertools
import math
import pathlib
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from inranker_jax.corpora import beir
from inranker_jax.errors import InputError
from inranker_jax.records import Document, Query
from inranker_jax.retrieval import BM25Index, bm25

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTS = [
    Document("a", "shock wave wave", "boundary"),
    Document("b", "wave"),
    Document("c", "the of and"),
    Document("d", "heat transfer plate heat heat plate"),
    Document("e", ""),
]


def _lucene(term_frequency, length, document_frequency, count, average, k1, b):
    idf = math.log(1 + (count - document_frequency + 0.5) / (document_frequency + 0.5))
    return idf * term_frequency / (term_frequency + k1 * (1 - b + b * length / average))


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75)])
def test_scores_are_lucenes_formula(k1, b):
    run = BM25Index.build(DOCUMENTS, k1=k1, b=b).search([Query("q", "Waves of SHOCK waves")])
    # Lengths after stop words: 4, 1, 0, 6, 0; the query has "wave" twice, and it counts twice.
    average = 11 / 5
    wave_a, wave_b = (_lucene(tf, length, 2, 5, average, k1, b) for tf, length in [(2, 4), (1, 1)])
    shock = _lucene(1, 4, 1, 5, average, k1, b)
    assert list(run["q"]) == ["a", "b"]
    np.testing.assert_allclose(list(run["q"].values()), [2 * wave_a + shock, 2 * wave_b], rtol=1e-6)


def test_only_documents_with_a_match_come_back():
    index = BM25Index.build(DOCUMENTS)
    queries = [
        Query("1", "heat"),
        Query("2", "zebra"),
        Query("3", ""),
        Query("4", "the of and"),
        Query("5", "?!"),
    ]
    run = index.search(queries, k=1000)
    assert {query: list(documents) for query, documents in run.items()} == {
        "1": ["d"], "2": [], "3": [], "4": [], "5": [],
    }  # fmt: skip
    assert index.search([], k=5) == {}


@pytest.mark.parametrize("k", [1, 2, 3, 6, 7, 100])
def test_ties_go_to_the_highest_id_whatever_the_order_of_the_corpus(k):
    documents = [Document(str(i), "wave") for i in range(5)] + [
        Document("x", "wave wave"),
        Document("0z", "plate"),
    ]
    expected = ["x", "4", "3", "2", "1", "0"][:k]
    for seed in range(5):
        shuffled = [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]
        assert list(BM25Index.build(shuffled).search([Query("q", "waves")], k)["q"]) == expected


def test_cut_equals_the_head_of_the_whole_ranking():
    random = np.random.default_rng(0)
    documents = [Document(str(i), " ".join(random.choice(list("abcdefgh"), 6) + "x")) for i in range(300)]
    index = BM25Index.build(documents, language="none")
    whole = index.search([Query("q", "ax bx cx")], 1000)["q"]
    for k in (1, 7, 50, 120):
        head = index.search([Query("q", "ax bx cx")], k)["q"]
        assert list(head.items()) == list(whole.items())[:k]


def test_among_keeps_exactly_the_named_documents():
    run = BM25Index.build(DOCUMENTS).search(
        [Query("1", "wave"), Query("2", "heat"), Query("3", "heat")],
        among={"1": ["b", "e", "c", "unknown"], "2": []},
    )
    assert list(run["1"]) == ["b", "e", "c"]
    assert run["1"]["e"] == run["1"]["c"] == 0 < run["1"]["b"]
    assert run["2"] == run["3"] == {}


def test_corpus_without_words():
    index = BM25Index.build([Document("1", ""), Document("2", "the")])
    assert index.search([Query("q", "wave")]) == {"q": {}}
    assert index.search([Query("q", "wave")], among={"q": ["1"]}) == {"q": {"1": 0.0}}


def test_language_decides_stems_and_stop_words():
    documents = [Document("1", "as perguntas para os navios"), Document("2", "navio"), Document("3", "para")]
    found = BM25Index.build(documents, language="portuguese").search([Query("q", "para o navio")])
    assert set(found["q"]) == {"1", "2"}
    found = BM25Index.build(documents, language="none").search([Query("q", "para o navio")])
    assert set(found["q"]) == {"1", "2", "3"}


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_change_nothing(threads):
    random = np.random.default_rng(1)
    documents = [Document(str(i), " ".join(random.choice(list("abcdefgh"), 9) + "x")) for i in range(400)]
    queries = [Query(f"q{i}", " ".join(random.choice(list("abcdefgh"), 5) + "x")) for i in range(600)]
    index = BM25Index.build(documents, language="none")
    among = {query.id: ["7", "11", "300"] for query in queries}
    for pool in (None, among):
        one = index.search(queries, 30, pool)
        several = index.search(queries, 30, pool, threads=threads)
        assert [(q, list(d.items())) for q, d in one.items()] == [
            (q, list(d.items())) for q, d in several.items()
        ]


def test_stream_search_reads_queries_as_they_are_needed():
    index = BM25Index.build(DOCUMENTS)

    def endless():
        for i in itertools.count():
            yield Query(str(i), "wave")

    for threads in (1, 2):
        found = list(itertools.islice(index.stream_search(endless(), 5, threads=threads), 700))
        assert [query for query, _ in found] == [str(i) for i in range(700)]


@pytest.mark.parametrize("language", ["english", "none"])
@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.2, 0.75), (0.0, 0.0)])
def test_scores_are_those_of_bm25s_to_the_bit(language, k1, b, monkeypatch):
    from inranker_jax.retrieval import postings
    from inranker_jax.retrieval.words import bm25s, stemmer

    monkeypatch.setattr(postings, "_BATCH", 70)
    monkeypatch.setattr(postings, "_CHUNK", 90)
    random = np.random.default_rng(2)
    words = [f"w{i}" for i in range(300)] + ["the", "and", "waves", "wave"]
    documents = [
        Document(
            f"{i}", " ".join(words[int(len(words) * v**2)] for v in random.random(random.integers(0, 60)))
        )
        for i in range(333)
    ]
    index = BM25Index.build(documents, language, k1, b)
    theirs = bm25s().BM25(method="lucene", k1=k1, b=b, backend="numpy")
    ordered = sorted(documents, key=lambda document: document.id, reverse=True)
    tokens = bm25s().tokenize(
        [document.contents for document in ordered],
        stopwords=None if language == "none" else language,
        stemmer=stemmer(language),
        show_progress=False,
    )
    theirs.index(tokens, show_progress=False)
    for text in ("waves w1 w2 w1 the w299", "w5", "and w7 wave wave w80 w200 w12"):
        terms = [term for term in BM25Index.build([Document("q", text)], language)._postings.vocabulary]
        words_of_query = [term for term in terms if term in theirs.vocab_dict]
        expected = theirs.get_scores(words_of_query)
        found = index.search([Query("q", " ".join(terms))], 1000)["q"]
        assert found == {ordered[i].id: float(expected[i]) for i in np.flatnonzero(expected)}


def test_memory_of_a_build_does_not_hold_the_texts():
    words = [f"word{i}" for i in range(2000)]
    random = np.random.default_rng(0)

    def documents():
        for i in range(12000):
            yield Document(str(i), " ".join(words[j] for j in random.integers(0, 2000, 20)) + "." * 5000)

    tracemalloc.start()
    BM25Index.build(documents(), language="none")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The texts are 60 MB, of which one batch (10 MB) is held at a time.
    assert peak < 35e6


def test_bad_arguments_are_explained():
    with pytest.raises(InputError, match="Did you mean 'portuguese'"):
        BM25Index.build(DOCUMENTS, language="portugese")
    with pytest.raises(InputError, match="without documents"):
        BM25Index.build([])
    with pytest.raises(InputError, match="'a' twice"):
        BM25Index.build([*DOCUMENTS, Document("a", "x")])
    with pytest.raises(InputError, match="k1=-1"):
        BM25Index.build(DOCUMENTS, k1=-1)
    with pytest.raises(InputError, match="at least 1 thread; got 0"):
        BM25Index.build(DOCUMENTS).search([Query("q", "wave")], threads=0)
    with pytest.raises(InputError, match="at least 1; got 0"):
        BM25Index.build(DOCUMENTS).search([Query("q", "wave")], 0)


@pytest.mark.parametrize("jax_first", [False, True])
def test_searching_is_silent_and_does_not_start_a_jax_backend(jax_first):
    script = f"""
import logging, sys
logging.basicConfig(level=logging.DEBUG)
if {jax_first}:
    logging.disable()  # JAX's own debug lines
    import jax.lax
    logging.disable(logging.NOTSET)
from inranker_jax.records import Document, Query
from inranker_jax.retrieval import BM25Index, bm25
assert "bm25s" not in sys.modules
found = BM25Index.build([Document("1", "wave")]).search([Query("q", "wave")])
assert list(found["q"]) == ["1"]
if {jax_first}:
    assert jax.lax is sys.modules["jax.lax"] and jax.lax.top_k
    from jax._src import xla_bridge
    assert not xla_bridge.backends_are_initialized()
else:
    assert "jax" not in sys.modules and "jax.lax" not in sys.modules
    logging.disable()
    import jax.lax
    assert jax.lax.top_k
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("name", "language", "expected"),
    [
        ("scifact", "english", "0.676"),
        ("cranfield", "english", "0.404"),
        ("nfcorpus-stopped", "english", "0.327"),
        ("cisi", "english", "0.368"),
        ("pira-pt", "portuguese", "0.845"),
        ("pira-en", "english", "0.875"),
    ],
)
def test_published_figures(shared_data, name, language, expected):
    assert f"{_ndcg(shared_data, name, language, judged_only=False):.3f}" == expected


def test_published_figure_of_the_judged_pool(shared_data):
    assert f"{_ndcg(shared_data, 'quati-human-pt', 'portuguese', judged_only=True):.3f}" == "0.845"


def _ndcg(shared_data, name, language, judged_only):
    import pytrec_eval

    collection = beir.BeirCollection.load(shared_data / "beir" / name)
    among = collection.qrels if judged_only else None
    run = BM25Index.build(collection.documents.values(), language).search(
        collection.judged_queries.values(), 1000, among
    )
    values = pytrec_eval.RelevanceEvaluator(collection.qrels, ["ndcg_cut_10"]).evaluate(run)
    return sum(value["ndcg_cut_10"] for value in values.values()) / len(collection.qrels)


@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("levels", [2, 50, 10**6])
def test_no_candidate_of_the_best_is_lost_among_many_documents(k, levels):
    random = np.random.default_rng(3)
    for share in (0.001, 0.02, 0.6):
        scores = np.where(
            random.random(40_000) < share, np.ceil(random.random(40_000) * levels) / levels, 0.0
        ).astype(np.float32)
        found = bm25._candidates(scores, k)
        order = np.lexsort((np.arange(40_000), -scores))
        best = [i for i in order[:k] if scores[i] > 0]
        assert set(best) <= set(found.tolist())
        assert np.all(scores[found] > 0)
        assert np.all(np.diff(found) > 0)
