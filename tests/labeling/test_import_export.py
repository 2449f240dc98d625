"""InRanker's TSV and JSONL: into a label folder and out again; the real files, and their cross-lingual use."""

from __future__ import annotations

import json
import pathlib

import pytest

from inranker_jax.corpora import inranker
from inranker_jax.corpora.label_folder import LabelFolder, Lists, read_labels
from inranker_jax.errors import InputError
from inranker_jax.labeling.import_export import export_jsonl, export_tsv, import_jsonl, import_tsv
from inranker_jax.labeling.job import LabelJob, Settings
from tests.labeling.small_mixture import FakeTeacher, write_mixture

pytest.importorskip("pyarrow")


@pytest.fixture
def labelled(tmp_path: pathlib.Path) -> Settings:
    settings = write_mixture(tmp_path / "mixture")
    job = LabelJob(settings, announce=lambda _: None)
    job.prepare()
    job.label(FakeTeacher())
    return settings


def bring_in(path: pathlib.Path, settings: Settings, folder: pathlib.Path) -> list[str]:
    messages: list[str] = []
    import_tsv(
        str(path),
        str(folder),
        "t5",
        queries=settings.queries,
        corpus=settings.corpus,
        announce=messages.append,
    )
    return messages


def test_tsv_round_trip(labelled: Settings, tmp_path: pathlib.Path) -> None:
    path, again = tmp_path / "labels.tsv", tmp_path / "again"
    assert export_tsv(str(path), labelled.output_dir) == 60
    false_logit, true_logit = next(read_labels(labelled.output_dir)).logits
    first = path.read_text().splitlines()[0].split("\t")
    assert [float(value) for value in first[:2]] == [true_logit, false_logit]
    messages = bring_in(path, labelled, again)
    assert list(read_labels(again)) == list(read_labels(labelled.output_dir))
    assert [rows.relevance.tolist() for rows in Lists(again).rows()] == [[1, 0, 0, 0, 0] * 12]
    info = LabelFolder(again).info
    assert (info["complete"], list(info["teachers"])) == (True, ["t5"])
    assert info["import"]["path"] == str(path)
    assert any("12 lists, 60 pairs, 60 distinct" in line for line in messages)
    bring_in(path, labelled, again)  # again, nothing changes
    assert list(read_labels(again)) == list(read_labels(labelled.output_dir))


def test_jsonl_round_trip(labelled: Settings, tmp_path: pathlib.Path) -> None:
    path, again = tmp_path / "labels.jsonl", tmp_path / "again"
    assert export_jsonl(str(path), labelled.output_dir) == 60
    import_jsonl(str(path), str(again), "t5", announce=print)
    before = [(pair.query, pair.document, pair.logits) for pair in read_labels(labelled.output_dir)]
    assert [(pair.query, pair.document, pair.logits) for pair in read_labels(again)] == before
    moved = again.rename(tmp_path / "moved")
    assert [(pair.query, pair.document, pair.logits) for pair in read_labels(moved)] == before
    out = tmp_path / "again.jsonl"
    export_jsonl(str(out), str(moved))
    assert out.read_bytes() == path.read_bytes()


def test_rows_that_repeat_or_contradict(labelled: Settings, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "labels.jsonl"
    rows = [
        {"query": "a", "contents": "x", "true_logit": 1.0, "false_logit": 0.0},
        {"query": "a", "contents": "y", "true_logit": 0.5, "false_logit": 0.0},
        {"query": "a", "contents": "x", "true_logit": 9.0, "false_logit": 0.0},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    messages: list[str] = []
    import_jsonl(str(path), str(tmp_path / "labels"), "t5", announce=messages.append)
    assert [pair.logits for pair in read_labels(tmp_path / "labels")] == [(0.0, 1.0), (0.0, 0.5)]
    assert any(line.startswith("1 rows that repeat") for line in messages)
    # The same text under two ids, with two labels: one of them can be kept.
    for identifier in ("e1", "e2"):
        with open(pathlib.Path(labelled.corpus, "corpus.jsonl"), "a") as corpus:
            corpus.write(json.dumps({"_id": identifier, "text": "one text"}) + "\n")
    tsv = tmp_path / "two.tsv"
    tsv.write_text("1.0\t0.0\tq1\te1\n3.0\t0.0\tq1\te2\n")
    messages = bring_in(tsv, labelled, tmp_path / "two")
    assert any(line.startswith("1 pairs have the same texts") for line in messages)
    assert [pair.logits[1] for pair in read_labels(tmp_path / "two")] == [1.0, 1.0]


def test_files_that_are_refused(labelled: Settings, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "labels.tsv"
    path.write_text("1.0\t0.0\tq1\td1\n1.0\t0.0\tq2\td1\n1.0\t0.0\tq1\td2\n")
    with pytest.raises(InputError, match=r"query 'q1' do not stand together.*sort"):
        bring_in(path, labelled, tmp_path / "split")
    path.write_text("1.0\t0.0\tq1\td1\n1.0\tq1\td2\n")
    with pytest.raises(InputError, match=r"labels\.tsv:2: 3 columns"):
        bring_in(path, labelled, tmp_path / "columns")
    path.write_text("\n")
    with pytest.raises(InputError, match="no pairs"):
        bring_in(path, labelled, tmp_path / "empty")
    path.write_text("1.0\t0.0\tq1\td1\n")
    with pytest.raises(InputError, match=r"lists of something else(.|\n)*Choose another --output_dir"):
        bring_in(path, labelled, pathlib.Path(labelled.output_dir))
    assert len(list(read_labels(labelled.output_dir))) == 60


def test_real_labels_of_pira_across_languages(shared_data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Labels of English pairs, read with the Portuguese texts of the same ids."""
    english, portuguese = shared_data / "beir" / "pira-en", shared_data / "beir" / "pira-pt"
    path, folder = shared_data / "teacher" / "pira_en_human.tsv", tmp_path / "pira"
    import_tsv(str(path), str(folder), "mix", queries=str(english), corpus=str(english), announce=print)
    direct = list(inranker.read_msmarco_tsv(path, english, english))
    ours = list(read_labels(folder))
    assert len(ours) == len(direct) == 4520
    assert [(p.query_id, p.document_id, p.query, p.document) for p in ours] == [
        (p.query_id, p.document_id, p.query, p.document) for p in direct
    ]
    assert [p.logits for p in ours] == [pytest.approx(p.logits, abs=1e-5) for p in direct]
    translated = list(read_labels(folder, queries=portuguese, documents=portuguese))
    expected = list(inranker.read_msmarco_tsv(path, portuguese, portuguese))
    assert [(p.query, p.document) for p in translated] == [(p.query, p.document) for p in expected]
    assert [p.logits for p in translated] == [p.logits for p in ours]
    assert sum(one.document != other.document for one, other in zip(ours, translated, strict=True)) > 4000


def test_real_labels_of_texts_without_titles(shared_data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Queries that were titles: their labels are those of the text alone."""
    corpus, name = shared_data / "beir" / "scifact", shared_data / "teacher" / "scifact_synthetic"
    import_tsv(
        f"{name}.tsv",
        str(tmp_path / "labels"),
        "mix",
        queries=f"{name}.queries.tsv",
        corpus=str(corpus),
        titles=False,
        announce=print,
    )
    expected = inranker.read_msmarco_tsv(f"{name}.tsv", f"{name}.queries.tsv", corpus, titles=False)
    count = 0
    for ours, theirs in zip(read_labels(tmp_path / "labels"), expected, strict=True):
        assert (ours.query, ours.document) == (theirs.query, theirs.document)
        count += 1
    assert count == 51786
