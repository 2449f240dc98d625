"""The prepare_tfds binary: a label folder and a BEIR folder as TFDS datasets, and refusals."""

from __future__ import annotations

import os
import pathlib
import signal

import pytest

from inranker_jax import data, prepare_tfds
from tests.data import label_folders as toy

tfds = pytest.importorskip("tensorflow_datasets", reason="needs the [train] extra")
pytest.importorskip("pyarrow", reason="needs the [label] extra")


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return toy.write_label_folder(tmp_path_factory.mktemp("prepare") / "labels")


def run(*arguments: str) -> int:
    return prepare_tfds.main(arguments)


def test_labels_with_translated_texts(
    labels: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    translated = toy.write_beir(tmp_path / "pt", 30, 20, language="pt: ")
    target = [f"--data_dir={tmp_path}", "--name=toy_pt"]
    texts = [f"--queries={translated}", f"--documents={translated}"]
    assert run(f"--labels={labels}", "--list_size=2", "--validation_fraction=0.2", *texts, *target) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'toy_pt' / '1.0.0'}\n"
    splits = tfds.load("toy_pt", data_dir=str(tmp_path))
    assert sum(len(split) for split in splits.values()) == 60
    row = next(iter(tfds.as_numpy(splits["train"])))
    assert row["query"].startswith(b"pt: query number")
    assert len(row["documents"]) == 2
    assert row["teacher_logits"].shape == (2, 2)
    assert run(f"--labels={labels}", *target) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(f"--labels={labels}", "--overwrite", *target) == 0
    assert next(iter(tfds.as_numpy(tfds.load("toy_pt", data_dir=str(tmp_path), split="train"))))[
        "query"
    ].startswith(b"query number")


def test_a_beir_folder_there_and_back(labels: pathlib.Path, tmp_path: pathlib.Path) -> None:
    source = labels.with_name("labels_source")
    assert run(f"--beir={source}", f"--data_dir={tmp_path}", "--name=toy_beir", "--num_shards=2") == 0
    assert run("--from_tfds=toy_beir", f"--data_dir={tmp_path}", f"--output_dir={tmp_path / 'back'}") == 0
    assert (tmp_path / "back" / "qrels" / "test.tsv").read_text() == (
        source / "qrels" / "test.tsv"
    ).read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--labels=x", "--name=y"], "--data_dir is missing"),
        (["--from_tfds=x"], "--output_dir is missing"),
        (["--name=x", "--data_dir=y"], "one of the arguments --labels --beir --from_tfds is required"),
        (["--labels=x", "--beir=y"], "not allowed with"),
        (["--labels=x", "--name=y", "--datadir=z"], "Did you mean '--data_dir'"),
        (["--labels=nowhere", "--name=y", "--data_dir=out"], "it has no lists.parquet"),
        (["--beir=nowhere", "--name=y", "--data_dir=out"], "nowhere"),
        (["--labels=nowhere", "--name=Y!", "--data_dir=out"], "it has no lists.parquet"),
    ],
)
def test_refusals(
    arguments: list[str],
    words: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*/1.0.0"))


def test_a_signal_leaves_nothing_half_written(
    labels: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inranker_jax.data import sources

    original = sources.LabelledPairs.numbered_examples

    def interrupted(self: data.LabelledPairs, *arguments: object) -> object:
        for number, example in enumerate(original(self, *arguments)):  # type: ignore[arg-type]
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield example

    monkeypatch.setattr(sources.LabelledPairs, "numbered_examples", interrupted)
    assert run(f"--labels={labels}", f"--data_dir={tmp_path}", "--name=toy") == 143
    assert not (tmp_path / "toy" / "1.0.0").exists()


def test_a_signal_stops_the_writing_of_a_beir_folder(
    labels: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = labels.with_name("labels_source")
    assert run(f"--beir={source}", f"--data_dir={tmp_path}", "--name=toy_stop") == 0
    original = tfds.as_numpy

    sent: list[int] = []

    def interrupted(dataset: object) -> object:
        for number, row in enumerate(original(dataset)):
            if number == 3 and not sent:  # a second signal would kill
                sent.append(number)
                os.kill(os.getpid(), signal.SIGTERM)
            yield row

    monkeypatch.setattr(tfds, "as_numpy", interrupted)
    target = tmp_path / "back"
    assert run("--from_tfds=toy_stop", f"--data_dir={tmp_path}", f"--output_dir={target}") == 143
    assert list(target.iterdir()) == []
