"""The grammar of teacher specifications, ensembles, and the run teacher."""

from __future__ import annotations

import gzip
import pathlib
import random

import numpy as np
import pytest

from inranker_jax.errors import InputError
from inranker_jax.labeling.pairs import PairText
from inranker_jax.labeling.teachers import (
    combine,
    ensemble_identity,
    open_teacher,
    parse_spec,
    parse_weights,
)
from inranker_jax.labeling.teachers.torch_calls import LENGTHS, plan


@pytest.mark.parametrize(
    ("text", "name", "kind", "path", "options"),
    [
        ("unicamp-dl/InRanker-base", "InRanker-base", "t5", "unicamp-dl/InRanker-base", {}),
        ("/models/monot5-3b/", "monot5-3b", "t5", "/models/monot5-3b/", {}),
        ("gs://bucket/monot5", "monot5", "t5", "gs://bucket/monot5", {}),
        (
            "big=t5:/m/x?dtype=bfloat16&fsdp=4&data=-1",
            "big",
            "t5",
            "/m/x",
            {"dtype": "bfloat16", "fsdp": 4, "data": -1},
        ),
        (
            "cross-encoder:BAAI/bge?false=2&true=0",
            "bge",
            "cross-encoder",
            "BAAI/bge",
            {"false": 2, "true": 0},
        ),
        (
            "e5=bi-encoder:intfloat/e5?query_prompt=query:%20&scale=12&offset=-4.5",
            "e5",
            "bi-encoder",
            "intfloat/e5",
            {"query_prompt": "query: ", "scale": 12.0, "offset": -4.5},
        ),
        ("run:runs/bm25.trec.gz", "bm25.trec.gz", "run", "runs/bm25.trec.gz", {}),
        ("a.b=x=1/model", "a.b", "t5", "x=1/model", {}),
    ],
)
def test_specs(text: str, name: str, kind: str, path: str, options: dict) -> None:
    spec = parse_spec(text)
    assert (spec.name, spec.kind, spec.path, dict(spec.options)) == (name, kind, path, options)


def test_a_path_that_exists_is_left_alone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    assert parse_spec("t5:lr=1").path == "lr=1"
    assert parse_spec("lr=1").name == "lr_1"
    assert parse_spec("mine=lr=1").path == "lr=1"
    with pytest.raises(InputError, match=r"gives no name\. Name it"):
        parse_spec("..")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("crossencoder:x", r"no kind of teacher. Did you mean 'cross-encoder'\?"),
        ("run:", "has no path"),
        ("t5:x?dtpye=float32", r"no option 'dtpye'. Did you mean 'dtype'\?"),
        ("t5:x?dtype=float16", "expected one of float32, bfloat16"),
        ("t5:x?scale=2", "a t5 teacher has no option 'scale'"),
        ("run:x?scale=a", "scale='a'"),
        ("run:x?scale=nan", "finite"),
        ("run:x?scale=1&scale=2", "given twice"),
        ("run:x?scale", "no option. Expected option=value"),
        ("t5:x?fsdp=0", "positive number"),
        ("bi-encoder:x?similarity=cos", "expected one of cosine, dot"),
    ],
)
def test_bad_specs(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_spec(text)


def test_ensemble_centres_and_weighs() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 5, 2)) + np.array([3.0, -7.0])[:, None, None]
    combined = combine([first, second], [0.25, 2.0])
    margins = 0.25 * (first[:, 1] - first[:, 0]) + 2 * (second[:, 1] - second[:, 0])
    np.testing.assert_allclose(combined[:, 1] - combined[:, 0], margins, rtol=1e-6)
    np.testing.assert_allclose(combined.sum(axis=-1), 0, atol=1e-5)
    assert combined.dtype == np.float32


def test_ensemble_identity_ignores_the_order_of_members() -> None:
    assert ensemble_identity(["a", "b"], [1, 2]) == ensemble_identity(["b", "a"], [2, 1])
    assert ensemble_identity(["a", "b"], [1, 2]) != ensemble_identity(["a", "b"], [2, 1])
    assert parse_weights("0.5,1", 2) == [0.5, 1.0]


@pytest.mark.parametrize(
    ("weights", "message"), [("1", "1 ensemble weights for 2"), ("a,b", "2 numbers"), ("0,0", "not all")]
)
def test_bad_weights(weights: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_weights(weights, 2)


def test_members_of_different_pairs_are_refused() -> None:
    with pytest.raises(InputError, match="expected one shape"):
        combine([np.zeros((2, 2)), np.zeros((3, 2))], [1, 1])


def pairs(*ids: str) -> list[PairText]:
    return [PairText(*each.split("/"), "query", "document") for each in ids]


RUN = "q1 Q0 d1 1 3.5 x\nq1 Q0 d2 2 1.25 x\nq2 Q0 d1 1 -2 x\n"


def test_run_teacher_looks_scores_up(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "bm25.trec"
    path.write_text(RUN)
    teacher = open_teacher(f"run:{path}?scale=2&offset=-1")
    first, second = teacher.logits([pairs("q2/d1", "q1/d2"), pairs("q1/d1")])
    assert first.tolist() == [[2.5, -2.5], [-0.75, 0.75]]
    assert second.tolist() == [[-3.0, 3.0]]
    assert first.dtype == np.float32
    teacher.close()


def test_run_identity_is_what_the_run_says(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.trec").write_text(RUN)
    (tmp_path / "b.trec.gz").write_bytes(gzip.compress(RUN.encode()))
    (tmp_path / "c.trec").write_text(RUN.replace("3.5", "3.6"))
    a, b, c = (open_teacher(f"run:{tmp_path / name}").identity for name in ("a.trec", "b.trec.gz", "c.trec"))
    assert a == b
    assert a != c
    assert a != open_teacher(f"run:{tmp_path / 'a.trec'}?scale=2").identity


@pytest.mark.parametrize(
    ("pair", "message"),
    [("q1/d3", "does not list document 'd3' for query 'q1'"), ("q3/d1", "has no query 'q3'")],
)
def test_a_pair_that_the_run_lacks(pair: str, message: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "bm25.trec"
    path.write_text(RUN)
    with pytest.raises(InputError, match=f"bm25.trec: the run {message}.*1 of 2 pairs"):
        list(open_teacher(f"run:{path}").logits([pairs("q1/d1", pair)]))


def test_run_that_is_empty_or_absent(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_teacher(f"run:{tmp_path / 'none.trec'}")
    (tmp_path / "empty.trec").write_text("")
    with pytest.raises(InputError, match="has no query"):
        list(open_teacher(f"run:{tmp_path / 'empty.trec'}").logits([pairs("q1/d1")]))


def test_run_lookup_agrees_with_a_dictionary(tmp_path: pathlib.Path) -> None:
    rng = random.Random(3)
    scores = {(f"q{q}", f"d{d}"): rng.uniform(-9, 9) for q in range(30) for d in range(40)}
    path = tmp_path / "run.trec"
    path.write_text("".join(f"{q} Q0 {d} 1 {score!r} t\n" for (q, d), score in scores.items()))
    wanted = rng.choices(list(scores), k=500)
    (values,) = open_teacher(f"run:{path}").logits([[PairText(q, d, "a", "b") for q, d in wanted]])
    np.testing.assert_array_equal(
        values[:, 1], (np.array([np.float32(scores[w]) for w in wanted], np.float64) / 2).astype(np.float32)
    )


def test_calls_have_fixed_shapes_and_hold_every_sequence() -> None:
    rng = random.Random(0)
    lengths = [rng.randrange(1, 300) for _ in range(500)]
    calls = list(plan(lengths, 300, 1024))
    assert sorted(row for call in calls for row in call.rows[: call.count]) == list(range(500))
    assert len({(call.length, len(call.rows)) for call in calls}) == len({call.length for call in calls})
    for call in calls:
        smaller = [n for n in (0, *LENGTHS) if n < call.length][-1]
        assert all(smaller < lengths[row] <= call.length for row in call.rows)
