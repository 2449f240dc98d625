"""`open_corpus` and `open_queries_any`: every format gives the same documents, every bad row is named."""

from __future__ import annotations

import gzip
import json
import pathlib
from typing import Any

import pytest

from inranker_jax.corpora import MalformedReport, open_corpus, open_queries_any
from inranker_jax.corpora.beir import BeirCollection
from inranker_jax.corpora.formats import FORMATS
from inranker_jax.corpora.texts import OffsetTexts
from inranker_jax.errors import InputError
from inranker_jax.records import Document, Query

DOCUMENTS = [
    Document("d1", "texto\tcom tab", "Um"),
    Document("0", "“aspas” \u2028 separador"),
    Document("d3", ""),
]
BEIR = [{"_id": d.id, "title": d.title, "text": d.text, "metadata": {}} for d in DOCUMENTS]


def write(path: pathlib.Path, rows: list[Any] | str | bytes) -> pathlib.Path:
    """Writes bytes, text or JSON Lines, compressed as the name says."""
    if isinstance(rows, list):
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = rows.encode() if isinstance(rows, str) else rows
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".gz"):
        data = gzip.compress(data)
    if path.name.endswith(".zst"):
        data = pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_beir_folder(tmp_path: pathlib.Path, ending: str) -> None:
    write(tmp_path / "set" / f"corpus.jsonl{ending}", BEIR)
    write(
        tmp_path / "set" / f"queries.jsonl{ending}", [{"_id": "q", "text": " a? "}, {"_id": 7, "text": "b"}]
    )
    corpus, queries = open_corpus(tmp_path / "set"), open_queries_any(tmp_path / "set", "beir")
    assert (corpus.format, queries.format) == ("beir", "beir")
    assert list(corpus.documents()) == list(corpus.documents()) == DOCUMENTS
    assert corpus.texts() == {document.id: document.contents for document in DOCUMENTS}
    assert corpus.texts(titles=False)["d1"] == "texto\tcom tab"
    assert isinstance(corpus.texts(), OffsetTexts) == (not ending)
    assert list(queries.queries()) == [Query("q", "a?"), Query("7", "b")]
    assert queries.positives is None


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    "keys", [("_id", "text"), ("id", "contents"), ("doc_id", "body"), ("docid", "passage"), ("pid", "text")]
)
def test_json_lines_by_any_usual_key(tmp_path: pathlib.Path, keys: tuple[str, str], ending: str) -> None:
    rows = [{keys[0]: d.id, "title": d.title or None, keys[1]: d.text} for d in DOCUMENTS]
    corpus = open_corpus(write(tmp_path / f"c.jsonl{ending}", rows))
    assert corpus.format == "jsonl"
    assert list(corpus.documents()) == DOCUMENTS


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tab_separated(tmp_path: pathlib.Path, ending: str, end: str) -> None:
    rows = f"\ufeff0\tzero {end}{end}1\tum{end}2\tdois"
    corpus = open_corpus(write(tmp_path / f"collection.tsv{ending}", rows))
    expected = {"0": "zero", "1": "um", "2": "dois"}
    assert {document.id: document.contents for document in corpus.documents()} == expected
    assert corpus.texts() == expected
    assert list(corpus.texts()) == ["0", "1", "2"]
    for unknown in ("3", "01", "-1", "²", ""):
        assert unknown not in corpus.texts()
    queries = open_queries_any(write(tmp_path / f"queries.train.tsv{ending}", rows))
    assert {query.id: query.text for query in queries.queries()} == expected


def test_a_header_names_the_columns(tmp_path: pathlib.Path) -> None:
    corpus = open_corpus(write(tmp_path / "quati_1M.tsv", "passage_id\tpassage\nclueweb-1_0\tOlá\n"))
    assert list(corpus.documents()) == [Document("clueweb-1_0", "Olá")]
    assert corpus.texts() == {"clueweb-1_0": "Olá"}
    corpus = open_corpus(write(tmp_path / "c.tsv", "id\turl\ttitle\ttext\n5\thttp\tT\tx\n"))
    assert corpus.texts() == {"5": "T x"}
    queries = open_queries_any(write(tmp_path / "topics.tsv", "query_id\tquery\n1\tOnde?\n"))
    assert list(queries.queries()) == [Query("1", "Onde?")]


def test_json_lines_of_queries(tmp_path: pathlib.Path) -> None:
    rows = [
        {"query_id": "a", "query": "x"},
        {"qid": "b", "question": "y", "text": "no"},
        {"id": 3, "text": "z"},
    ]
    queries = open_queries_any(write(tmp_path / "q.jsonl", rows))
    assert [(query.id, query.text) for query in queries.queries()] == [("a", "x"), ("b", "y"), ("3", "z")]


def test_parts_are_one_corpus_and_a_repeat_across_parts_is_named(tmp_path: pathlib.Path) -> None:
    for part in range(3):
        rows = f"passage_id\tpassage\np{part}\ttexto {part}\n" if part != 1 else "p1\ttexto 1\n"
        write(tmp_path / f"part_0{part}.tsv", rows)
    corpus = open_corpus(tmp_path / "part_0?.tsv")
    assert corpus.texts() == {f"p{part}": f"texto {part}" for part in range(3)}
    write(tmp_path / "part_03.tsv", "p9\tx\np1\ty\n")
    with pytest.raises(InputError, match=r"part_03.tsv:2: id 'p1' occurs twice, first at .*part_01.tsv:1"):
        open_corpus(tmp_path / "part_0?.tsv").texts()


JSON_ERRORS = [
    (b'{"_id": "b", "text": "caf\xe9"}', "encoding", r":2: byte 26 of the line, 0xe9, is not UTF-8"),
    (b'{"_id": "b", "text": "\\ud800"}', "encoding", r":2: 'text' holds half a surrogate pair"),
    (b'{"_id": "b", "text": ', "json", r":2: not JSON \(Expecting value at column"),
    (b"[1, 2]", "json", r":2: a JSON list"),
    (b"[" * 100_000, "json", r":2: not JSON"),
    (b'{"_id": "b", "Text": "x"}', "missing_field", r":2: no 'text' .* Did you mean 'Text'"),
    (b'{"_id": "b", "text": null}', "missing_field", r":2: 'text' is null"),
    (b'{"_id": "b", "text": ["x"]}', "bad_field", r":2: 'text' is \['x'\]. Expected a string"),
    (b'{"_id": "b", "text": "x", "title": 7}', "bad_field", r":2: 'title' is 7"),
    (b'{"text": "x"}', "missing_field", r":2: no id among the fields \['text'\]"),
    (b'{"_id": "b c", "text": "x"}', "bad_id", r":2: '_id' is 'b c'. Expected a string without blanks"),
    (b'{"_id": "", "text": "x"}', "bad_id", r":2: '_id' is ''"),
    (b'{"_id": null, "text": "x"}', "bad_id", r":2: '_id' is None"),
    (
        b'{"_id": "a", "text": "y"}',
        "duplicate_id",
        r":2: id 'a' occurs twice, first on line 1. Expected unique",
    ),
]
TSV_ERRORS = [
    (b"b\tcaf\xe9", "encoding", r":2: byte 6 of the line, 0xe9, is not UTF-8"),
    (b"no tab", "columns", r":2: no tab in the line. Expected 2 columns"),
    (b"b\tx\ty", "columns", r":2: 3 tab-separated columns. Expected 2 columns"),
    (b"\tx", "bad_id", r":2: '_id' is ''"),
    (b"a\ty", "duplicate_id", r":2: id 'a' occurs twice, first on line 1"),
]


@pytest.mark.parametrize(
    ("name", "bad", "kind", "message"),
    [("c.jsonl", *case) for case in JSON_ERRORS] + [("c.tsv", *case) for case in TSV_ERRORS],
)
def test_a_bad_row_is_named_or_left_out_and_counted(
    tmp_path: pathlib.Path, name: str, bad: bytes, kind: str, message: str
) -> None:
    good = (
        [b'{"_id": "a", "text": "x"}', b'{"_id": "z", "text": "last"}']
        if "json" in name
        else [b"a\tx", b"z\tlast"]
    )
    path = write(tmp_path / name, b"\n".join([good[0], bad, b"", good[1]]))
    for use in (lambda corpus: list(corpus.documents()), lambda corpus: corpus.texts()):
        with pytest.raises(InputError, match=message) as caught:
            use(open_corpus(path))
        assert str(caught.value).startswith(f"{path}:2: ")
        assert "skip_malformed" in str(caught.value)
    report = MalformedReport()
    corpus = open_corpus(path, on_malformed="skip", report=report)
    assert [document.id for document in corpus.documents()] == ["a", "z"]
    assert corpus.texts() == {"a": "x", "z": "last"}
    assert report.counts == {kind: 1}  # two passes, counted once
    assert report.summary().startswith(f"left out 1 malformed row: 1 {kind}\n  {kind}: {path}:2: ")


def test_a_bad_query_is_named(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "q.tsv", "a\tx\nb\t \na\ty\n")
    with pytest.raises(InputError, match=r"q.tsv:2: query 'b' is empty"):
        list(open_queries_any(path).queries())
    queries = open_queries_any(path, on_malformed="skip")
    assert list(queries.queries()) == [Query("a", "x")]
    assert queries.report.counts == {"empty_text": 1, "duplicate_id": 1}


def test_wrong_columns_below_a_header(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "c.tsv", "id\ttitle\ttext\n1\ta\tb\n2\tb\n")
    with pytest.raises(
        InputError, match=r"c.tsv:3: 2 tab-separated columns. Expected 3 columns: id\\ttitle\\ttext"
    ):
        list(open_corpus(path).documents())


def test_the_report_names_the_first_rows_of_each_kind_and_serves_several_sources(
    tmp_path: pathlib.Path,
) -> None:
    one = write(tmp_path / "one.tsv", "a\tx\n" + "bad\n" * 1200 + "a\ty\n")
    two = write(tmp_path / "two.tsv", "a\tx\nbad\n")
    report = MalformedReport()
    corpora = [open_corpus(path, on_malformed="skip", report=report) for path in (one, two)]
    for _ in range(2):
        assert [len(list(corpus.documents())) for corpus in corpora] == [1, 1]
    next(iter(corpora[0].documents()))  # a pass that stops early changes nothing
    assert report.total == 1202
    assert report.summary().splitlines() == [
        "left out 1,202 malformed rows: 1,201 columns, 1 duplicate_id",
        *(f"  columns: {one}:{line}: no tab in the line" for line in (2, 3, 4)),
        f"  duplicate_id: {one}:1202: id 'a' occurs twice, first on line 1",
    ]
    assert MalformedReport().summary() == "no malformed rows"


def test_rows_left_out_are_logged_when_nobody_takes_the_report(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "c.tsv", "a\tx\nbad\n")
    list(open_corpus(path, on_malformed="skip").documents())
    assert "left out 1 malformed row: 1 columns" in caplog.text


def test_many_repeats_cost_a_few_passes_only(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "c.tsv", "".join(f"d{row % 50}\tx\n" for row in range(500)))
    corpus = open_corpus(path, on_malformed="skip")
    opened = []
    inner = corpus._table._open
    monkeypatch.setattr(corpus._table, "_open", lambda name: opened.append(name) or inner(name))
    assert len(list(corpus.documents())) == 50
    assert corpus.report.counts == {"duplicate_id": 450}
    assert len(opened) == 3


@pytest.mark.parametrize("opened", [open_corpus, open_queries_any])
def test_a_source_without_rows_is_an_error(tmp_path: pathlib.Path, opened: Any) -> None:
    path = write(tmp_path / "empty.tsv", "\n")
    read = "documents" if opened is open_corpus else "queries"
    with pytest.raises(InputError, match=rf"empty.tsv: it holds no {read}"):
        list(getattr(opened(path), read)())
    write(path, "bad\n")
    with pytest.raises(InputError, match=rf"it holds no {read} \(1 malformed rows were left out\)"):
        list(getattr(opened(path, on_malformed="skip"), read)())


def test_a_cut_off_file_is_never_skipped(tmp_path: pathlib.Path) -> None:
    whole = gzip.compress(b"".join(b"d%d\ttext %d\n" % (row, row * row) for row in range(5000)))
    (tmp_path / "cut.tsv.gz").write_bytes(whole[:-3000])
    with pytest.raises(InputError, match=r"cut.tsv.gz: not a whole gzip file"):
        list(open_corpus(tmp_path / "cut.tsv.gz", on_malformed="skip").documents())


def test_a_cut_off_zstd_file_is_never_skipped(tmp_path: pathlib.Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    halves = [
        b"".join(b"d%d\ttext %d\n" % (row, row * row) for row in range(*r)) for r in ((0, 4000), (4000, 8000))
    ]
    frames = b"".join(zstandard.ZstdCompressor().compress(half) for half in halves)
    path = tmp_path / "c.tsv.zst"
    path.write_bytes(frames)
    assert len(list(open_corpus(path).documents())) == 8000  # frames one after another are one file
    for cut in (frames[:-1], frames[:-3000], frames + b"\0\0\0\0", frames[: len(frames) // 4]):
        path.write_bytes(cut)
        with pytest.raises(InputError, match=r"c\.tsv\.zst: not a whole zstd file"):
            list(open_corpus(path, on_malformed="skip").documents())


def test_a_folder_read_as_corpus_and_as_queries_counts_both(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "corpus.jsonl", [*BEIR, {"_id": "x"}, {"_id": "y"}])
    write(tmp_path / "queries.jsonl", [{"_id": "q", "text": "a"}, {"_id": "q"}])
    report = MalformedReport()
    list(open_corpus(tmp_path, on_malformed="skip", report=report).documents())
    list(open_queries_any(tmp_path, on_malformed="skip", report=report).queries())
    assert report.counts == {"missing_field": 3}


def test_a_corpus_that_changes_under_its_texts_is_reported(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "c.jsonl", [{"id": "a", "text": "x"}, {"id": "b", "text": "y"}])
    texts = open_corpus(path).texts()
    with open(path, "r+b") as file:
        file.write(b"[")
    with pytest.raises(InputError, match=r"c.jsonl: the file changed while it was read"):
        texts["a"]


def test_unknown_formats_and_policies(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "c.tsv", "a\tx\n")
    with pytest.raises(
        InputError, match=rf"format 'josnl': expected one of {', '.join(FORMATS)}, or auto. Did you"
    ):
        open_corpus(path, "josnl")
    with pytest.raises(InputError, match="on_malformed='ignore': expected 'raise' or 'skip'"):
        open_corpus(path, on_malformed="ignore")  # type: ignore[arg-type]


def test_real_collections(shared_data: pathlib.Path) -> None:
    for name, documents, queries in (
        ("scifact", 5183, 1109),
        ("pira-pt", 309, 452),
        ("quati-human-pt", 239, 24),
    ):
        folder = shared_data / "beir" / name
        corpus = open_corpus(folder)
        loaded = BeirCollection.load(folder)
        assert list(corpus.documents()) == list(loaded.documents.values())
        texts = corpus.texts()
        assert list(texts) == list(loaded.documents)
        assert len(texts) == documents
        assert all(texts[key] == document.contents for key, document in loaded.documents.items())
        assert sum(1 for _ in open_queries_any(folder).queries()) == queries
    synthetic = open_queries_any(shared_data / "teacher" / "scifact_synthetic.queries.tsv")
    assert sum(1 for _ in synthetic.queries()) == 5183
