"""The labelling job: nothing is scored twice, nothing is lost, and what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pytest

from inranker_jax.corpora import label_folder, label_store
from inranker_jax.corpora.label_folder import LabelFolder, Lists, read_labels
from inranker_jax.corpora.label_store import LabelStore
from inranker_jax.errors import InputError
from inranker_jax.flags import Stopped
from inranker_jax.labeling.job import LabelJob, Settings
from inranker_jax.labeling.pairs import PairText
from inranker_jax.labeling.sessions import Session
from tests.labeling.small_mixture import FakeTeacher, text_logits, write_mixture

pytest.importorskip("pyarrow")


def prepared(settings: Settings, messages: list[str] | None = None) -> LabelJob:
    job = LabelJob(settings, announce=(messages if messages is not None else []).append)
    job.prepare()
    return job


def label(settings: Settings, *teachers: FakeTeacher) -> LabelJob:
    job = prepared(settings)
    for teacher in teachers:
        job.label(teacher)
    job.finish()
    return job


def contents(settings: Settings) -> dict[str, bytes]:
    """Every part of the store, by name."""
    folder = pathlib.Path(settings.store or pathlib.Path(settings.output_dir, "store"))
    parts = {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("teachers/*/part-*.parquet")
    }
    assert parts
    return parts


def elsewhere(settings: Settings, name: str, **changes: object) -> Settings:
    folder = str(pathlib.Path(settings.output_dir).with_name(name))
    return dataclasses.replace(settings, output_dir=folder, **changes)  # type: ignore[arg-type]


@pytest.fixture
def settings(tmp_path: pathlib.Path) -> Settings:
    return write_mixture(tmp_path)


def test_the_rates_clock_starts_when_the_teacher_takes_pairs(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(FakeTeacher):
        def logits(self, chunks: Iterable[Sequence[PairText]]) -> Iterator[np.ndarray]:
            moments.append("loaded")
            yield from super().logits(chunks)

    moments: list[str] = []
    monkeypatch.setattr(Session, "hand_over", lambda self: moments.append("started"))
    label(settings, Slow())
    assert moments == ["loaded", "started"]


def test_every_pair_is_labelled_with_its_own_texts(settings: Settings) -> None:
    teacher = FakeTeacher()
    job = label(settings, teacher)
    pairs = list(read_labels(settings.output_dir))
    assert len(pairs) == 12 * 5 == job.lists.num_pairs == len(teacher.seen) == job.scored
    for pair in pairs:
        assert pair.query == f"question {pair.query_id[1:]}"
        assert pair.document == f"title {pair.document_id[1:]} text number {pair.document_id[1:]}"
        assert list(pair.logits) == text_logits(pair.query, pair.document)
    info = job.info()
    assert info["complete"] is True
    assert info["counts"] == {"queries": 12, "pairs": 60, "distinct_pairs": 60}
    assert info["sampling"] == {"negatives": 4, "depth": 20, "seed": 0}
    assert info["cost"]["pairs_scored"] == 60
    assert info["corpus"]["fingerprint"]
    stored = LabelStore(pathlib.Path(settings.output_dir, "store")).teacher(info["teachers"]["fake"])
    assert stored["identity"] == teacher.identity
    assert stored["provenance"]["where"] == "a test"
    assert stored["provenance"]["versions"]["numpy"] == np.__version__


def test_running_again_scores_nothing(settings: Settings) -> None:
    label(settings, FakeTeacher())
    before = contents(settings)
    again = FakeTeacher()
    assert label(settings, again).scored == 0
    assert again.seen == []
    assert contents(settings) == before


def test_a_signal_keeps_finished_chunks(settings: Settings) -> None:
    whole = elsewhere(settings, "whole")
    label(whole, FakeTeacher())
    asked = [False, True]
    job = LabelJob(settings, announce=lambda _: None, stopping=lambda: asked.pop(0))
    job.prepare()
    with pytest.raises(Stopped):
        job.label(FakeTeacher())
    assert job.scored == 32
    with pytest.raises(InputError, match="not complete"):
        next(read_labels(settings.output_dir))
    rest = FakeTeacher()
    label(settings, rest)
    assert len(rest.seen) == 60 - 32
    assert contents(settings) == contents(whole)


def test_processes_share_the_work(settings: Settings) -> None:
    whole = elsewhere(settings, "whole")
    label(whole, FakeTeacher())
    teachers = [FakeTeacher() for _ in range(3)]
    for index in (2, 0, 1):  # whatever the order, and not at the same time
        own = dataclasses.replace(settings, process_index=index, process_count=3)
        job = label(own, teachers[index])
        assert job.info()["complete"] is (index == 1)
    assert sorted(len(teacher.seen) for teacher in teachers) == [16, 16, 28]
    assert contents(settings) == contents(whole)
    assert job.info()["cost"]["pairs_scored"] == 60
    assert list(read_labels(settings.output_dir)) == list(read_labels(whole.output_dir))


def test_another_number_of_processes_goes_on(settings: Settings) -> None:
    label(dataclasses.replace(settings, process_index=1, process_count=2), FakeTeacher())
    rest = FakeTeacher()
    label(settings, rest)
    assert len(rest.seen) == 32
    assert LabelFolder(settings.output_dir).info["complete"]


def test_torn_parts_are_done_again(settings: Settings) -> None:
    label(settings, FakeTeacher())
    before = contents(settings)
    parts = sorted(pathlib.Path(settings.output_dir, "store").glob("teachers/*/part-*.parquet"))
    parts[1].write_bytes(parts[1].read_bytes()[:150])
    parts[2].unlink()
    data = parts[0].read_bytes()
    (size,) = struct.unpack("<I", data[-8:-4])
    parts[0].write_bytes(data[: -8 - size] + b"\xff" * size + data[-8:])
    again = FakeTeacher()
    label(settings, again)
    assert len(again.seen) == 48
    assert contents(settings) == before


def test_a_mixture_that_grows_is_not_scored_again(tmp_path: pathlib.Path) -> None:
    store = str(tmp_path / "store")
    small = dataclasses.replace(write_mixture(tmp_path / "small", queries=5), store=store)
    grown = dataclasses.replace(write_mixture(tmp_path / "grown", queries=9), store=store)
    label(small, FakeTeacher())
    messages: list[str] = []
    teacher = FakeTeacher()
    job = prepared(grown, messages)
    job.label(teacher)
    assert job.scored == len(teacher.seen) == 4 * 5
    assert {pair.query_id for pair in teacher.seen} == {f"q{i}" for i in range(5, 9)}
    assert any("20 pairs to score, 25 in the store from before" in line for line in messages)
    assert len(list(read_labels(grown.output_dir))) == 45
    assert len(list(read_labels(small.output_dir))) == 25
    # What others add to a shared store is none of a folder's files: its dataset has not changed.
    own, both = (set(label_folder.files(folder)[2:]) for folder in (small.output_dir, grown.output_dir))
    assert own < both
    assert len(own) == len(both - own) == 2


def test_what_another_job_scored_meanwhile_is_copied(tmp_path: pathlib.Path) -> None:
    store = str(tmp_path / "store")
    mixture = dataclasses.replace(write_mixture(tmp_path / "mixture"), store=store)
    alone = elsewhere(mixture, "alone", store=str(tmp_path / "alone"))
    label(alone, FakeTeacher())
    # 25 of its 60 pairs, in chunks that begin and end elsewhere than the mixture's.
    some = dataclasses.replace(write_mixture(tmp_path / "some", queries=7), store=store, chunk_size=7)
    some = dataclasses.replace(some, sampling=mixture.sampling)
    everything = elsewhere(mixture, "everything", store=store, chunk_size=60)
    first, second, third, fourth = (FakeTeacher() for _ in range(4))
    label(dataclasses.replace(mixture, process_index=0, process_count=2), first)
    begun = set(contents(mixture))
    label(some, second)
    messages: list[str] = []
    job = prepared(dataclasses.replace(mixture, process_index=1, process_count=2), messages)
    job.label(third)
    assert job.finish()
    label(everything, fourth)
    texts = [(pair.query, pair.document) for seen in (first, second, third) for pair in seen.seen]
    assert len(texts) == len(set(texts)) == 60, "every pair is scored once"
    assert fourth.seen == []
    assert 0 < len(third.seen) == job.scored < 28
    assert job.info()["cost"]["pairs_scored"] == len(first.seen) + job.scored
    assert f"fake: {28 - job.scored} pairs were scored by another job meanwhile" in messages
    # The job's own parts are those of a run that had the store to itself.
    own, expected = contents(mixture), contents(alone)
    assert begun < set(expected)
    assert {name: own[name] for name in expected} == expected
    assert list(read_labels(mixture.output_dir)) == list(read_labels(alone.output_dir))


def test_a_share_that_another_job_scored_meanwhile_asks_the_teacher_nothing(settings: Settings) -> None:
    store = str(pathlib.Path(settings.output_dir).with_name("store"))
    settings = dataclasses.replace(settings, store=store)
    label(dataclasses.replace(settings, process_index=0, process_count=2), FakeTeacher())
    label(elsewhere(settings, "other", chunk_size=30), FakeTeacher())
    rest = FakeTeacher()
    job = label(dataclasses.replace(settings, process_index=1, process_count=2), rest)
    assert rest.seen == []
    assert job.info()["complete"]
    assert len(list(read_labels(settings.output_dir))) == 60


def test_a_lost_part_of_another_job_is_scored_anew(tmp_path: pathlib.Path) -> None:
    store = str(tmp_path / "store")
    small = dataclasses.replace(write_mixture(tmp_path / "small", queries=5), store=store)
    grown = dataclasses.replace(write_mixture(tmp_path / "grown", queries=9), store=store)
    label(small, FakeTeacher())
    key = label(grown, FakeTeacher()).info()["teachers"]["fake"]
    lost = LabelStore(store).folder(key) / f"{LabelStore(store).parts(key)[0]}.parquet"
    rows = LabelStore(store).part_rows(key, lost.stem)
    lost.unlink()
    teacher = FakeTeacher()
    label(grown, teacher)
    assert len(teacher.seen) == rows
    assert len(list(read_labels(grown.output_dir))) == 45


def test_the_same_text_under_two_ids_is_scored_once(settings: Settings) -> None:
    corpus = pathlib.Path(settings.corpus, "queries.jsonl")
    lines = corpus.read_text().replace("question 3", "question 10")
    corpus.write_text(lines)
    # Query 10 gets the candidates of query 3, so that pairs with equal texts arise under different query ids.
    run = pathlib.Path(settings.candidates)
    kept = [line for line in run.read_text().splitlines() if not line.startswith("q10 ")]
    copied = [line.replace("q3 ", "q10 ") for line in kept if line.startswith("q3 ")]
    run.write_text("\n".join([*kept, *copied]) + "\n")
    qrels = pathlib.Path(str(settings.qrels))
    qrels.write_text(qrels.read_text() + "q10 0 d21 1\n")
    everything = dataclasses.replace(
        settings, sampling=dataclasses.replace(settings.sampling, negatives=50, depth=30)
    )
    teacher = FakeTeacher()
    job = label(everything, teacher)
    texts = [(pair.query, pair.document) for pair in teacher.seen]
    assert len(texts) == len(set(texts))
    assert job.info()["counts"]["distinct_pairs"] == len(texts) < job.lists.num_pairs
    for pair in read_labels(settings.output_dir):
        assert list(pair.logits) == text_logits(pair.query, pair.document)


def test_teachers_side_by_side_and_their_ensemble(settings: Settings) -> None:
    one, other = FakeTeacher("one"), FakeTeacher("other", sign=-2.0)
    job = prepared(settings)
    keys = [job.label(one), job.label(other)]
    ensemble = job.ensemble(keys, [1.0, 0.25])
    assert job.finish()
    assert LabelFolder(settings.output_dir).teachers == {
        "one": keys[0],
        "other": keys[1],
        "ensemble": ensemble,
    }
    singles = [list(read_labels(settings.output_dir, teacher=name)) for name in ("one", "other", "ensemble")]
    for first, second, both in zip(*singles, strict=True):
        assert second.logits == tuple(-2 * value for value in first.logits)
        margin = first.logits[1] - first.logits[0]
        assert both.logits == pytest.approx((-0.25 * margin, 0.25 * margin))
    assert len(one.seen) == len(other.seen) == 60, "the ensemble scored nothing"


def test_an_ensemble_waits_for_its_members(settings: Settings) -> None:
    half = dataclasses.replace(settings, process_index=0, process_count=2)
    job = prepared(half)
    assert job.ensemble([job.label(FakeTeacher("one")), job.label(FakeTeacher("two", 3.0))], [1, 1]) is None
    assert not job.finish()
    other = prepared(dataclasses.replace(half, process_index=1))
    key = other.ensemble([other.label(FakeTeacher("one")), other.label(FakeTeacher("two", 3.0))], [1, 1])
    assert other.finish()
    assert other.info()["complete"]
    assert LabelFolder(settings.output_dir).teachers["ensemble"] == key


def test_a_second_teacher_later(settings: Settings) -> None:
    label(settings, FakeTeacher("one"))
    label(settings, FakeTeacher("two", 2.0))
    assert list(LabelFolder(settings.output_dir).teachers) == ["one", "two"]
    with pytest.raises(InputError, match="the name 'one' belongs to teacher"):
        label(settings, FakeTeacher("one", 7.0))


@pytest.mark.parametrize("what", ["corpus", "queries", "candidates", "qrels", "seed"])
def test_other_input_in_the_same_folder(what: str, settings: Settings) -> None:
    label(settings, FakeTeacher())
    before = contents(settings)
    if what == "seed":
        settings = dataclasses.replace(settings, sampling=dataclasses.replace(settings.sampling, seed=5))
    else:
        names = {
            "corpus": "corpus.jsonl",
            "queries": "queries.jsonl",
            "candidates": "run.trec",
            "qrels": "qrels.txt",
        }
        path = pathlib.Path(settings.corpus, names[what])
        path.write_text(path.read_text() + "\n")
    with pytest.raises(InputError) as caught:
        prepared(settings)
    message = str(caught.value)
    assert f"- {'sampling.seed' if what == 'seed' else what + '.input'}: " in message
    assert message.count("\n- ") == 1, "what did not change is not shown"
    assert "--output_dir" in message
    assert contents(settings) == before


def test_what_sampling_left_out_is_reported(settings: Settings) -> None:
    qrels = pathlib.Path(str(settings.qrels))
    qrels.write_text("".join(line for line in qrels.open() if not line.startswith("q4 ")) + "q77 0 d1 1\n")
    messages: list[str] = []
    job = prepared(settings, messages)
    assert "queries of the run without a positive, left out: 1 (such as q4)" in messages
    assert job.lists.counts["no_positive"] == 1
    job.label(FakeTeacher())
    assert job.info()["counts"]["no_positive"] == 1


def test_queries_that_know_their_positive(settings: Settings, tmp_path: pathlib.Path) -> None:
    rows = [
        {"query": f"question {i}", "query_id": f"q{i}", "doc_id": f"d{7 * i + 1}", "text": "..."}
        for i in range(4)
    ]
    inpars = tmp_path / "inpars.jsonl"
    inpars.write_text("".join(json.dumps(row) + "\n" for row in rows))
    label(dataclasses.replace(settings, queries=str(inpars), qrels=None), FakeTeacher())
    (rows,) = Lists(settings.output_dir).rows()
    positives = {rows.query_ids[i]: rows.document_ids[i] for i in np.flatnonzero(rows.relevance)}
    assert positives == {f"q{i}": f"d{7 * i + 1}" for i in range(4)}
    with pytest.raises(InputError, match=r"which document each query belongs to.*--qrels"):
        prepared(elsewhere(settings, "other", qrels=None))


def test_teachers_that_fail(settings: Settings) -> None:
    class Lazy(FakeTeacher):
        def logits(self, chunks):  # type: ignore[no-untyped-def]
            yield from list(super().logits(chunks))[:-1]

    class Broken(FakeTeacher):
        def logits(self, chunks):  # type: ignore[no-untyped-def]
            for values in super().logits(chunks):
                yield values * np.nan

    with pytest.raises(RuntimeError, match="no logits for 1 chunks"):
        label(settings, Lazy())
    with pytest.raises(InputError, match="not finite"):
        label(elsewhere(settings, "broken"), Broken())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process_index": 2, "process_count": 2}, "one less than the count"),
        ({"chunk_size": 0}, "--chunk_size=0"),
        ({"output_dir": "ftp://bucket/labels"}, "no paths of the kind ftp://"),
        ({"usd_per_hour": -1.0}, "--usd_per_hour"),
        ({"corpus": "/no/such/corpus"}, "no such file"),
    ],
)
def test_bad_settings(changes: dict[str, object], message: str, settings: Settings) -> None:
    with pytest.raises(InputError, match=message):
        LabelJob(dataclasses.replace(settings, **changes), announce=print)  # type: ignore[arg-type]


def test_a_missing_run(settings: Settings) -> None:
    with pytest.raises(InputError, match="no such file"):
        prepared(dataclasses.replace(settings, candidates="/no/such/run.trec"))


def test_killed_processes_leave_nothing_behind(settings: Settings) -> None:
    label(dataclasses.replace(settings, process_index=0, process_count=2), FakeTeacher())
    folder = pathlib.Path(settings.output_dir)
    (part,) = [path for path in folder.glob("store/teachers/*/part-*-000000.parquet")]
    (request,) = part.parent.glob("jobs/*.json")
    (session,) = folder.glob("sessions/*.json")
    written = [folder / label_folder.LISTS, folder / label_folder.INFO, session]
    written += [part, request, part.with_name("teacher.json")]
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = [as_process(ended.pid, path) for path in written]
    under_way = [as_process(os.getppid(), path) for path in written]
    for path in left + under_way:
        path.write_bytes(b"half")
    label(settings, FakeTeacher())
    assert [path for path in left if path.exists()] == []
    assert [path for path in under_way if not path.exists()] == []


def as_process(process: int, path: pathlib.Path) -> pathlib.Path:
    """The temporary file in which another process of this machine writes `path`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getpid", lambda: process)
        return label_store.temporary_path(path)


def test_one_process_finishes_while_another_samples(settings: Settings) -> None:
    other = elsewhere(settings, "other")
    label(other, FakeTeacher())
    lists = Lists(other.output_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getpid", os.getppid)
        slow = label_folder.ListsWriter(settings.output_dir, lists.settings)
        slow.__enter__()
    job = label(settings, FakeTeacher())
    assert job.info()["complete"]
    for rows in lists.rows():
        for query in dict.fromkeys(rows.query_ids):
            own = [i for i in range(len(rows)) if rows.query_ids[i] == query]
            slow.add(
                query, [(rows.document_ids[i], int(rows.relevance[i]), rows.keys[i].tobytes()) for i in own]
            )
    slow.__exit__(None, None, None)
    assert list(read_labels(settings.output_dir)) == list(read_labels(other.output_dir))


def test_two_processes_do_the_ensemble_at_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [prepared(settings), prepared(settings)]
    keys = [[job.label(teacher) for teacher in (FakeTeacher("one"), FakeTeacher("two", 3.0))] for job in jobs]
    atomic_path = label_store.atomic_path

    @contextlib.contextmanager
    def slow(path: pathlib.Path) -> Iterator[pathlib.Path]:
        with atomic_path(path) as temporary:
            yield temporary
            if path.name.startswith("part-") and finished == []:
                finished.append(None)
                with pytest.MonkeyPatch.context() as patch:  # the other process does all of it now
                    patch.setattr(os, "getpid", os.getppid)
                    finished[0] = jobs[1].ensemble(keys[1], [1, 1])

    finished: list[str | None] = []
    monkeypatch.setattr(label_store, "atomic_path", slow)
    key = jobs[0].ensemble(keys[0], [1, 1])
    assert finished == [key]
    assert jobs[0].finish()
    assert len(list(read_labels(settings.output_dir, teacher="ensemble"))) == 60


def test_keys_are_those_of_the_texts(settings: Settings) -> None:
    label(settings, FakeTeacher())
    keys = Lists(settings.output_dir).keys()
    for row, pair in enumerate(read_labels(settings.output_dir)):
        assert label_store.pair_key(pair.query, pair.document) == keys[row].tobytes()
    assert label_folder.num_queries(settings.output_dir) == 12
