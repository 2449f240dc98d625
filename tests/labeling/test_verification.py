"""Each thing that can be wrong with labels is planted, and found; clean labels have no finding."""

from __future__ import annotations

import json
import math
import pathlib
import random

import numpy as np
import pytest

from inranker_jax import label
from inranker_jax.errors import InputError
from inranker_jax.labeling.verification import Verification, auc, summary, verify
from inranker_jax.labeling.verification_report import plot, text_report
from inranker_jax.labeling.verification_sources import open_sources

QUERIES, NEGATIVES = 40, 4
Row = list  # [true logit, false logit, query id, document id]


def make_rows(seed: int = 0) -> list[Row]:
    """Clean lists: the first document of a query is its positive, and usually has the highest margin."""
    rng = random.Random(seed)
    rows = []
    for q in range(QUERIES):
        for place in range(NEGATIVES + 1):
            margin = rng.gauss(5 if place == 0 else -4, 2)
            rows.append([margin / 2, -margin / 2, f"q{q}", f"d{q}-{place}"])
    return rows


def write_tsv(path: pathlib.Path, rows: list[Row]) -> pathlib.Path:
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


def write_jsonl(path: pathlib.Path, rows: list[Row]) -> pathlib.Path:
    records = [
        {"query": f"text of {q}", "contents": f"text of {d}", "true_logit": t, "false_logit": f}
        for t, f, q, d in rows
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_texts(folder: pathlib.Path, rows: list[Row], same: dict[str, str] | None = None) -> dict[str, str]:
    """Texts of the ids; `same` gives a document another's text."""
    queries = {row[2]: f"text of {row[2]}" for row in rows}
    documents = {row[3]: f"text of {row[3]}" for row in rows}
    documents.update({d: documents[other] for d, other in (same or {}).items()})
    for name, texts in (("queries.tsv", queries), ("corpus.tsv", documents)):
        (folder / name).write_text("".join(f"{i}\t{text}\n" for i, text in texts.items()))
    return {"queries": str(folder / "queries.tsv"), "documents": str(folder / "corpus.tsv")}


def check(path: pathlib.Path, **options: object) -> Verification:
    own = {
        key: options.pop(key) for key in list(options) if key in ("queries", "documents", "teacher", "form")
    }
    (source,) = open_sources(path, **own)  # type: ignore[arg-type]
    return verify(source, path.stem, **options)  # type: ignore[arg-type]


def errors(verification: Verification) -> list[str]:
    return sorted(finding.check for finding in verification.errors)


def message(verification: Verification, name: str) -> str:
    (found,) = [finding for finding in verification.findings if finding.check == name]
    return found.message


@pytest.fixture
def rows() -> list[Row]:
    return make_rows()


@pytest.mark.parametrize("write", [write_tsv, write_jsonl])
def test_clean_labels(rows: list[Row], write: object, tmp_path: pathlib.Path) -> None:
    found = check(write(tmp_path / "labels", rows))  # type: ignore[operator]
    assert errors(found) == []
    figures = found.figures
    assert (figures["queries"], figures["lists"], figures["pairs"]) == (QUERIES, QUERIES, len(rows))
    assert figures["list_sizes"] == {"5": QUERIES}
    assert figures["centred"]
    assert figures["positive_on_top"] > 0.9
    margins = np.array([row[0] - row[1] for row in rows], np.float32).reshape(QUERIES, -1)
    assert figures["margin"]["positives"]["mean"] == pytest.approx(margins[:, 0].mean(), rel=1e-5)
    assert figures["margin"]["others"]["quantiles"]["0.5"] == pytest.approx(
        np.median(margins[:, 1:]), rel=1e-5
    )
    assert figures["positive_minus_others"] == pytest.approx(
        (margins[:, 0] - margins[:, 1:].mean(axis=1)).mean(), rel=1e-5
    )
    json.dumps(found.to_dict(), allow_nan=False)
    assert text_report(found).endswith("ok")


def test_ids_alone_are_noted(rows: list[Row], tmp_path: pathlib.Path) -> None:
    path = write_tsv(tmp_path / "labels.tsv", rows)
    assert "only ids were compared" in message(check(path), "no_texts")
    assert check(path, **write_texts(tmp_path, rows)).findings == []


def test_logits_that_are_not_centred(rows: list[Row], tmp_path: pathlib.Path) -> None:
    shifted = [[t - 3, f - 3, q, d] for t, f, q, d in rows]
    found = check(write_tsv(tmp_path / "labels.tsv", shifted))
    assert errors(found) == []
    assert not found.figures["centred"]
    assert found.figures["uncentred_pairs"] == len(rows)
    assert found.figures["mean_abs_sum"] == pytest.approx(6)
    assert "logits are not centred" in text_report(found)


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "1e39"])
def test_logits_that_are_not_finite(rows: list[Row], bad: str, tmp_path: pathlib.Path) -> None:
    rows[7][1] = bad
    found = check(write_tsv(tmp_path / "labels.tsv", rows))
    assert errors(found) == ["finite"]
    assert "labels.tsv:8" in message(found, "finite")
    assert found.figures["pairs"] == len(rows) - 1


def test_nan_in_json_lines(rows: list[Row], tmp_path: pathlib.Path) -> None:
    rows[0][0] = math.nan
    rows[9][0] = math.nan
    found = check(write_jsonl(tmp_path / "labels.jsonl", rows))
    assert errors(found) == ["finite"]
    assert message(found, "finite").startswith("2 logits that are not finite. The first problem: ")


def test_lines_that_cannot_be_read(rows: list[Row], tmp_path: pathlib.Path) -> None:
    path = write_tsv(tmp_path / "labels.tsv", [*rows, [1, 2, "q0"], ["x", 2, "q0", "d9"]])
    found = check(path)
    assert errors(found) == ["columns", "number"]
    assert message(found, "columns").endswith("Correct the line.")
    texts = write_texts(tmp_path, rows[:-1])
    assert errors(check(write_tsv(path, rows), **texts)) == ["unknown_document"]


@pytest.mark.parametrize("write", [write_tsv, write_jsonl])
def test_swapped_columns(rows: list[Row], write: object, tmp_path: pathlib.Path) -> None:
    swapped = [[f, t, q, d] for t, f, q, d in rows]
    found = check(write(tmp_path / "labels", swapped))  # type: ignore[operator]
    assert errors(found) == ["swapped"]
    assert "BELOW" in message(found, "swapped")
    assert message(found, "swapped").endswith("Exchange the two columns, or label again.")
    assert found.figures["positive_minus_others"] < 0
    assert errors(check(write(tmp_path / "labels", swapped), positives="none")) == []  # type: ignore[operator]


def test_the_positive_among_the_negatives_by_id(rows: list[Row], tmp_path: pathlib.Path) -> None:
    rows[8][3] = rows[5][3]
    found = check(write_tsv(tmp_path / "labels.tsv", rows))
    assert errors(found) == ["duplicates", "positive_among_negatives"]
    assert "query 'q1', document 'd1-0' is the positive itself" in message(found, "positive_among_negatives")


def test_the_positive_among_the_negatives_by_text(rows: list[Row], tmp_path: pathlib.Path) -> None:
    texts = write_texts(tmp_path, rows, same={"d3-2": "d3-0", "d7-2": "d7-1"})
    path = write_tsv(tmp_path / "labels.tsv", rows)
    found = check(path, **texts)
    assert errors(found) == ["positive_among_negatives"]
    assert "document 'd3-2' has the positive's text" in message(found, "positive_among_negatives")
    assert "1 documents have the text" not in message(found, "positive_among_negatives")
    assert "2 documents have the text of another one of their list" in message(found, "same_text")
    assert errors(check(path)) == []  # ids alone cannot tell


def test_a_negative_that_is_judged_relevant(rows: list[Row], tmp_path: pathlib.Path) -> None:
    qrels = {f"q{q}": {f"d{q}-0": 1} for q in range(QUERIES)}
    path = write_tsv(tmp_path / "labels.tsv", rows)
    assert errors(check(path, qrels=qrels)) == []
    qrels["q5"]["d5-3"] = 2
    qrels["q6"]["d6-3"] = 0
    found = check(path, qrels=qrels)
    assert errors(found) == ["relevant_among_negatives"]
    assert "query 'q5', document 'd5-3' is judged 2" in message(found, "relevant_among_negatives")
    assert errors(check(path, qrels=qrels, positives="qrels")) == []


def test_duplicates_within_and_across_lists(rows: list[Row], tmp_path: pathlib.Path) -> None:
    rows.insert(13, list(rows[12]))
    found = check(write_tsv(tmp_path / "labels.tsv", rows))
    assert errors(found) == ["duplicates"]
    assert "1 pairs stand twice in one list: query 'q2', document 'd2-2'" in message(found, "duplicates")
    assert "1 of 40 lists have another number of documents than 5" in message(found, "list_sizes")
    again = [*make_rows(), *make_rows()[10:15]]
    found = check(write_tsv(tmp_path / "labels.tsv", again))
    assert errors(found) == ["duplicates"]
    assert "5 pairs stand in two lists: pairs 11 and 201 of those read" in message(found, "duplicates")
    assert "1 times a query begins again" in message(found, "scattered")
    # Ids made from texts: two queries may have one text, so this is no more than a note.
    assert errors(check(write_jsonl(tmp_path / "labels.jsonl", again))) == []


def test_disagreement_with_qrels(rows: list[Row], tmp_path: pathlib.Path) -> None:
    path = write_tsv(tmp_path / "labels.tsv", rows)
    agreeing = check(path, qrels={f"q{q}": {f"d{q}-0": 1} for q in range(QUERIES)}, positives="none")
    figures = agreeing.figures["qrels"]
    assert agreeing.errors == []
    assert figures["compared_queries"] == QUERIES
    # By definition, over all (relevant, other) pairs of a query and of the whole file.
    margins = np.array([row[0] - row[1] for row in rows], np.float32).reshape(QUERIES, -1)
    won = (margins[:, :1] > margins[:, 1:]).mean()
    assert figures["pairwise_accuracy"] == pytest.approx(won)
    everywhere = (margins[:, 0][:, None] > margins[:, 1:].reshape(1, -1)).mean()
    assert figures["auc"] == pytest.approx(everywhere)
    # Judgments of the worst document of each list.
    worst = {f"q{q}": {f"d{q}-{int(margins[q].argmin())}": 1} for q in range(QUERIES)}
    found = check(path, qrels=worst, positives="none")
    assert errors(found) == ["qrels"]
    assert found.figures["qrels"]["pairwise_accuracy"] == 0
    assert "rightly only 0.0% of the time (40 queries): below chance" in message(found, "qrels")
    few = dict(list(worst.items())[:5])
    assert errors(check(path, qrels=few, positives="none")) == []
    assert "below chance" in message(check(path, qrels=few, positives="none"), "qrels")


def test_grades_order_documents(tmp_path: pathlib.Path) -> None:
    rows = [[3, -3, "q", "a"], [2, -2, "q", "b"], [2, -2, "q", "c"], [1, -1, "q", "d"]]
    found = check(
        write_tsv(tmp_path / "labels.tsv", rows),
        qrels={"q": {"a": 1, "b": 2, "c": 1, "d": -2}},
        positives="none",
    )
    # b over a: wrong; b over c: tie; and a, b, c over d: right.
    assert found.figures["qrels"]["pairwise_accuracy"] == pytest.approx(3.5 / 5)


def test_qrels_of_other_queries(rows: list[Row], tmp_path: pathlib.Path) -> None:
    found = check(write_tsv(tmp_path / "labels.tsv", rows), qrels={"x1": {"d0-0": 1}})
    assert errors(found) == ["qrels"]
    assert "belong to other queries" in message(found, "qrels")


def test_the_same_margin_everywhere(rows: list[Row], tmp_path: pathlib.Path) -> None:
    flat = [[1.5, -1.5, q, d] for _, _, q, d in rows]
    found = check(write_tsv(tmp_path / "labels.tsv", flat))
    assert errors(found) == ["constant"]
    assert "margin 3:" in message(found, "constant")


def test_no_pairs_at_all(tmp_path: pathlib.Path) -> None:
    (tmp_path / "labels.tsv").write_text("")
    found = check(tmp_path / "labels.tsv")
    assert errors(found) == ["empty"]
    text_report(found)
    plot([found], tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_lists_without_a_judged_positive(rows: list[Row], tmp_path: pathlib.Path) -> None:
    qrels = {f"q{q}": {f"d{q}-0": 1} for q in range(1, QUERIES)}
    found = check(write_tsv(tmp_path / "labels.tsv", rows), qrels=qrels, positives="qrels")
    assert errors(found) == ["no_positive"]
    assert "query 'q0'" in message(found, "no_positive")


def test_auc_and_summary() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 6, 50).astype(float), rng.integers(0, 5, 70).astype(float)
    slow = np.mean([0.5 * (a == b) + (a > b) for a in left for b in right])
    assert auc(left, right) == pytest.approx(slow)
    assert auc(left, np.zeros(0)) is None
    assert summary(np.zeros(0)) == {"count": 0, "mean": None, "std": None, "quantiles": None}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"positives": "last"}, "Expected one of first, qrels, none"),
        ({"positives": "qrels"}, "needs judgments"),
        ({"form": "msmarco"}, "Did you mean 'msmarco_tsv'"),
        ({"teacher": "x"}, "file of one teacher"),
        ({"queries": "x.tsv"}, "give both queries and corpus"),
    ],
)
def test_options(rows: list[Row], options: dict, problem: str, tmp_path: pathlib.Path) -> None:
    path = write_tsv(tmp_path / "labels.tsv", rows)
    with pytest.raises(InputError, match=problem):
        check(path, **options)


def make_folder(root: pathlib.Path) -> pathlib.Path:
    """A label folder of two teachers, which are TREC runs: `good` likes positives, `upside` does not."""
    rows = make_rows()
    texts = write_texts(root, rows)
    (root / "qrels.tsv").write_text("".join(f"q{q}\td{q}-0\t1\n" for q in range(QUERIES)))
    for name, sign in (("good", 1), ("upside", -1)):
        lines = [f"{q} Q0 {d} 1 {sign * (t - f)} tag\n" for t, f, q, d in rows]
        (root / f"{name}.trec").write_text("".join(lines))
    status = label.main(
        [
            f"--queries={texts['queries']}", f"--corpus={texts['documents']}", f"--qrels={root}/qrels.tsv",
            f"--candidates={root}/good.trec", f"--teacher=good=run:{root}/good.trec",
            f"--teacher=upside=run:{root}/upside.trec", f"--output_dir={root}/labels", "--negatives=3",
        ]
    )  # fmt: skip
    assert status == 0
    return root / "labels"


def test_label_folder(tmp_path: pathlib.Path) -> None:
    folder = make_folder(tmp_path)
    good, upside = open_sources(folder)
    assert (good.teacher, upside.teacher) == ("good", "upside")
    found = verify(good, "labels")
    assert found.findings == []
    assert (found.figures["pairs"], found.figures["lists"]) == (4 * QUERIES, QUERIES)
    margins = {row[3]: np.float32(row[0] - row[1]) for row in make_rows()}
    expected = [margins[f"d{q}-0"] for q in range(QUERIES)]
    np.testing.assert_allclose(found.positives, expected, rtol=1e-6)
    assert errors(verify(upside, "labels")) == ["swapped"]
    assert (
        errors(check(folder, teacher="good", qrels={f"q{q}": {f"d{q}-0": 1} for q in range(QUERIES)})) == []
    )
    with pytest.raises(InputError, match="gooD"):
        open_sources(folder, teacher="gooD")


def test_label_folder_whose_texts_or_labels_are_gone(tmp_path: pathlib.Path) -> None:
    folder = make_folder(tmp_path)
    corpus = tmp_path / "corpus.tsv"
    before = corpus.read_text()
    corpus.write_text(before.replace("text of d3-0\n", "another text\n"))
    found = check(folder, teacher="good")
    assert errors(found) == ["changed_text", "no_positive"]  # it was its list's positive
    assert "query 'q3', document 'd3-0'" in message(found, "changed_text")
    # Said to be other texts, they may differ: a translation.
    assert check(folder, teacher="good", queries=tmp_path / "queries.tsv", documents=corpus).errors == []
    corpus.write_text(before.replace("d3-0\ttext of d3-0\n", ""))
    assert errors(check(folder, teacher="good")) == ["no_positive", "unknown_document"]
    corpus.write_text(before)
    for part in (folder / "store" / "teachers").glob("*/part-*.parquet"):
        part.unlink()
    found = check(folder, teacher="good")
    assert errors(found) == ["empty", "unlabelled"]
    assert message(found, "unlabelled").startswith(f"{4 * QUERIES} pairs of the lists without a label")


def test_a_folder_that_holds_no_labels(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"a folder without lists\.parquet"):
        open_sources(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        open_sources(tmp_path / "nothing.tsv")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(rows: list[Row], suffix: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    clean = check(write_tsv(tmp_path / "clean.tsv", rows))
    others = [check(write_jsonl(tmp_path / f"x{i}.jsonl", make_rows(i))) for i in range(3)]
    path = tmp_path / "new" / f"margins.{suffix}"
    plot([clean, *others], path)
    panels = figures[0].axes
    assert [panel.get_title() for panel in panels[:4]] == ["clean", "x0", "x1", "x2"]
    assert [panel.get_visible() for panel in panels] == [True] * 4 + [False] * 2
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert len(data) > 5000
    with pytest.raises(InputError, match=r"ends with \.png"):
        plot([clean], tmp_path / "margins.bmp")


def test_histogram_shows_both_kinds(rows: list[Row], tmp_path: pathlib.Path) -> None:
    report = text_report(check(write_tsv(tmp_path / "labels.tsv", rows)))
    bars = [line.split("|")[1:] for line in report.splitlines() if line.count("|") == 2]
    assert len(bars) == 16
    longest = [max(range(16), key=lambda i: bars[i][column].count("#")) for column in (0, 1)]
    assert longest[0] > longest[1]


def test_memory_does_not_hold_the_texts(tmp_path: pathlib.Path) -> None:
    """About 22 bytes a pair beside the growth of arrays; texts of 2 kB a pair would show."""
    import tracemalloc

    count = 20000
    with open(tmp_path / "labels.jsonl", "w") as out:
        for i in range(count):
            margin = 2.0 if i % 10 == 0 else -1.0 - i % 7
            record = {
                "query": f"query {i // 10}",
                "contents": f"document {i} " + "x" * 2000,
                "true_logit": margin,
                "false_logit": -margin,
            }
            out.write(json.dumps(record) + "\n")
    (source,) = open_sources(tmp_path / "labels.jsonl")
    tracemalloc.start()
    found = verify(source, "labels")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.errors == []
    assert found.figures["pairs"] == count
    assert peak < 200 * count


def test_published_labels_of_a_real_teacher(shared_data: pathlib.Path) -> None:
    found = check(
        shared_data / "teacher" / "cranfield_synthetic.tsv",
        queries=shared_data / "teacher" / "cranfield_synthetic.queries.tsv",
        documents=shared_data / "beir" / "cranfield",
    )
    assert found.errors == []
    assert found.figures["pairs"] == 13964
    assert found.figures["centred"]
    jsonl = check(shared_data / "teacher" / "cranfield_synthetic.jsonl")
    assert jsonl.errors == []
    assert jsonl.figures["pairs"] == 4000
    assert jsonl.figures["positive_on_top"] > 0.8
