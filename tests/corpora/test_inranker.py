"""InRanker's label formats: exact reading, clear errors, counted skips, and swapped logits."""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from inranker_jax.corpora.inranker import (
    ReadReport,
    read_beir_jsonl,
    read_msmarco_tsv,
    text_id,
    write_beir_jsonl,
    write_msmarco_tsv,
)
from inranker_jax.errors import InputError
from inranker_jax.records import LabelledPair

QUERIES = {"q1": "first query", "q2": " second ", "blank": " "}
DOCUMENTS = {"0": "zero", "1": "one", "empty": ""}


def write(path: pathlib.Path, *lines: str) -> pathlib.Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_tsv(path: pathlib.Path, **arguments: Any) -> list[LabelledPair]:
    return list(read_msmarco_tsv(path, QUERIES, DOCUMENTS, **arguments))


def record(**changes: Any) -> str:
    return json.dumps({"query": "q", "contents": "d", "true_logit": 1.5, "false_logit": -2, **changes})


def test_tsv(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "l.tsv", "2.5\t-1e-1\tq1\t0", "", "-3\t4\tq2\t1\r")
    assert read_tsv(path) == [
        LabelledPair("q1", "0", "first query", "zero", (-0.1, 2.5)),
        LabelledPair("q2", "1", "second", "one", (4.0, -3.0)),
    ]


def test_tsv_with_the_published_column_names_as_header(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "l.tsv", "positive_score\tnegative_score\tquery_id\tdoc_id", "1\t2\tq1\t0")
    assert [pair.logits for pair in read_tsv(path)] == [(2.0, 1.0)]


def test_jsonl(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "l.jsonl", record(), record(query=" q ", contents="d\n2", extra=[1]))
    first, second = read_beir_jsonl(path)
    assert first == LabelledPair(text_id("q"), text_id("d"), "q", "d", (-2.0, 1.5))
    assert second.query_id == first.query_id
    assert second.document_id != first.document_id


BAD_TSV = [
    ("1\t2\tq1", "columns", "3 columns"),
    ("1\t2\tq1\t0\t5", "columns", "5 columns"),
    ("1 2 q1 0", "columns", "1 columns"),
    ("one\t2\tq1\t0", "number", "positive_score 'one' is not a number"),
    ("1\t\tq1\t0", "number", "negative_score '' is not a number"),
    ("nan\t2\tq1\t0", "not_finite", "positive_score is 'nan'"),
    ("1\t-inf\tq1\t0", "not_finite", "negative_score is '-inf'"),
    ("1\t1e39\tq1\t0", "not_finite", "negative_score is '1e39'"),
    ("1\t2\tq9\t0", "unknown_query", "unknown query id 'q9'"),
    ("1\t2\tq1\t7", "unknown_document", "unknown document id '7'"),
    ("1\t2\tblank\t0", "empty_query", "query 'blank' is empty"),
    ("1\t2\tq1\tempty", "empty_document", "document 'empty' is empty"),
]
BAD_JSONL = [
    ('{"query": "q"', "json", "not JSON"),
    ("[1, 2]", "json", "a JSON list, not an object"),
    ('{"query": "q", "content": "d", "true_logit": 1, "false_logit": 2}', "json", "no key 'contents'"),
    (record(query=5), "json", "'query' is not a string"),
    (record(true_logit="x"), "number", "true_logit 'x' is not a number"),
    (record(true_logit=None), "number", "true_logit None is not a number"),
    (record(false_logit=True), "number", "false_logit True is not a number"),
    (record(false_logit=float("nan")), "not_finite", "false_logit is nan"),
    (record(true_logit=float("inf")), "not_finite", "true_logit is inf"),
    (record(query=" "), "empty_query", "is empty"),
    (record(contents=""), "empty_document", "is empty"),
    (record(contents="\ud800"), "encoding", "half a surrogate pair"),
]


@pytest.mark.parametrize(("line", "kind", "words"), BAD_TSV)
def test_bad_tsv_lines(tmp_path: pathlib.Path, line: str, kind: str, words: str) -> None:
    path = write(tmp_path / "l.tsv", "1\t2\tq1\t0", line, "3\t4\tq2\t1")
    with pytest.raises(InputError, match=rf"l\.tsv:2: {words}"):
        read_tsv(path)
    report = ReadReport()
    assert len(read_tsv(path, on_error="skip", report=report)) == 2
    assert report.skipped == {kind: 1}
    assert (report.lines, report.pairs) == (3, 2)


@pytest.mark.parametrize(("line", "kind", "words"), BAD_JSONL)
def test_bad_jsonl_lines(tmp_path: pathlib.Path, line: str, kind: str, words: str) -> None:
    path = write(tmp_path / "l.jsonl", record(), line, record())
    with pytest.raises(InputError, match=rf"l\.jsonl:2: .*{words}"):
        list(read_beir_jsonl(path))
    report = ReadReport()
    assert len(list(read_beir_jsonl(path, on_error="skip", report=report))) == 2
    assert report.skipped == {kind: 1}


def test_a_misspelt_key_is_recognised(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'true_logits'"):
        list(read_beir_jsonl(write(tmp_path / "l", record().replace("true_logit", "true_logits"))))


def test_skips_are_counted_and_told_once(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "l.tsv", "1\t-1\tq1\t0", *(line for line, _, _ in BAD_TSV))
    report = ReadReport()
    with caplog.at_level(logging.WARNING):
        assert len(read_tsv(path, on_error="skip", report=report)) == 1
        assert capsys.readouterr().err == "", "who asks for a report tells it"
        for _ in range(2):  # once to count the examples, once to read them
            assert len(read_tsv(path, on_error="skip")) == 1
    assert sum(report.skipped.values()) == len(BAD_TSV)
    kinds = "3 columns, 1 empty_document, 1 empty_query, 3 not_finite, 2 number, 1 unknown_document, 1 unknown_query"
    assert "1 pairs from 13 lines" in report.summary()
    assert f"skipped: {kinds} (the first: {path}:2: " in report.summary()
    told = capsys.readouterr().err.splitlines()
    assert told == [f"left out 12 lines ({kinds}); the first: {report.first}"]
    assert not caplog.text
    (more := write(tmp_path / "m.tsv", "1\t-1\tq1\t0", "one")).touch()
    read_tsv(more, on_error="skip")
    assert capsys.readouterr().err == f"left out 1 line (1 columns); the first: {more}:2: 1 columns\n"


def test_bytes_that_are_not_utf8_name_their_line(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "l.tsv"
    path.write_bytes(b"1\t2\tq1\t0\n1\t2\tq\xff\t0\n")
    with pytest.raises(InputError, match=r"l\.tsv:2: .*UTF-8"):
        read_tsv(path, on_error="skip")


def test_an_unknown_policy_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="'raise' or 'skip'"):
        read_tsv(write(tmp_path / "l.tsv", "1\t2\tq1\t0"), on_error="ignore")


def test_centred_logits_are_reported(tmp_path: pathlib.Path) -> None:
    report = ReadReport()
    read_tsv(write(tmp_path / "a", "1.5\t-1.5\tq1\t0", "2\t-2.0004\tq1\t1"), report=report)
    assert report.centred
    report = ReadReport()
    read_tsv(write(tmp_path / "b", "1.5\t-1.5\tq1\t0", "2\t-2.5\tq1\t1"), report=report)
    assert (report.centred, report.uncentred) == (False, 1)
    assert not ReadReport().centred


def labels(queries: int, margins: tuple[float, ...], swap: bool = False, start: int = 0) -> list[str]:
    lines = []
    for query in range(start, start + queries):
        for place, margin in enumerate(margins):
            true = (margin + 0.1 * (query % 7)) * (-1 if swap else 1)
            lines.append(record(query=f"q{query}", contents=f"d{place}", true_logit=true, false_logit=-true))
    return lines


def test_swapped_logits_are_detected_and_read(tmp_path: pathlib.Path) -> None:
    right = write(tmp_path / "right", *labels(30, (3, -2, -1)))
    wrong = write(tmp_path / "wrong", *labels(30, (3, -2, -1), swap=True))
    expected = list(read_beir_jsonl(right))
    with pytest.raises(
        InputError, match=r"swapped: over 30 queries .*first document lies 9\.00 .*swapped=True"
    ):
        list(read_beir_jsonl(wrong))
    assert list(read_beir_jsonl(wrong, swapped=True)) == expected
    with pytest.raises(InputError, match="Leave swapped=True out"):
        list(read_beir_jsonl(right, swapped=True))
    # An error of the whole file is never skipped, but the check can be switched off.
    with pytest.raises(InputError, match="look swapped"):
        list(read_beir_jsonl(wrong, on_error="skip"))
    assert len(list(read_beir_jsonl(wrong, check_orientation=False))) == 90


def test_known_relevance_decides_whatever_the_order(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "l", *labels(30, (-2, -1, 3)))
    with pytest.raises(
        InputError, match="look swapped"
    ):  # worst first: only order speaks here, and it misleads
        list(read_beir_jsonl(path))
    relevant = {text_id(f"q{query}"): {text_id("d2")} for query in range(30)}
    report = ReadReport()
    assert len(list(read_beir_jsonl(path, relevant=relevant, report=report))) == 90
    assert "the relevant documents +9.00" in report.orientation
    with pytest.raises(InputError, match="relevant documents"):
        list(read_beir_jsonl(path, relevant=relevant, swapped=True))


def test_what_the_check_cannot_decide(tmp_path: pathlib.Path) -> None:
    few = write(tmp_path / "few", *labels(19, (3, -2), swap=True))
    pairs = write(tmp_path / "pairs", *labels(50, (3,), swap=True))
    noise = write(
        tmp_path / "noise", *labels(30, (1, 2)), *labels(30, (2, 1), start=30), *labels(5, (1, 2), start=60)
    )
    for path, words in ((few, "undecided, only 19"), (pairs, "undecided, only 0"), (noise, "over 65")):
        report = ReadReport()
        list(read_beir_jsonl(path, report=report))
        assert words in report.orientation


def test_a_long_swapped_file_fails_early(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "l", *labels(600, (3, -2), swap=True), "not even JSON")
    with pytest.raises(InputError, match="over 500 queries"):
        list(read_beir_jsonl(path))


def test_real_teacher_files(shared_data: pathlib.Path) -> None:
    teacher, cranfield = shared_data / "teacher", shared_data / "beir" / "cranfield"
    arguments = (teacher / "cranfield_synthetic.tsv", teacher / "cranfield_synthetic.queries.tsv", cranfield)
    report = ReadReport()
    pairs = list(read_msmarco_tsv(*arguments, titles=False, report=report))
    assert len(pairs) == 13_964
    assert report.centred
    assert not report.skipped
    assert "over 1397 queries" in report.orientation
    from_json = list(read_beir_jsonl(teacher / "cranfield_synthetic.jsonl"))
    assert len(from_json) == 4000
    for a, b in zip(pairs, from_json, strict=False):
        assert (a.query, a.document, a.logits) == (b.query, b.document, b.logits)
    with pytest.raises(InputError, match=r"lies 6\.\d\d \(standard error 0\.\d\d\) BELOW"):
        list(read_msmarco_tsv(*arguments, titles=False, swapped=True))


WRITTEN = [
    LabelledPair("q1", "0", "first query", "zero", (-0.1, 2.5)),
    LabelledPair("q1", "1", "first query", "one", (float(np.float32(0.1)), -1e-7)),
    LabelledPair("q2", "1", "second", "one", (4.0, float(np.float32(-1 / 3)))),
]


def single(pairs: Iterable[LabelledPair]) -> list[tuple[str, str, str, str, list[float]]]:
    """The pairs with their logits as float32, which is what files keep exactly."""
    return [
        (pair.query_id, pair.document_id, pair.query, pair.document, np.float32(pair.logits).tolist())
        for pair in pairs
    ]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_what_is_written_reads_back(tmp_path: pathlib.Path, ending: str) -> None:
    if ending == ".zst":
        pytest.importorskip("zstandard")
    assert write_msmarco_tsv(tmp_path / f"l.tsv{ending}", iter(WRITTEN)) == 3
    assert single(read_tsv(tmp_path / f"l.tsv{ending}")) == single(WRITTEN)
    odd = [LabelledPair("", "", "“q”\u2028\t", 'd "x"\n', (0.5, 1.0)), *WRITTEN]
    assert write_beir_jsonl(tmp_path / f"l.jsonl{ending}", odd) == 4
    back = single(read_beir_jsonl(tmp_path / f"l.jsonl{ending}"))
    assert [pair[2:] for pair in back] == [
        (query.strip(), document.strip(), logits) for _, _, query, document, logits in single(odd)
    ]


def test_the_written_columns_are_the_published_ones(tmp_path: pathlib.Path) -> None:
    write_msmarco_tsv(tmp_path / "l.tsv", WRITTEN)
    assert (tmp_path / "l.tsv").read_text().splitlines()[:2] == ["2.5\t-0.1\tq1\t0", "-1e-07\t0.1\tq1\t1"]
    write_beir_jsonl(tmp_path / "l.jsonl", WRITTEN)
    assert json.loads((tmp_path / "l.jsonl").read_text().splitlines()[0]) == {
        "query": "first query",
        "contents": "zero",
        "true_logit": 2.5,
        "false_logit": -0.1,
    }


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (LabelledPair("a\tb", "0", "q", "d", (0.0, 1.0)), r"cannot write query id 'a\\tb'"),
        (LabelledPair("a", "", "q", "d", (0.0, 1.0)), "cannot write document id ''"),
        (LabelledPair("a", " 0", "q", "d", (0.0, 1.0)), "cannot write document id ' 0'"),
        (LabelledPair("a", "0", "q", "d", (0.0, float("nan"))), "cannot write the logits .*nan"),
        (LabelledPair("a", "0", "q", "d", (1e39, 0.0)), "cannot write the logits"),
    ],
)
def test_what_cannot_be_written_leaves_no_file(
    tmp_path: pathlib.Path, pair: LabelledPair, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write_msmarco_tsv(tmp_path / "l.tsv", [*WRITTEN, pair])
    if "logits" in message:
        with pytest.raises(InputError, match=message):
            write_beir_jsonl(tmp_path / "l.jsonl", [*WRITTEN, pair])
    assert list(tmp_path.iterdir()) == []


def test_real_labels_written_and_read_are_the_same_pairs(
    shared_data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = shared_data / "beir" / "pira-pt"  # the Portuguese texts of labels scored in English
    pairs = list(read_msmarco_tsv(shared_data / "teacher" / "pira_en_human.tsv", folder, folder))
    assert write_msmarco_tsv(tmp_path / "l.tsv", pairs) == len(pairs) == 4520
    assert list(read_msmarco_tsv(tmp_path / "l.tsv", folder, folder)) == pairs
