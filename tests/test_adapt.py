"""`python -m inranker_jax.adapt`: from documents to a student, killed on the way, resumed, and run again."""

from __future__ import annotations

import json
import os
import pathlib
import random
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from inranker_jax import adapt
from inranker_jax.checkpoints import huggingface, load_model
from inranker_jax.corpora.label_folder import read_labels
from inranker_jax.flags import InputError
from inranker_jax.labeling.import_export import import_jsonl
from inranker_jax.models import T5Config, init_params
from inranker_jax.prompts import Tokenizer, preset
from inranker_jax.stages import Outcome
from tests.tiny_vocabulary import write_spiece

STAGES = [
    "queries", "candidates", "labels", "verify", "train", "export", "evaluate_before", "evaluate",
]  # fmt: skip
WORDS = ["wing", "flow", "heat", "plate", "shock", "layer", "speed", "drag", "lift", "tube", "mach", "jet"]
TINY = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}


def write_model(folder: pathlib.Path, vocabulary: pathlib.Path, seed: int) -> pathlib.Path:
    """A random T5 with a vocabulary and a contract."""
    tokenizer = Tokenizer.from_pretrained(vocabulary)
    config = T5Config(vocab_size=512, **TINY)
    params = jax.tree.map(np.asarray, init_params(config, seed))
    contract = preset("monot5").replace(max_length=64)
    huggingface.save(str(folder), config, params, tokenizer, contract)
    return folder


def write_collection(folder: pathlib.Path, documents: int = 24) -> pathlib.Path:
    """A BEIR folder whose documents have titles, with a few judged queries."""
    rng = random.Random(0)
    (folder / "qrels").mkdir(parents=True)
    rows, queries, judged = [], [], ["query-id\tcorpus-id\tscore"]
    for i in range(documents):
        title = " ".join(rng.sample(WORDS, 4)) + f" {i}"
        rows.append({"_id": f"d{i}", "title": title, "text": " ".join(rng.choices(WORDS, k=20))})
        if i % 4 == 0:
            queries.append({"_id": f"q{i}", "text": " ".join(rows[-1]["text"].split()[:3])})
            judged.append(f"q{i}\td{i}\t1")
    for name, lines in (("corpus", rows), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "qrels" / "test.tsv").write_text("\n".join(judged) + "\n")
    return folder


def statuses(output: str) -> dict[str, str]:
    """Stage -> status, of the summary."""
    rows = re.findall(rf"^({'|'.join(STAGES)}) +(ran|done before|left out) ", output, re.MULTILINE)
    return dict(rows)


@pytest.mark.slow
def test_documents_become_a_student_whatever_is_killed(tmp_path):
    vocabulary = tmp_path / "vocabulary"
    vocabulary.mkdir()
    write_spiece(vocabulary, size=300)
    teacher = write_model(tmp_path / "teacher", vocabulary, seed=1)
    student = write_model(tmp_path / "student", vocabulary, seed=2)
    corpus, output = write_collection(tmp_path / "corpus"), tmp_path / "out"
    command = [
        *(sys.executable, "-m", "inranker_jax.adapt", f"--corpus={corpus}", f"--output_dir={output}"),
        *(
            f"--teacher={teacher}",
            f"--student={student}",
            "--negatives=3",
            "--train_steps=2",
            "--batch_size=4",
        ),
        *("--evaluation_depth=5", "--usd_per_hour=3600", "--skip=verify", "--gin.train.lengths=(64,)"),
    ]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    record = output / "adapt.json"

    def entry(stage: str) -> dict:
        try:
            return json.loads(record.read_text())["stages"].get(stage, {})
        except FileNotFoundError:
            return {}

    with subprocess.Popen(command, env=environment) as process:
        while not entry("labels") and process.poll() is None:
            time.sleep(0.05)
        process.kill()
    assert entry("queries")["finished"]
    assert entry("labels")["finished"] is None

    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = dict.fromkeys(STAGES, "ran") | {
        "queries": "done before",
        "candidates": "done before",
        "verify": "left out",
    }
    assert statuses(done.stdout) == expected
    assert "by title (no language model)" in done.stdout
    assert re.search(r"^evaluate .* nDCG@10: bm25 0\.\d{4}, model 0\.\d{4}$", done.stdout, re.MULTILINE)
    assert re.search(r"in all  \$\d+\.\d\d$", done.stdout, re.MULTILINE)

    # Titles are the queries here, so no document of a pair begins with one.
    pairs = list(read_labels(output / "labels"))
    assert len(pairs) == 24 * 4
    texts = {row["_id"]: row["text"] for row in map(json.loads, (corpus / "corpus.jsonl").open())}
    assert all(pair.document == texts[pair.document_id] for pair in pairs)
    # The export is the student, and the student is no longer what it was.
    before, after, exported = (
        jax.tree.leaves(load_model(path).params) for path in (student, output / "student", output / "export")
    )
    assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(before, after, strict=True))
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(after, exported, strict=True))

    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert set(statuses(again.stdout).values()) == {"done before", "left out"}

    other = subprocess.run([*command, "--negatives=5"], env=environment, capture_output=True, text=True)
    assert other.returncode == 2
    assert "- --negatives=3\n+ --negatives=5" in other.stderr
    longer = subprocess.run([*command, "--train_steps=40"], env=environment, capture_output=True, text=True)
    assert longer.returncode == 0, longer.stderr
    assert statuses(longer.stdout)["labels"] == "done before"
    assert "step 40/40" in longer.stdout


def folder_of_labels(tmp_path: pathlib.Path, queries: int) -> pathlib.Path:
    rows = [
        {
            "query": f"query {q}",
            "contents": f"document {q} {d}",
            "true_logit": 1.0 - d,
            "false_logit": d - 1.0,
        }
        for q in range(queries)
        for d in range(2)
    ]
    file = tmp_path / f"{queries}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    import_jsonl(str(file), str(tmp_path / str(queries)), "teacher", announce=print)
    return tmp_path / str(queries)


@pytest.mark.parametrize("queries", [2, 5, 40])
@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.5, 0.999])
def test_some_query_is_always_held_out_and_some_is_not(tmp_path, queries, fraction):
    from inranker_jax.data.shares import query_share

    share = adapt.validation_share(folder_of_labels(tmp_path, queries), fraction)
    held_out = sum(query_share(f"query {q}") < share for q in range(queries))
    wanted = sum(query_share(f"query {q}") < fraction for q in range(queries))
    assert 0 < held_out < queries
    assert held_out == wanted or wanted in (0, queries)


def test_a_single_query_cannot_be_divided(tmp_path):
    assert adapt.validation_share(folder_of_labels(tmp_path, 1), 0.5) is None


@pytest.mark.parametrize(
    "address", ["http://user:hunter2@127.0.0.1:9/v1", "http://127.0.0.1:9/v1?key=hunter2"]
)
def test_a_secret_in_an_address_is_neither_shown_nor_stored(tmp_path, capfd, address):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "1", "text": "a b c"}\n')
    given = [f"--corpus={tmp_path / 'corpus.jsonl'}", "--teacher=t", f"--output_dir={tmp_path / 'out'}"]
    assert adapt.main([*given, f"--generator=openai:{address}"]) == 2
    shown = capfd.readouterr()
    assert "error:" in shown.err
    assert "hunter2" not in shown.err + shown.out
    assert not any("hunter2" in path.read_text() for path in tmp_path.rglob("*.json*"))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--epochs=0", "--epochs=0.0"),
        ("--validation_fraction=1", "--validation_fraction=1.0"),
        ("--evaluate_on=nowhere", "no such file"),
        ("--skip=training", "Stages: queries"),
        ("--teacher=/no/such", "/no/such: no such file or folder"),
        ("--student=./no/such", "--student: no such file or folder './no/such'"),
        ("--teacher=bi-encodr:x", "bi-encoder"),
        ("--language=portugese", "portuguese"),
    ],
)
def test_bad_flags_are_named(tmp_path, flag, message):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "1", "text": "a b c"}\n')
    given = [f"--corpus={tmp_path / 'corpus.jsonl'}", "--teacher=t", f"--output_dir={tmp_path / 'out'}", flag]
    with pytest.raises(InputError, match=re.escape(message)):
        adapt.Pipeline(*adapt.parse_flags(given)).stages()


def test_a_model_that_is_not_there_is_told_before_the_first_stage(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(adapt, "run_stages", lambda *_: pytest.fail("a stage was started"))
    (tmp_path / "corpus.jsonl").write_text('{"_id": "1", "text": "a b c"}\n')
    (tmp_path / "vocabulary").mkdir()
    write_spiece(tmp_path / "vocabulary", size=300)
    teacher, output = write_model(tmp_path / "teacher", tmp_path / "vocabulary", seed=1), tmp_path / "out"
    (tmp_path / "runs" / "one" / "checkpoints").mkdir(parents=True)
    given = [f"--corpus={tmp_path / 'corpus.jsonl'}", f"--output_dir={output}"]
    for flags, message in (
        (
            ["--teacher=ex/nope"],
            "--teacher: ex/nope: no folder of that name is here, it is not in the local",
        ),
        (["--teacher=cross-encoder:ex/nope"], "--teacher: ex/nope: no folder of that name is here"),
        ([f"--teacher={tmp_path}/runs"], f"--teacher: {tmp_path}/runs: this folder is no checkpoint"),
        ([f"--teacher=bi-encoder:{teacher}"], f"--teacher: {teacher}: it has no modules.json"),
        ([f"--teacher={teacher}?contract=mono"], "preset 'mono'"),
        ([f"--teacher={teacher}", "--student=ex/nope"], "--student: ex/nope: no folder of that name"),
        ([f"--teacher={teacher}", f"--student={tmp_path}/runs"], f"Did you mean '{tmp_path}/runs/one'?"),
    ):
        assert adapt.main([*given, *flags]) == 2
        assert message in capfd.readouterr().err
        assert not output.exists()


def test_models_of_finished_stages_are_needed_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(adapt, "run_stages", lambda *_: iter([Outcome("labels", "done before", 1.0, "")]))
    (tmp_path / "corpus.jsonl").write_text('{"_id": "1", "text": "a b c"}\n')
    given = [f"--corpus={tmp_path / 'corpus.jsonl'}", "--teacher=ex/nope", f"--output_dir={tmp_path / 'out'}"]
    given.append("--student=ex/nope")
    assert adapt.main(given) == 2
    assert adapt.main([*given, "--skip=labels,train"]) == 0
    record = tmp_path / "out" / "adapt.json"
    record.write_text(json.dumps({"stages": {name: {"finished": "then"} for name in ("labels", "train")}}))
    assert adapt.main(given) == 0
