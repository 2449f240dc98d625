"""Queries generated into a bucket: the journal is a folder of objects, and no answer in it is asked for again."""

from __future__ import annotations

import pathlib

import pytest

from inranker_jax import generate_queries, paths
from inranker_jax.errors import InputError
from inranker_jax.query_generation.segments import Segments
from tests.query_generation import commands
from tests.query_generation.server import Behaviour, serve
from tests.remote.object_store import ObjectStore

OUTPUT = "gs://bkt/out/queries.jsonl"


def run(corpus: pathlib.Path, output: object, generator: str) -> int:
    own = [f"--corpus={corpus}", "--corpus_format=jsonl", f"--output={output}", f"--generator={generator}"]
    return generate_queries.main(own)


def test_queries_go_to_a_bucket_and_nothing_is_asked_twice(
    store: ObjectStore, tmp_path: pathlib.Path
) -> None:
    corpus = commands.write_corpus(tmp_path, 12)
    with serve(Behaviour()) as behaviour:
        generator = f"openai:{behaviour.url}"
        assert run(corpus, tmp_path / "queries.jsonl", generator) == 0
        assert run(corpus, OUTPUT, generator) == 0
        assert len(behaviour.requests) == 24
        assert store.buckets["bkt"]["out/queries.jsonl"].data == (tmp_path / "queries.jsonl").read_bytes()
        assert store.names("bkt") == [
            "out/queries.generated.jsonl/00000000.jsonl",
            "out/queries.jsonl",
            "out/queries.report.json",
        ]
        del store.buckets["bkt"]["out/queries.jsonl"]
        assert run(corpus, OUTPUT, generator) == 0  # another machine: it has the bucket alone
        assert len(behaviour.requests) == 24
        assert store.buckets["bkt"]["out/queries.jsonl"].data == (tmp_path / "queries.jsonl").read_bytes()


def test_segments_follow_each_other(store: ObjectStore) -> None:
    first = Segments("gs://bkt/journal.jsonl", seconds=0)
    assert first.read() == b""
    first.write(b"one\n")
    first.write(b"two\n")
    first.close()
    assert store.names("bkt") == ["journal.jsonl/00000000.jsonl", "journal.jsonl/00000001.jsonl"]
    again = Segments("gs://bkt/journal.jsonl", seconds=1000)
    assert again.read() == b"one\ntwo\n"
    again.write(b"three\n")
    again.write(b"four\n")
    assert len(store.names("bkt")) == 2
    again.close()
    assert Segments("gs://bkt/journal.jsonl").read() == b"one\ntwo\nthree\nfour\n"


def test_a_second_writer_is_told(store: ObjectStore) -> None:
    one, other = (Segments("gs://bkt/journal.jsonl", seconds=0) for _ in range(2))
    assert one.read() == other.read() == b""
    one.write(b"one\n")
    with pytest.raises(InputError, match="another process is writing this journal"):
        other.write(b"other\n")
    paths.remove("gs://bkt/journal.jsonl/00000000.jsonl")
    store.put("bkt", "journal.jsonl/00000007.jsonl", b"x", {})
    with pytest.raises(InputError, match=r"0000000[07].jsonl: missing, or not a part"):
        Segments("gs://bkt/journal.jsonl").read()
