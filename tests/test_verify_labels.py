"""The command: flags, exit status, and the files it writes."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from inranker_jax import verify_labels
from tests.labeling.test_verification import Row, make_rows, write_jsonl, write_texts, write_tsv


@pytest.fixture
def rows() -> list[Row]:
    return make_rows()


def run(*arguments: str) -> int:
    return verify_labels.main(arguments)


def test_clean_labels_exit_0(rows: list[Row], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    path = write_tsv(tmp_path / "labels.tsv", rows)
    texts = write_texts(tmp_path, rows)
    (tmp_path / "qrels.tsv").write_text("".join(f"q{q}\td{q}-0\t1\n" for q in range(40)))
    status = run(
        f"--labels={path}", f"--queries={texts['queries']}", f"--corpus={texts['documents']}",
        f"--qrels={tmp_path}/qrels.tsv", f"--plot={tmp_path}/m.png", f"--json={tmp_path}/report.json",
    )  # fmt: skip
    assert status == 0
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    (report,) = json.loads((tmp_path / "report.json").read_text())["labels"]
    assert report["ok"]
    assert report["pairs"] == 200
    assert report["findings"] == []
    assert report["qrels"]["pairwise_accuracy"] > 0.9
    out = capsys.readouterr().out
    assert out.startswith("labels: ")
    assert "40 queries, 200 pairs, 5 a list" in out


def test_findings_exit_1(rows: list[Row], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", rows)
    bad = write_jsonl(tmp_path / "bad.jsonl", [[f, t, q, d] for t, f, q, d in rows])
    assert run(f"--labels={good}", f"--labels=mine={bad}", f"--json={tmp_path}/r.json") == 1
    out = capsys.readouterr().out
    assert "ERROR [swapped]" in out
    assert "  1 error\n" in out
    assert out.rstrip().endswith("1 of 2 ok; errors in mine")
    good_report, bad_report = json.loads((tmp_path / "r.json").read_text())["labels"]
    assert (good_report["name"], good_report["ok"]) == ("good", True)
    assert (bad_report["name"], bad_report["ok"]) == ("mine", False)
    assert [finding["check"] for finding in bad_report["findings"]] == ["swapped"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels=nowhere.tsv"], "nowhere.tsv: no such file"),
        (["--label=x"], "--labels"),
        (["--labels={path}", "--qrel=x"], "Did you mean '--qrels'"),
        (["--labels={path}", "--format=beir_json"], "Did you mean 'beir_jsonl'"),
        (["--labels={path}", "--plot=x.bmp"], "ends with .png"),
        (["--labels={path}", "--qrels=lab=x"], "no --labels are called 'lab'"),
        (["--labels={path}", "--qrels=a", "--qrels=b"], "two files for all labels"),
        (["--labels=a={path}", "--labels=a={path}"], "two are called 'a'"),
        (["--labels={path}", "--positives=qrels"], "give qrels"),
        (["--labels={path}", "--queries={path}"], "give both queries and corpus"),
    ],
)
def test_bad_input_exits_2(
    rows: list[Row],
    arguments: list[str],
    message: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
) -> None:
    path = write_tsv(tmp_path / "labels.tsv", rows)
    assert run(*(argument.format(path=path) for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_qrels_by_name(rows: list[Row], tmp_path: pathlib.Path) -> None:
    for name in ("a", "b"):
        write_tsv(tmp_path / f"{name}.tsv", rows)
    (tmp_path / "qrels.tsv").write_text("".join(f"q{q}\td{q}-0\t1\n" for q in range(40)))
    run(f"--labels={tmp_path}/a.tsv", f"--labels={tmp_path}/b.tsv", f"--qrels=b={tmp_path}/qrels.tsv",
        f"--json={tmp_path}/r.json")  # fmt: skip
    a, b = json.loads((tmp_path / "r.json").read_text())["labels"]
    assert "qrels" not in a
    assert b["qrels"]["judged_lists"] == 40


def test_looking_at_a_file_loads_no_model_code() -> None:
    code = (
        "import sys, inranker_jax.verify_labels, inranker_jax.labeling.teachers;"
        "print([m for m in ('jax', 'torch', 'transformers', 'tensorflow', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_published_files_are_clean(shared_data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    teacher, beir = shared_data / "teacher", shared_data / "beir"
    for name, collection, qrels in (
        ("scifact_human", "scifact", "train"),
        ("pira_en_human", "pira-en", "test"),
    ):
        folder = beir / collection
        status = run(
            f"--labels={teacher / name}.tsv", f"--queries={folder}", f"--corpus={folder}",
            f"--qrels={folder / 'qrels' / qrels}.tsv", f"--json={tmp_path}/{name}.json",
        )  # fmt: skip
        assert status == 0
        (report,) = json.loads((tmp_path / f"{name}.json").read_text())["labels"]
        assert report["qrels"]["pairwise_accuracy"] > 0.95
