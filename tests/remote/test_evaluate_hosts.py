"""`evaluate` from a bucket into a bucket: the results of a local run, whichever processes write them."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
import pytest

from inranker_jax import evaluate, paths
from inranker_jax.errors import InputError
from inranker_jax.evaluation.pipeline import Model, Settings, evaluate_dataset
from inranker_jax.evaluation.score_memory import ScoreMemory
from inranker_jax.labeling.processes import ALONE, Processes
from tests.evaluation.tiny_collection import overlap, write_beir
from tests.remote.object_store import ObjectStore

FILES = ("bm25.trec", "model.trec", "per_query.tsv")


class Counting:
    """A model that counts its pairs, and can die after some."""

    def __init__(self, dies_at: int = 1000) -> None:
        self.pairs, self.dies_at = 0, dies_at
        self.model = Model(self, {"fingerprint": "m"})

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        if self.pairs + len(pairs) > self.dies_at:
            raise KeyboardInterrupt
        self.pairs += len(pairs)
        return np.array(overlap(list(pairs)), np.float32)


def run(
    folder: pathlib.Path | str, output: pathlib.Path | str, counting: Counting, processes: Processes = ALONE
) -> None:
    settings = Settings(pairs_per_call=1)
    evaluate_dataset(
        "mini", folder, output, settings, counting.model, announce=lambda _: None, processes=processes
    )


def test_a_bucket_gets_the_results_of_a_local_folder(store: ObjectStore, tmp_path: pathlib.Path) -> None:
    folder, alone = write_beir(tmp_path / "mini"), Counting()
    run(folder, tmp_path / "out", alone)
    paths.upload(folder, "gs://bkt/beir/mini")
    dying, rest = Counting(dies_at=4), Counting()
    with pytest.raises(KeyboardInterrupt):
        run("gs://bkt/beir/mini", "gs://bkt/out", dying)
    assert dying.pairs > 0
    assert [name for name in store.names("bkt", "out/") if "unfinished" in name], "scores that are kept"
    for index in (1, 0):
        run("gs://bkt/beir/mini", "gs://bkt/out", rest, Processes(index, 2))
    assert rest.pairs == alone.pairs - dying.pairs
    assert store.names("bkt", "out/") == sorted(f"out/{name}" for name in (*FILES, "result.json"))
    for name in FILES:
        assert store.buckets["bkt"][f"out/{name}"].data == (tmp_path / "out" / name).read_bytes()
    again = Counting()
    run("gs://bkt/beir/mini", "gs://bkt/out", again)
    assert again.pairs == 0


def test_objects_of_other_settings_are_passed_over(store: ObjectStore) -> None:
    scores = {"q1": {"d1": 0.5}, "q2": {"d2": 1.0}}
    ScoreMemory("gs://bkt/u.jsonl", "old").add(scores)
    first = ScoreMemory("gs://bkt/u.jsonl", "new")
    assert len(first) == 0
    ScoreMemory("gs://bkt/u.jsonl", "new", index=3).add(scores)
    assert len(store.names("bkt", "u")) == 2
    first.refresh()
    assert first.get("q2") == {"d2": 1.0}
    first.remove()
    assert store.names("bkt", "u") == []


def test_the_command(store: ObjectStore, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths.upload(write_beir(tmp_path / "mini"), "gs://bkt/beir/mini")
    flags = ["--gin_file=gin/eval_beir.gin", "--bm25_only", "--beir_dir=gs://bkt/beir"]
    assert evaluate.main([*flags, "--datasets=mini", "--output_dir=gs://bkt/out"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "mini"
    assert store.names("bkt", "out/results.json")
    assert evaluate.main([*flags, "--datasets=minni", "--output_dir=gs://bkt/out"]) == 2
    assert "Did you mean 'mini'? It has mini." in capsys.readouterr().err
    assert evaluate.main([*flags, "--datasets=mini", "--output_dir=gs://bkc/out"]) == 2
    assert "there is no bucket 'bkc'" in capsys.readouterr().err
    with pytest.raises(InputError, match="no such folder"):
        evaluate.find_datasets("gs://bkt/none", ["mini"])
