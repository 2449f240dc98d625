"""Labelling into a bucket: stopped, and continued from another machine."""

from __future__ import annotations

import pathlib

import pytest

from inranker_jax import label
from inranker_jax.corpora.label_folder import read_labels
from tests.labeling.small_mixture import write_mixture
from tests.remote.object_store import ObjectStore, StatusError

pytest.importorskip("pyarrow")


def arguments(settings: object, output: str) -> list[str]:
    names = ("queries", "corpus", "candidates", "qrels")
    given = [f"--{name}={getattr(settings, name)}" for name in names]
    run = settings.candidates
    return [
        *given,
        f"--output_dir={output}",
        "--chunk_size=8",
        "--negatives=4",
        "--depth=20",
        f"--teacher=bm25=run:{run}?scale=0.5",
    ]


def test_labels_go_to_a_bucket_and_on_after_a_failure(
    store: ObjectStore, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = write_mixture(tmp_path)
    assert label.main(arguments(settings, str(tmp_path / "local"))) == 0
    capsys.readouterr()
    parts = 0

    def break_off(method: str, name: str) -> None:
        nonlocal parts
        if method == "POST" and "/part-" in name:
            parts += 1
            if parts == 4:
                raise StatusError(403, "no right to write")

    store.fault = break_off
    with pytest.raises(OSError, match="no right"):
        label.main(arguments(settings, "gs://bkt/labels"))
    there = [name for name in store.names("bkt") if "/part-" in name]
    assert len(there) == 3
    written = {name: store.buckets["bkt"][name].generation for name in there}
    store.fault = lambda method, name: None
    assert label.main(arguments(settings, "gs://bkt/labels")) == 0
    assert "scored 36 pairs" in capsys.readouterr().out
    assert {name: store.buckets["bkt"][name].generation for name in there} == written
    assert list(read_labels("gs://bkt/labels")) == list(read_labels(tmp_path / "local"))
    assert label.main(arguments(settings, "gs://bkt/labels")) == 0
    assert "scored 0 pairs" in capsys.readouterr().out
