"""Retrieval from a bucket into a bucket."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from inranker_jax import paths, retrieve
from inranker_jax.corpora import open_corpus, open_queries_any
from inranker_jax.errors import InputError
from inranker_jax.flags import Stopped
from inranker_jax.retrieval import job, outputs
from tests.remote.object_store import ObjectStore


@pytest.fixture
def collection(store: ObjectStore, tmp_path: pathlib.Path) -> pathlib.Path:
    """A corpus and queries in the bucket; returns a folder with the same."""
    random = np.random.default_rng(0)
    words = [f"word{number}" for number in range(60)]
    lines = [f"d{i}\t{' '.join(random.choice(words, 8))}\n" for i in range(100)]
    asked = [f"q{i}\t{' '.join(random.choice(words, 3))}\n" for i in range(12)]
    for name, content in (("corpus.tsv", lines), ("queries.tsv", asked)):
        paths.write(tmp_path / name, "".join(content))
        paths.write(f"gs://bkt/in/{name}", "".join(content))
    return tmp_path


def flags(place: object, output: object, *more: str) -> list[str]:
    return [f"--corpus={place}/corpus.tsv", f"--queries={place}/queries.tsv", f"--output={output}", *more]


def test_a_run_and_its_index_go_to_a_bucket(
    collection: pathlib.Path, store: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert retrieve.main(flags(collection, collection / "run.trec")) == 0
    index = "--index=gs://bkt/index"
    assert retrieve.main(flags("gs://bkt/in", "gs://bkt/out/run.trec", index)) == 0
    assert store.buckets["bkt"]["out/run.trec"].data == (collection / "run.trec").read_bytes()
    assert store.names("bkt", "out/") == ["out/run.trec", "out/run.trec.json"]
    assert "index/index.json" in store.names("bkt")
    capsys.readouterr()

    assert retrieve.main(flags("gs://bkt/in", "gs://bkt/out/run.trec", index)) == 0
    assert "is whole already" in capsys.readouterr().err
    assert retrieve.main(flags("gs://bkt/in", "gs://bkt/out/other.trec", index)) == 0
    assert "Opened the index of 100 documents" in capsys.readouterr().err
    del store.buckets["bkt"]["index/index.json"]  # an upload that broke off
    assert retrieve.main(flags("gs://bkt/in", "gs://bkt/out/third.trec", index)) == 0
    assert "index/index.json" in store.names("bkt")
    assert store.buckets["bkt"]["out/third.trec"].data == store.buckets["bkt"]["out/run.trec"].data


def test_an_interrupted_run_goes_on_with_the_parts_of_the_bucket(
    collection: pathlib.Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "QUERIES_PER_PART", 4)
    corpus = open_corpus("gs://bkt/in/corpus.tsv")
    queries = open_queries_any("gs://bkt/in/queries.tsv")
    parts = "out/run.trec.parts/"

    with pytest.raises(Stopped):
        job.retrieve(
            corpus, queries, "gs://bkt/out/run.trec", stop=lambda: len(store.names("bkt", parts)) >= 3
        )
    done = {name: store.buckets["bkt"][name].generation for name in store.names("bkt", parts + "part-")}
    assert sorted(done) == [f"{parts}part-000000.trec", f"{parts}part-000001.trec"]

    kept: dict[str, int] = {}

    def look() -> bool:
        kept.update(
            {name: store.buckets["bkt"][name].generation for name in done if name in store.names("bkt")}
        )
        return False

    summary = job.retrieve(corpus, queries, "gs://bkt/out/run.trec", stop=look)
    assert kept == done  # not made again
    assert (summary.output, summary.queries) == ("gs://bkt/out/run.trec", 12)
    assert retrieve.main(flags(collection, collection / "run.trec")) == 0
    assert store.buckets["bkt"]["out/run.trec"].data == (collection / "run.trec").read_bytes()
    assert store.names("bkt", parts) == []


def test_a_run_of_a_bucket_is_normalised(collection: pathlib.Path, store: ObjectStore) -> None:
    paths.write("gs://bkt/in/run.txt", "q1 Q0 d3 1 1.5 x\nq1 Q0 d2 2 2.5 x\nq0 Q0 d1 1 1 x\n")
    asked = flags("gs://bkt/in", "gs://bkt/out/clean.trec", "--run=gs://bkt/in/run.txt")
    assert retrieve.main(asked) == 0
    assert store.buckets["bkt"]["out/clean.trec"].data.decode().splitlines() == [
        "q0 Q0 d1 1 1.0 run",
        "q1 Q0 d2 1 2.5 run",
        "q1 Q0 d3 2 1.5 run",
    ]
    corpus, queries = open_corpus("gs://bkt/in/corpus.tsv"), open_queries_any("gs://bkt/in/queries.tsv")
    with pytest.raises(InputError, match="is the run that is read"):
        job.normalise("gs://bkt/in/run.txt", corpus, queries, "gs://bkt/in/run.txt")


def test_a_wrong_bucket_is_told_before_any_work(
    collection: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert retrieve.main(flags(collection, "gs://nobody/run.trec")) == 2
    assert "gs://nobody/run.trec: there is no bucket 'nobody'" in capsys.readouterr().err
