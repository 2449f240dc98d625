"""The retrieve binary: runs, resumption after kills, refusals, and existing runs made fit for use."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from inranker_jax import records, retrieve
from inranker_jax.records import Document, Query
from inranker_jax.retrieval import BM25Index, outputs

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORDS = [f"word{i}" for i in range(200)]


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """A folder with corpus.tsv (300 passages) and queries.tsv (40 queries, the last without any match)."""
    folder = tmp_path_factory.mktemp("collection")
    random = np.random.default_rng(0)
    with open(folder / "corpus.tsv", "w") as out:
        for i in range(300):
            words = [WORDS[int(200 * v**2)] for v in random.random(random.integers(1, 30))]
            out.write(f"d{i}\t{' '.join(words)}\n")
    with open(folder / "queries.tsv", "w") as out:
        for i in range(39):
            out.write(f"q{97 * i % 39}\t{' '.join(random.choice(WORDS, 4))}\n")
        out.write("q39\tzebra\n")
    return folder


def _flags(collection: pathlib.Path, output: pathlib.Path, *more: str) -> list[str]:
    return [
        f"--corpus={collection}/corpus.tsv",
        f"--queries={collection}/queries.tsv",
        f"--output={output}",
        *more,
    ]


def _expected(collection: pathlib.Path, depth: int = 1000, **settings) -> dict[str, list[tuple[str, float]]]:
    def rows(name):
        return [line.split("\t") for line in (collection / name).read_text().splitlines()]

    index = BM25Index.build([Document(*row) for row in rows("corpus.tsv")], **settings)
    run = index.search([Query(*row) for row in rows("queries.tsv")], depth)
    return {query: list(documents.items()) for query, documents in run.items() if documents}


def _read(path: pathlib.Path) -> dict[str, list[tuple[str, float]]]:
    return {
        query: [(document, float(np.float32(score))) for document, score in documents.items()]
        for query, documents in records.read_run(path).items()
    }


def test_run_equals_the_search(collection, tmp_path, capsys):
    output = tmp_path / "deep" / "run.trec"
    flags = _flags(
        collection, output, "--depth=20", "--k1=1.2", "--b=0.75", f"--index={tmp_path}/index", "--tag=mine"
    )
    assert retrieve.main(flags) == 0
    run = _read(output)
    expected = _expected(collection, 20, k1=1.2, b=0.75)
    assert list(run.items()) == list(expected.items())
    lines = output.read_text().splitlines()
    assert lines[0].split()[0::5] == ["q0", "mine"]
    assert [line.split()[3] for line in lines[:20]] == [str(i) for i in range(1, 21)]
    captured = capsys.readouterr()
    assert (
        captured.out
        == f"{output}: 40 queries, {len(lines):,} candidates ({len(lines) / 39:.1f} a query); 1 query has none\n"
    )
    assert sorted(os.listdir(output.parent)) == ["run.trec", "run.trec.json"]
    state = json.loads((tmp_path / "deep" / "run.trec.json").read_text())
    assert state["counts"] == {"queries": 40, "empty": 1, "lines": len(lines)}
    assert state["identity"]["k1"] == 1.2
    # Again: nothing is done. With another output, the index is opened.
    before = output.stat().st_mtime_ns
    assert retrieve.main(flags) == 0
    assert "whole already" in capsys.readouterr().err
    assert output.stat().st_mtime_ns == before
    assert retrieve.main([*flags[:2], f"--output={tmp_path}/b.trec", *flags[3:]]) == 0
    assert "Opened the index of 300 documents" in capsys.readouterr().err
    assert (tmp_path / "b.trec").read_bytes() == output.read_bytes()


def test_threads_and_compression_change_nothing(collection, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "QUERIES_PER_PART", 7)
    contents = set()
    for threads in (1, 2, 5):
        output = tmp_path / f"{threads}.trec.gz"
        assert retrieve.main(_flags(collection, output, f"--threads={threads}")) == 0
        contents.add(output.read_bytes())
    assert len(contents) == 1
    assert _read(output) == _expected(collection)


def test_other_language(collection, tmp_path, capsys):
    assert retrieve.main(_flags(collection, tmp_path / "a", "--language=finnish")) == 0
    assert "No list of stop words is known for 'finnish': every word counts." in capsys.readouterr().err
    assert _read(tmp_path / "a") == _expected(collection, language="finnish")


DRIVER = """
import sys, time
from inranker_jax import retrieve
from inranker_jax.retrieval import outputs, runs
outputs.QUERIES_PER_PART = 3
original = runs.run_lines
def slow(*arguments):
    time.sleep(0.1)
    return original(*arguments)
runs.run_lines = slow
sys.exit(retrieve.main(sys.argv[1:]))
"""


def _start(flags: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *flags],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _wait_for(path: pathlib.Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


def test_killed_anywhere_it_ends_with_the_same_bytes(collection, tmp_path):
    assert retrieve.main(_flags(collection, tmp_path / "whole.trec")) == 0
    output = tmp_path / "run.trec"
    flags = _flags(collection, output, f"--index={tmp_path}/index")
    for number, kill in ((0, signal.SIGKILL), (3, signal.SIGKILL), (7, signal.SIGTERM)):
        process = _start(flags)
        _wait_for(tmp_path / "run.trec.parts" / f"part-{number:06d}.trec", process)
        process.send_signal(kill)
        _, error = process.communicate()
        if kill == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 143
            assert "run the same command to go on" in error
        assert not output.exists()
    process = _start(flags)
    _, error = process.communicate()
    assert process.returncode == 0
    assert "Opened the index" in error
    assert "Going on after 2" in error
    assert output.read_bytes() == (tmp_path / "whole.trec").read_bytes()
    assert sorted(os.listdir(tmp_path)) == [
        "index",
        "run.trec",
        "run.trec.json",
        "whole.trec",
        "whole.trec.json",
    ]


def test_two_at_once_do_not_meet(collection, tmp_path, capsys):
    output = tmp_path / "run.trec"
    process = _start(_flags(collection, output))
    _wait_for(tmp_path / "run.trec.parts" / "part-000000.trec", process)
    run = tmp_path / "other.trec"
    run.write_text("q1 Q0 d1 1 2 A\n")
    for more in ([], ["--depth=7"], [f"--run={run}"]):
        assert retrieve.main(_flags(collection, output, *more)) == 2
        message = f"error: {output}: another process is writing this run. Wait for it to finish.\n"
        assert capsys.readouterr().err == message
    assert process.poll() is None  # it was at work all the while
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert retrieve.main(_flags(collection, tmp_path / "alone.trec")) == 0
    assert output.read_bytes() == (tmp_path / "alone.trec").read_bytes()
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".lock", ".parts"))]


def test_killed_between_the_run_and_its_note(collection, tmp_path, monkeypatch):
    output = tmp_path / "run.trec"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(outputs.Output, "close", killed)
        assert retrieve.main(_flags(collection, output)) == 130
    before = output.read_bytes()
    assert retrieve.main(_flags(collection, output)) == 0
    assert output.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["run.trec", "run.trec.json"]


def test_torn_index_is_built_again(collection, tmp_path, capsys):
    index = tmp_path / "index"
    assert retrieve.main(_flags(collection, tmp_path / "a", f"--index={index}")) == 0
    os.truncate(index / "data.csc.index.npy", 200)
    assert retrieve.main(_flags(collection, tmp_path / "b", f"--index={index}")) == 0
    assert "not whole" in capsys.readouterr().err
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_was_made_otherwise_is_left_alone(collection, tmp_path, capsys):
    output = tmp_path / "run.trec"
    index = f"--index={tmp_path}/index"
    assert retrieve.main(_flags(collection, output, index)) == 0
    content = output.read_bytes()
    for flags, expected in [
        (
            _flags(collection, output, "--depth=10"),
            "- depth: 1000\n+ depth: 10\nRemove it, or choose another --output",
        ),
        (
            _flags(collection, tmp_path / "b", index, "--k1=2"),
            "- k1: 0.9\n+ k1: 2.0\nChoose another index folder",
        ),
        (_flags(collection, collection / "corpus.tsv"), "nothing tells that this command made it"),
        (
            _flags(collection, tmp_path / "c", f"--index={collection}"),
            "not an index folder: it holds 'corpus.tsv'",
        ),
    ]:
        assert retrieve.main(flags) == 2
        assert expected in capsys.readouterr().err
    assert output.read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["index", "run.trec", "run.trec.json"]
    # A changed corpus with the same index is noticed.
    (tmp_path / "corpus.tsv").write_text((collection / "corpus.tsv").read_text() + "d300\tword1\n")
    (tmp_path / "queries.tsv").write_bytes((collection / "queries.tsv").read_bytes())
    assert retrieve.main(_flags(tmp_path, tmp_path / "d", index)) == 2
    assert "- corpus_fingerprint: " in capsys.readouterr().err


def test_the_folder_of_parts_is_not_emptied_of_strangers(collection, tmp_path, capsys):
    (tmp_path / "a.parts").mkdir()
    (tmp_path / "a.parts" / "notes.txt").write_text("mine")
    assert retrieve.main(_flags(collection, tmp_path / "a")) == 2
    assert "notes.txt: not a part of an unfinished run" in capsys.readouterr().err
    assert (tmp_path / "a.parts" / "notes.txt").read_text() == "mine"
    # Parts of other settings are kept for the command that made them.
    (tmp_path / "a.parts" / "notes.txt").unlink()
    (tmp_path / "a.parts" / "identity.json").write_text(json.dumps({"depth": 7}))
    (tmp_path / "a.parts" / "part-000000.trec").write_text("")
    assert retrieve.main(_flags(collection, tmp_path / "a")) == 2
    assert "- depth: 7\n+ depth: 1000" in capsys.readouterr().err


def test_malformed_rows(collection, tmp_path, capsys):
    (tmp_path / "corpus.tsv").write_text("d1\tword1\nbad\nd2\tword1 word2\n")
    (tmp_path / "queries.tsv").write_text("q1\tword1\n")
    assert retrieve.main(_flags(tmp_path, tmp_path / "a")) == 2
    assert "corpus.tsv:2" in capsys.readouterr().err
    assert retrieve.main(_flags(tmp_path, tmp_path / "b", "--skip_malformed")) == 0
    assert "left out 1 malformed row" in capsys.readouterr().err
    assert [document for document, _ in _read(tmp_path / "b")["q1"]] == ["d1", "d2"]  # the shorter one first


def test_a_run_and_an_index_without_malformed_rows_are_not_taken_for_those_with_them(tmp_path, capsys):
    (tmp_path / "corpus.tsv").write_text("d1\tword1\nbad\nd2\tword1 word2\n")
    (tmp_path / "queries.tsv").write_text("q1\tword1\n")
    index = f"--index={tmp_path}/index"
    assert retrieve.main(_flags(tmp_path, tmp_path / "a", index, "--skip_malformed")) == 0
    told = capsys.readouterr().err
    assert "left out 1 malformed row: 1 columns\n" in told
    assert f"{tmp_path}/corpus.tsv:2" in told
    assert retrieve.main(_flags(tmp_path, tmp_path / "a", index)) == 2
    assert "- corpus_on_malformed: skip\n+ corpus_on_malformed: raise\n" in capsys.readouterr().err
    assert retrieve.main(_flags(tmp_path, tmp_path / "b", index)) == 2
    assert "/index holds a BM25 index that was made otherwise" in capsys.readouterr().err
    # Where the index is used again and the corpus is not read, what it lacks is reported all the same.
    assert retrieve.main(_flags(tmp_path, tmp_path / "b", index, "--skip_malformed")) == 0
    error = capsys.readouterr().err
    assert "Opened the index" in error
    assert told[told.index("left out") :] in error
    # Queries read otherwise are other queries.
    (tmp_path / "corpus.tsv").write_text("d1\tword1\n")
    assert retrieve.main(_flags(tmp_path, tmp_path / "c")) == 0
    assert retrieve.main(_flags(tmp_path, tmp_path / "c", "--queries_format=jsonl")) == 2
    assert "- queries_format: tsv\n+ queries_format: jsonl\n" in capsys.readouterr().err


def test_a_renamed_text_file_is_another_document(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    for name, text in (("a", "heat"), ("b", "wing lift")):
        (tmp_path / "docs" / f"{name}.txt").write_text(text)
    (tmp_path / "queries.tsv").write_text("q1\twing\n")
    flags = [f"--corpus={tmp_path}/docs", f"--queries={tmp_path}/queries.tsv", f"--index={tmp_path}/index"]
    assert retrieve.main([*flags, f"--output={tmp_path}/run"]) == 0
    assert list(dict(_read(tmp_path / "run")["q1"])) == ["b.txt"]
    (tmp_path / "docs" / "b.txt").rename(tmp_path / "docs" / "c.txt")
    for output in ("run", "run2"):
        assert retrieve.main([*flags, f"--output={tmp_path}/{output}"]) == 2
        assert "- corpus_fingerprint: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--languge=english"], "unknown flag --languge. Did you mean '--language'"),
        (["--language=portugese"], "Did you mean 'portuguese'"),
        (["--depth=0"], "--depth"),
        (["--threads=-1"], "--threads"),
        (["--k1=-1"], "k1 >= 0"),
        (["--tag=my run"], "--tag='my run': expected a word without blanks"),
        (["--run=x", "--language=english"], "--language is for BM25 and does nothing with --run"),
        (["--corpus=nowhere.tsv"], "nowhere.tsv"),
    ],
)
def test_bad_flags(collection, tmp_path, capsys, more, expected):
    assert retrieve.main(_flags(collection, tmp_path / "a", *more)) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.out == ""
    assert captured.err.count("\n") <= 2


# ---------------------------------------------------------------------------------------------- --run


def test_an_existing_run_is_put_in_one_form(collection, tmp_path, capsys):
    run = tmp_path / "anserini.trec.gz"
    with gzip.open(run, "wt") as out:
        out.write("q2 Q0 d1 1 3.5 A\nq2\tQ0\td20 2 4.5 A\nq2 Q0 d3 3 3.5 A\nq2 Q0 d4 4 1 A\n\n")
        out.write("q0 Q0 d7 1 -1e-3 A\n")
    output = tmp_path / "run.trec"
    assert retrieve.main(_flags(collection, output, f"--run={run}", "--depth=3")) == 0
    assert output.read_text() == (
        "q0 Q0 d7 1 -0.001 anserini\nq2 Q0 d20 1 4.5 anserini\nq2 Q0 d3 2 3.5 anserini\nq2 Q0 d1 3 3.5 anserini\n"
    )
    assert (
        capsys.readouterr().out == f"{output}: 40 queries, 4 candidates (2.0 a query); 38 queries have none\n"
    )
    assert sorted(os.listdir(tmp_path)) == ["anserini.trec.gz", "run.trec", "run.trec.json"]
    # Made anew from the same run, and refused where it would replace something else.
    assert retrieve.main(_flags(collection, output, f"--run={run}", "--depth=3")) == 0
    assert retrieve.main(_flags(collection, output, f"--run={run}")) == 2
    assert "- depth: 3" in capsys.readouterr().err


def test_bm25s_own_run_survives_unchanged(collection, tmp_path):
    assert retrieve.main(_flags(collection, tmp_path / "a")) == 0
    assert retrieve.main(_flags(collection, tmp_path / "b", f"--run={tmp_path}/a", "--tag=bm25")) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("line", "kind", "expected"),
    [
        ("q1 Q0 nowhere 2 1 A", "unknown document", "run.trec:2: document 'nowhere' is not in the corpus"),
        ("nobody Q0 d1 2 1 A", "unknown query", "run.trec:2: query 'nobody' is not among the queries"),
        ("q1 Q0 d2", "malformed line", "run.trec:2: 3 columns"),
        ("q1 Q0 d2 2 1e40 A", "malformed line", "run.trec:2: score 1e+40 does not fit in float32"),
    ],
)
def test_a_run_of_something_else(collection, tmp_path, capsys, line, kind, expected):
    run = tmp_path / "run.trec"
    run.write_text(f"q1 Q0 d1 1 2 A\n{line}\n")
    assert retrieve.main(_flags(collection, tmp_path / "a", f"--run={run}")) == 2
    assert expected in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["run.trec"]
    assert retrieve.main(_flags(collection, tmp_path / "a", f"--run={run}", "--skip_malformed")) == 0
    assert (tmp_path / "a").read_text() == "q1 Q0 d1 1 2.0 run\n"
    error = capsys.readouterr().err
    assert f"left out 1 line (1 x {kind}); the first: " in error
    assert expected in error


def test_a_run_in_pieces_and_its_own_output(collection, tmp_path, capsys):
    run = tmp_path / "run.trec"
    run.write_text("q1 Q0 d1 1 2 A\nq2 Q0 d1 1 2 A\nq1 Q0 d2 1 1 A\n")
    assert retrieve.main(_flags(collection, tmp_path / "a", f"--run={run}", "--skip_malformed")) == 2
    assert ":3: query 'q1' comes again" in capsys.readouterr().err
    assert retrieve.main(_flags(collection, run, f"--run={run}")) == 2
    assert "is the run that is read" in capsys.readouterr().err
    assert run.read_text().startswith("q1 Q0 d1")
