"""Evaluation of a collection that lies in a bucket, with results that go there."""

from __future__ import annotations

import json
import pathlib

import pytest

from inranker_jax import evaluate, paths
from tests.remote.object_store import ObjectStore

pytest.importorskip("pytrec_eval")


def write_collection(root: str) -> None:
    rows = [{"_id": f"d{i}", "title": "", "text": f"word{i} word{i % 3} other"} for i in range(9)]
    queries = [{"_id": f"q{i}", "text": f"word{i}"} for i in range(3)]
    paths.write(f"{root}/tiny/corpus.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    paths.write(f"{root}/tiny/queries.jsonl", "".join(json.dumps(row) + "\n" for row in queries))
    judged = "".join(f"q{i}\td{i}\t1\nq{i}\td{i + 3}\t1\n" for i in range(3))
    paths.write(f"{root}/tiny/qrels/test.tsv", "query-id\tcorpus-id\tscore\n" + judged)


def flags(root: object, output: object) -> list[str]:
    return [f"--beir_dir={root}", "--datasets=tiny", f"--output_dir={output}", "--bm25_only"]


def test_results_equal_those_of_a_disk(store: ObjectStore, tmp_path: pathlib.Path) -> None:
    write_collection("gs://bkt/beir")
    write_collection(str(tmp_path / "beir"))
    assert evaluate.main(flags(tmp_path / "beir", tmp_path / "out")) == 0
    assert evaluate.main(flags("gs://bkt/beir", "gs://bkt/out")) == 0
    made = [name for name in paths.names_below(tmp_path / "out") if not name.startswith(".")]
    assert made
    assert store.names("bkt", "out/") == [f"out/{name}" for name in made]
    for name in made:
        if name.endswith((".trec", ".tsv")):
            assert store.buckets["bkt"][f"out/{name}"].data == (tmp_path / "out" / name).read_bytes()
