"""`python -m inranker_jax.label`: the flags, the exit status, and what a user sees."""

from __future__ import annotations

import json
import pathlib
import re
import signal
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pytest

from inranker_jax import label
from inranker_jax.corpora.label_folder import LabelFolder, read_labels
from inranker_jax.labeling.job import Settings
from inranker_jax.labeling.pairs import PairText
from inranker_jax.labeling.teachers import check_path, parse_spec
from tests.hangs import wait_for_report
from tests.labeling.small_mixture import FakeTeacher, write_mixture

pytest.importorskip("pyarrow")


@pytest.fixture
def settings(tmp_path: pathlib.Path) -> Settings:
    return write_mixture(tmp_path)


def arguments(settings: Settings, *more: str) -> list[str]:
    names = ("output_dir", "queries", "corpus", "candidates", "qrels", "chunk_size")
    given = [f"--{name}={getattr(settings, name)}" for name in names]
    return [*given, "--negatives=4", "--depth=20", *more]


def test_labels_by_a_run(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = f"--teacher=bm25=run:{settings.candidates}?scale=0.5"
    assert label.main(arguments(settings, teacher, "--usd_per_hour=3600")) == 0
    shown = capsys.readouterr()
    assert "scored 60 pairs" in shown.out
    assert "labels of bm25 are complete" in shown.out
    assert "12 lists, 60 pairs" in shown.err
    assert "60 of 60 pairs" in shown.err
    assert "$" in shown.out
    scores = {}
    for line in pathlib.Path(settings.candidates).read_text().splitlines():
        query, _, document, _, score, _ = line.split()
        scores[query, document] = float(score)
    for pair in read_labels(settings.output_dir):
        half = scores[pair.query_id, pair.document_id] / 4
        assert pair.logits == (-half, half)
    assert label.main(arguments(settings, teacher)) == 0
    shown = capsys.readouterr()
    assert "scored 0 pairs: all labels were there already;" in shown.out
    assert "all 60 pairs are in the store already" in shown.err


def test_a_run_with_two_scores_for_the_same_texts(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, run, qrels = (
        pathlib.Path(settings.corpus, name) for name in ("queries.jsonl", "run.trec", "qrels.txt")
    )
    # Query 10 asks what query 3 does, and has the same candidates with higher scores.
    asked.write_text(asked.read_text().replace("question 10", "question 3"))
    lines = [line for line in run.read_text().splitlines() if not line.startswith("q10 ")]
    copied = [re.sub(r" (\d+) t$", r" 1\1 t", line.replace("q3 ", "q10 ")) for line in lines if "q3 " in line]
    run.write_text("\n".join([*lines, *copied]) + "\n")
    qrels.write_text(
        "".join(line for line in qrels.open() if "q10 " not in line) + "q10 0 d21 1\nq10 0 d22 1\n"
    )
    own = [*arguments(settings), "--negatives=29", "--depth=30"]
    assert label.main([*own, f"--teacher=bm25=run:{run}"]) == 0
    shown = capsys.readouterr().err
    scores = {(line.split()[0], line.split()[2]): float(line.split()[4]) for line in run.open()}
    pairs = list(read_labels(settings.output_dir))
    others = [pair for pair in pairs if pair.logits[1] * 2 != scores[pair.query_id, pair.document_id]]
    assert {pair.query_id for pair in others} == {"q10"}
    assert len(others) >= 28
    words = "pairs have the texts of another pair and another score, or none; the first counts"
    assert f"bm25: {len(others)} {words}" in shown
    count = LabelFolder(settings.output_dir).info["conflicting_labels"]
    assert count == {"bm25": len(others)}
    assert label.main([*own, f"--teacher=flat=run:{run}?scale=0"]) == 0
    assert words not in capsys.readouterr().err
    assert LabelFolder(settings.output_dir).info["conflicting_labels"] == {**count, "flat": 0}


def test_two_teachers_and_an_ensemble_over_two_processes(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    run = settings.candidates
    teachers = [f"--teacher=one=run:{run}", f"--teacher=two=run:{run}?scale=3", "--ensemble=1,0.5"]
    assert label.main(arguments(settings, *teachers, "--process_index=0", "--process_count=2")) == 0
    shown = capsys.readouterr()
    assert "not complete yet" in shown.out
    assert "ensemble follows" in shown.err
    assert label.main(arguments(settings, *teachers, "--process_index=1", "--process_count=2")) == 0
    assert "labels of one, two, ensemble are complete" in capsys.readouterr().out
    assert LabelFolder(settings.output_dir).info["complete"] is True
    one, both = (list(read_labels(settings.output_dir, teacher=name)) for name in ("one", "ensemble"))
    assert [pair.logits[1] for pair in both] == pytest.approx([2.5 * pair.logits[1] for pair in one])


def test_a_signal_stops_between_chunks(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(FakeTeacher):
        def logits(self, chunks: Iterable[Sequence[PairText]]) -> Iterator[np.ndarray]:
            for number, values in enumerate(super().logits(chunks)):
                if number == 1:
                    signal.raise_signal(signal.SIGTERM)
                yield values

    made: list[FakeTeacher] = []

    def opened(_: object) -> FakeTeacher:
        made.append(FakeTeacher() if made else Interrupted())
        return made[-1]

    monkeypatch.setattr(label, "open_teacher", opened)
    monkeypatch.setattr(label, "check_model", lambda _: None)
    assert label.main(arguments(settings, "--teacher=fake=t5:x")) == 143
    assert "run the same command to go on" in capsys.readouterr().err
    assert made[0].closed
    assert label.main(arguments(settings, "--teacher=fake=t5:x")) == 0
    assert "scored 28 pairs" in capsys.readouterr().out
    assert len(made[1].seen) == 60 - 32


def test_where_it_stands_still_is_told(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []

    class Stuck(FakeTeacher):
        def logits(self, chunks: Iterable[Sequence[PairText]]) -> Iterator[np.ndarray]:
            for number, values in enumerate(super().logits(chunks)):
                if number == 2:
                    told.append(wait_for_report(capsys))
                yield values

    monkeypatch.setattr(label, "open_teacher", lambda _: Stuck())
    monkeypatch.setattr(label, "check_model", lambda _: None)
    given = ["--teacher=fake=t5:x", "--hang_seconds=0.3", "--process_index=0", "--process_count=1"]
    assert label.main(arguments(settings, *given)) == 0
    assert re.search(r"HANG\? no chunk was finished for \d+s \(allowed: 0s\)\n  process 0 of 1 on ", told[0])
    assert "\n  last finished chunk: 2\n  phase: scoring, for " in told[0]
    assert "test_label.py" in told[0], "the line of the code that is stuck"


def test_import_and_export(
    settings: Settings, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert label.main(arguments(settings, f"--teacher=bm25=run:{settings.candidates}")) == 0
    for kind in ("tsv", "jsonl"):
        path, again = tmp_path / f"labels.{kind}", tmp_path / f"again_{kind}"
        assert label.main([f"--export_{kind}={path}", f"--output_dir={settings.output_dir}"]) == 0
        assert f"wrote 60 pairs to {path}" in capsys.readouterr().out
        texts = [f"--queries={settings.queries}", f"--corpus={settings.corpus}"] if kind == "tsv" else []
        command = [f"--import_{kind}={path}", f"--output_dir={again}", "--teacher_name=bm25", *texts]
        assert label.main(command) == 0
        exported = tmp_path / f"second.{kind}"
        assert (
            label.main([f"--export_{kind}={exported}", f"--output_dir={again}", "--teacher_name=bm25"]) == 0
        )
        assert exported.read_bytes() == path.read_bytes()


def test_malformed_rows_are_left_out_and_reported(
    settings: Settings, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    corpus = pathlib.Path(settings.corpus, "corpus.jsonl")
    lines = corpus.read_text().splitlines()
    lines[5] = "{not json"
    corpus.write_text("\n".join(lines) + "\n")
    teacher = f"--teacher=run:{settings.candidates}"
    assert label.main(arguments(settings, teacher)) == 2
    assert "corpus.jsonl:6" in capsys.readouterr().err
    assert label.main(arguments(settings, teacher, "--skip_malformed")) == 0
    shown = capsys.readouterr().err
    assert "left out 1 malformed row" in shown
    assert "candidates that are not in the corpus, left out" in shown
    pairs = list(read_labels(settings.output_dir))
    assert pairs
    assert all(pair.document_id != "d5" for pair in pairs)
    assert caplog.text == "", "the labelling said it; whoever reads the labels later does not again"
    info = json.loads(pathlib.Path(settings.output_dir, "labels.json").read_text())
    assert info["corpus"]["on_malformed"] == "skip"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--teacher=run:x", "--negative=3"], r"unknown flag --negative\. Did you mean '--negatives'"),
        ([], "--teacher missing"),
        (["--teacher=run:x", "--negatives=0"], "--negatives"),
        (["--teacher=a=run:x", "--teacher=a=run:y"], "two teachers are called 'a'"),
        (["--teacher=a=run:x", "--ensemble=1,2"], "2 ensemble weights for 1"),
        (["--teacher=ensemble=run:x", "--teacher=run:y", "--ensemble=1,2"], "a teacher is called 'ensemble'"),
        (["--teacher=run:x", "--export_tsv=y"], "nothing is scored there"),
        (["--import_tsv=x", "--export_tsv=y"], "expected one of them"),
        (["--import_jsonl=x"], "--teacher_name missing with --import_jsonl"),
        (["--teacher=run:x", "--teacher_name=a"], "is for imports and exports"),
        (["--teacher=run:/no/such/run"], "no such file"),
        (
            ["--teacher=run:x", "--hang_seconds=-1"],
            "--hang_seconds: -1 is not a number of seconds of 0 or more",
        ),
    ],
)
def test_bad_flags(
    more: list[str], message: str, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert label.main(arguments(settings, *more)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert re.search(message, error[0]), error[0]


@pytest.mark.parametrize(
    "spec",
    ["{here}/monot5-bas", "bi-encoder:./nothing", "a/models/monot5-bas", "run:candidates.trec", "t5:../a/b"],
)
def test_a_path_that_is_not_there_is_told_before_sampling(
    spec: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = pathlib.Path(settings.corpus)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for folder in (here, here / "a" / "models"):
        (folder / "monot5-base").mkdir(parents=True)
    assert label.main(arguments(settings, f"--teacher={spec.format(here=here)}")) == 2
    shown = capsys.readouterr().err
    assert "no such file or folder." in shown
    assert ("Did you mean 'monot5-base'?" in shown) == ("monot5" in spec)
    assert not pathlib.Path(settings.output_dir).exists()


@pytest.mark.parametrize("spec", ["ex/nope", "cross-encoder:ex/nope", "{here}", "bi-encoder:{here}"])
def test_a_model_that_is_not_there_is_told_before_anything_is_written(
    spec: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert label.main(arguments(settings, f"--teacher={spec.format(here=settings.corpus)}")) == 2
    error = capsys.readouterr().err
    assert re.search("hub was not reached|is no checkpoint|no modules.json", error), error
    assert not pathlib.Path(settings.output_dir).exists()


def test_another_corpus_is_named(
    settings: Settings, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = f"--teacher=bm25=run:{settings.candidates}"
    assert label.main(arguments(settings, teacher)) == 0
    other = tmp_path / "other.jsonl"
    other.write_text(pathlib.Path(settings.corpus, "corpus.jsonl").read_text().replace("d1", "D1"))
    info = pathlib.Path(settings.output_dir, "labels.json")
    for then in (settings.corpus, "unknown path"):
        assert label.main([*arguments(settings, teacher, "--seed=3"), f"--corpus={other}"]) == 2
        shown = capsys.readouterr().err
        assert "has lists of something else: corpus, sampling (- there, + now):" in shown
        assert re.search(rf"\n- corpus.input: {then} \(contents \w{{12}}\)\n", shown)
        assert re.search(rf"\n\+ corpus.input: {other} \(contents \w{{12}}\)\n", shown)
        assert "- sampling.seed: 0\n+ sampling.seed: 3\nRun it with those again" in shown
        info.unlink(missing_ok=True)


def test_a_bad_line_of_an_import_names_the_flag_that_leaves_it_out(
    settings: Settings, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"--queries={settings.queries}", f"--corpus={settings.corpus}"]
    (tmp_path / "bad.tsv").write_text("1.0\t-1.0\tq1\n")
    (tmp_path / "bad.jsonl").write_text("{\n")
    for kind, more in (("tsv", texts), ("jsonl", [])):
        command = [f"--import_{kind}={tmp_path}/bad.{kind}", f"--output_dir={tmp_path}/l", "--teacher_name=t"]
        assert label.main([*command, *more]) == 2
        shown = capsys.readouterr().err
        assert shown.endswith("Correct the line, or leave such lines out with --skip_malformed.\n")


def test_a_hub_id_is_no_local_path(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_path(parse_spec("castorini/monot5-base-msmarco"))
    check_path(parse_spec("t5-small"))
    (tmp_path / "castorini").mkdir()
    check_path(parse_spec("castorini/monot5-base-msmarco"))


def test_missing_flags(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert label.main([f"--output_dir={tmp_path}", "--teacher=run:x"]) == 2
    assert "--queries, --corpus, --candidates missing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_titles_that_serve_as_queries_stay_out_of_the_documents(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, queries, run = tmp_path / "corpus", tmp_path / "queries.jsonl", tmp_path / "run.trec"
    corpus.mkdir()
    rows = [{"_id": f"d{i}", "title": f"title {i}", "text": f"text {i}"} for i in range(4)]
    (corpus / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generated = [
        {"query_id": f"q{i}", "doc_id": f"d{i}", "query": f"title {i}", "text": f"text {i}"} for i in range(4)
    ]
    queries.write_text("".join(json.dumps(row) + "\n" for row in generated))
    run.write_text("".join(f"q{q} Q0 d{d} {d + 1} {9 - d} bm25\n" for q in range(4) for d in range(4)))
    shared = [f"--queries={queries}", f"--corpus={corpus}", f"--candidates={run}", f"--teacher=run:{run}"]
    shared.append("--negatives=2")
    assert label.main([*shared, f"--output_dir={tmp_path / 'texts'}", "--text_only"]) == 0
    assert label.main([*shared, f"--output_dir={tmp_path / 'titles'}"]) == 0
    assert {pair.document for pair in read_labels(tmp_path / "texts")} == {f"text {i}" for i in range(4)}
    titled = {pair.document for pair in read_labels(tmp_path / "titles")}
    assert titled == {f"title {i} text {i}" for i in range(4)}
    capsys.readouterr()
    assert label.main([*shared, f"--output_dir={tmp_path / 'titles'}", "--text_only"]) == 2
    assert "corpus.titles" in capsys.readouterr().err
