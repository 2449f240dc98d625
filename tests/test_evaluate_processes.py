"""`python -m inranker_jax.evaluate` in several processes: the results of one process, to the bit."""

from __future__ import annotations

import json
import pathlib
import random
import signal
import sys
from typing import Any

import pytest

from benchmarks.process_group import Ended, Group
from inranker_jax.checkpoints import huggingface
from inranker_jax.models import T5Config, init_params
from inranker_jax.prompts import Tokenizer, preset
from tests.labeling.tiny_teachers import WORDS
from tests.tiny_vocabulary import write_spiece

pytestmark = pytest.mark.slow

DATASETS = ("alpha", "beta")
QUERIES = 21
DEVICES = 2


def write_collection(folder: pathlib.Path, seed: int) -> None:
    """Random texts of very different lengths; the last query finds nothing."""
    rng = random.Random(seed)
    (folder / "qrels").mkdir(parents=True)
    documents = [
        {"_id": f"d{i}", "title": "", "text": " ".join(rng.choices(WORDS, k=rng.randrange(2, 40)))}
        for i in range(60)
    ]
    queries = [{"_id": f"q{i}", "text": " ".join(rng.choices(WORDS, k=3))} for i in range(QUERIES)]
    queries.append({"_id": "lost", "text": "zebra"})
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    rows = [f"{row['_id']}\td{rng.randrange(60)}\t1\n" for row in queries]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command, but for --output_dir."""
    root = tmp_path_factory.mktemp("input")
    for seed, name in enumerate(DATASETS):
        write_collection(root / "beir" / name, seed)
    tokenizer = Tokenizer.from_pretrained(write_spiece(root / "vocabulary"))
    config = T5Config(
        vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=1, num_heads=4
    )
    contract = preset("monot5").replace(max_length=64)
    huggingface.save(root / "monot5-tiny", config, init_params(config, seed=0), tokenizer, contract)
    return [
        "env", "INRANKER_JAX_HEARTBEAT_SECONDS=15", sys.executable, "-m", "inranker_jax.evaluate",
        "--gin_file=gin/eval_beir.gin", f"--checkpoint={root / 'monot5-tiny'}", f"--beir_dir={root / 'beir'}",
        f"--datasets={','.join(DATASETS)}", "--depth=10", "--gin.evaluation.Settings.pairs_per_call=30",
        # Of this process's two devices: over those of all it would wait for collectives, and hang.
        "--gin.evaluation.load_reranker.mesh=@partitioning.make_mesh()",
    ]  # fmt: skip


def run(command: list[str], output: pathlib.Path, count: int) -> list[Ended]:
    with Group([*command, f"--output_dir={output}"], count, DEVICES) as group:
        return group.end()


def contents(output: pathlib.Path) -> dict[str, Any]:
    """Every file, as bytes; of results without what names the session."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        name = str(path.relative_to(output))
        found[name] = path.read_bytes() if path.suffix != ".json" else json.loads(path.read_text())
    found["results.json"].pop("command")
    for result in [
        *found["results.json"]["datasets"].values(),
        *(found[f"{n}/result.json"] for n in DATASETS),
    ]:
        del result["provenance"]["finished"]
    return found


@pytest.fixture(scope="module")
def expected(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process writes."""
    output = tmp_path_factory.mktemp("alone")
    (ended,) = run(command, output, 1)
    assert ended.status == 0, ended.stderr
    found = contents(output)
    files = ("bm25.trec", "model.trec", "per_query.tsv", "result.json")
    assert set(found) == {"results.json", *(f"{name}/{file}" for name in DATASETS for file in files)}
    assert found["results.json"]["complete"] is True
    assert found["results.json"]["datasets"]["alpha"]["queries"] == QUERIES + 1
    assert found["alpha/model.trec"].count(b"\n") == found["alpha/bm25.trec"].count(b"\n") > 10 * QUERIES
    return found


def test_two_processes_write_the_results_of_one(
    command: list[str], tmp_path: pathlib.Path, expected: dict[str, Any]
) -> None:
    first, second = run(command, tmp_path, 2)
    assert (first.status, second.status) == (0, 0), first.stderr + second.stderr
    assert contents(tmp_path) == expected
    assert "\naverage of 2" in first.stdout
    assert "nDCG" not in second.stdout, "one process writes the table"
    assert "[1/2] the share of this process is done; process 0 has the results" in second.stderr
    assert "70/70 pairs" in second.stderr or "90/90 pairs" in second.stderr, "a part of 210 pairs"


# Process 1 never scores anything.
STALLING = """
import os, sys, time
from inranker_jax import evaluate
from inranker_jax.evaluation.reranking import Reranking

score = Reranking.score

def stalled(*arguments, **more):
    if os.environ["JAX_PROCESS_ID"] == "1":
        time.sleep(600)
    return score(*arguments, **more)

Reranking.score = stalled
sys.exit(evaluate.main(sys.argv[1:]))
"""


def test_killed_process_is_named_and_independent_processes_go_on(
    command: list[str], tmp_path: pathlib.Path, expected: dict[str, Any]
) -> None:
    stalling = [sys.executable, "-c", STALLING, *command[command.index("inranker_jax.evaluate") + 1 :]]
    with Group([*command[:2], *stalling, f"--output_dir={tmp_path}"], 3, DEVICES) as group:
        group.wait_for("waiting for process 1 (2 of 7 groups of queries)", 0, errors=True)
        group.wait_for("[2/3] [2/2] beta", 2, errors=True)
        group.kill(1)
        first, second, third = group.end()
    assert second.status == -signal.SIGKILL
    assert first.status not in (0, 2)
    assert third.status not in (0, 2)
    assert "waiting for process 1 (2 of 7 groups of queries)" in first.stderr
    assert "run the same command again, with any number of processes" in first.stderr
    assert not (tmp_path / "alpha" / "result.json").exists()
    rows = [json.loads(line) for path in tmp_path.glob("alpha/*.jsonl") for line in path.open()]
    kept = {row["query"] for row in rows if "query" in row}
    assert QUERIES - 8 <= len(kept) == len(rows) - 2, "five of seven groups, in the files of two processes"

    independent = [*command, f"--output_dir={tmp_path}", "--process_count=2"]
    with Group([*independent, "--process_index=0"], 1, DEVICES) as two:
        two.wait_for("alpha: going on after", errors=True)  # before the other adds to what is kept
        with Group([*independent, "--process_index=1"], 1, DEVICES) as one:
            (zero,), (other,) = two.end(), one.end()
    assert (zero.status, other.status) == (0, 0), zero.stderr + other.stderr
    assert f"alpha: going on after {len(kept)} queries" in zero.stderr
    assert contents(tmp_path) == expected


def test_sigterm_to_one_process_stops_all_and_keeps_what_is_finished(
    command: list[str], tmp_path: pathlib.Path, expected: dict[str, Any]
) -> None:
    with Group([*command, f"--output_dir={tmp_path}"], 2, DEVICES) as group:
        group.wait_for("[0/2] [1/2] alpha", 0, errors=True)
        group.processes[0].send_signal(signal.SIGTERM)
        ended = group.end()
    assert [each.status for each in ended] == [143, 143], ended[0].stderr + ended[1].stderr
    assert "interrupted: what was finished is kept" in ended[0].stderr
    assert "process 0 has stopped (by a signal)" in ended[1].stderr
    (alone,) = run(command, tmp_path, 1)
    assert alone.status == 0, alone.stderr
    assert contents(tmp_path) == expected
