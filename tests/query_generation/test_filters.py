"""Which queries are kept."""

from __future__ import annotations

import pathlib

import pytest

from inranker_jax.errors import InputError
from inranker_jax.query_generation import filters
from inranker_jax.query_generation.filters import Candidate, FilterSettings
from inranker_jax.query_generation.templates import open_template
from inranker_jax.records import write_run
from tests.corpora.test_label_folder import make_folder

DOCUMENT = "The Canadian Armed Forces. 1 The first large-scale mission started in Egypt on November 24, 1956."


@pytest.mark.parametrize(
    ("query", "overlap", "expected"),
    [
        ("the CANADIAN armed forces", 1.0, True),
        ("The first large scale mission started in Egypt!", 1.0, True),
        ("Egypt", 1.0, True),
        ("Egyptian missions", 1.0, False),
        ("when did the first mission start in Egypt?", 1.0, False),
        ("Canadian mission in Egypt", 1.0, False),
        ("Where mission started in Egypt on November 24", 1.0, False),
        ("Where mission started in Egypt on November 24", 0.8, True),
        ("Where mission started in Egypt on November 24", 0.9, False),
        ("forces armed Canadian", 0.5, False),
        ("", 1.0, False),
    ],
)
def test_copies(query: str, overlap: float, expected: bool) -> None:
    assert filters.is_copied(query, DOCUMENT, overlap) is expected


def test_a_query_longer_than_its_document_is_no_copy() -> None:
    assert not filters.is_copied("one two three", "one two")


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("", "empty"),
        ("two words", "short"),
        ("what? is!", "short"),
        ("is this fine", ""),
        ("小さな模型", ""),
        ("what fruit is native to australia", "from_prompt"),
        ("Armed Forces. 1 The", "copied"),
    ],
)
def test_one_query_on_its_own(query: str, reason: str) -> None:
    lines = filters.prompt_lines(open_template("inpars").example_queries())
    assert filters.keep_or_reason(query, DOCUMENT, lines, FilterSettings(copied_overlap=1.0)) == reason


def test_copies_stay_unless_asked() -> None:
    assert filters.keep_or_reason("The Canadian Armed Forces", DOCUMENT, set(), FilterSettings()) == ""


def candidates(*rows: tuple[str, float | None]) -> list[Candidate]:
    return [Candidate(f"q{i}", f"d{i}", query, value) for i, (query, value) in enumerate(rows)]


def test_duplicates() -> None:
    found = filters.drop_duplicates(
        candidates(("What is BM25?", -2.0), ("other", -1.0), ("what is  bm25", -1.0), ("What is bm25!", -1.0))
    )
    assert [item.query_id for item in found] == ["q1", "q2"]
    unknown = filters.drop_duplicates(candidates(("a b", None), ("A b", None)))
    assert [item.query_id for item in unknown] == ["q0"]


def test_mean_log_prob() -> None:
    assert filters.mean_log_prob((-1.0, -3.0)) == -2.0
    assert filters.mean_log_prob(()) is None
    assert filters.mean_log_prob(None) is None


def test_top_k_by_log_prob() -> None:
    items = candidates(("a", -3.0), ("b", -1.0), ("c", -2.0), ("d", -2.0))
    assert [item.query for item in filters.by_log_prob(items, 2)] == ["b", "c"]
    assert filters.by_log_prob(items, 9) == items
    with pytest.raises(InputError, match=r"1 of 2 queries have none \(such as that of document 'd1'\)"):
        filters.by_log_prob(candidates(("a", -1.0), ("b", None)), 1)


def test_by_teacher_score() -> None:
    items = candidates(("a", None), ("b", None), ("c", None), ("d", None))
    scores = {("q0", "d0"): 1.0, ("q1", "d1"): 3.0, ("q3", "d3"): 2.0, ("q2", "d0"): 9.0}
    assert [item.query for item in filters.by_teacher_score(items, scores, None)] == ["a", "b", "d"]
    assert [item.query for item in filters.by_teacher_score(items, scores, 2)] == ["b", "d"]
    with pytest.raises(InputError, match="none of the 4 queries"):
        filters.by_teacher_score(items, {("q0", "d1"): 1.0}, 2)


def test_scores_of_a_run(tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run.trec"
    write_run(run, {"q0": {"d0": 1.5, "d7": 3.0}, "q9": {"d9": 1.0}}, "tag")
    assert filters.read_teacher_scores(run, None, {("q0", "d0"), ("q1", "d1")}) == {("q0", "d0"): 1.5}
    with pytest.raises(InputError, match="is not a label folder"):
        filters.read_teacher_scores(run, "name", set())


def test_all_together_in_order(tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run.trec"
    write_run(run, {f"q{i}": {f"d{i}": float(i)} for i in range(4)}, "tag")
    rows = candidates(("a", -1.0), ("A", -2.0), ("b", -1.0), ("c", -1.5), ("e", -9.0), ("f", -1.2))
    counted: dict[str, int] = {}
    settings = FilterSettings(top_k=4, teacher_scores=str(run), teacher_top_k=2)
    kept = filters.keep_best(rows, settings, counted.__setitem__)
    assert [item.query for item in kept] == ["b", "c"]
    assert counted == {"duplicate": 1, "below_top_k": 1, "no_teacher_score": 1, "below_teacher_top_k": 1}


def test_bad_settings() -> None:
    with pytest.raises(InputError, match="copied_overlap"):
        FilterSettings(copied_overlap=1.5)
    with pytest.raises(InputError, match="--teacher_labels"):
        FilterSettings(teacher_top_k=3)


def test_labelled_queries_are_not_overwritten(tmp_path: pathlib.Path) -> None:
    folder = make_folder(tmp_path / "labels")
    with pytest.raises(InputError, match="would be overwritten"):
        filters.check_output(folder, folder / "texts" / "queries.tsv")
    filters.check_output(folder, tmp_path / "chosen.jsonl")
    filters.check_output(tmp_path / "run.trec", tmp_path / "chosen.jsonl")


def test_scores_of_a_label_folder(tmp_path: pathlib.Path) -> None:
    """The score is the margin; the texts that the folder names are not read."""
    folder = make_folder(tmp_path / "labels", ("t5", "other"))
    (folder / "texts" / "corpus.tsv").unlink()
    wanted = {("q1", "d3"), ("q2", "d0"), ("q9", "d9")}
    assert filters.read_teacher_scores(folder, "t5", wanted) == {("q1", "d3"): 13.0, ("q2", "d0"): 20.0}
    assert filters.read_teacher_scores(folder, "other", wanted) == {("q1", "d3"): -13.0, ("q2", "d0"): -20.0}
    with pytest.raises(InputError, match="t5"):
        filters.read_teacher_scores(folder, None, wanted)
