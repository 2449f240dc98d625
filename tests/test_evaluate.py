"""The evaluation binary: commands as users type them, and what they read when they mistype."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from inranker_jax import evaluate, records
from inranker_jax.evaluation.pipeline import Model
from tests.evaluation.tiny_collection import overlap, write_beir
from tests.hangs import wait_for_report
from tests.tiny_vocabulary import write_spiece

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def beir(tmp_path):
    for name in ("mini", "other", "cqadupstack/android", "cqadupstack/english"):
        write_beir(tmp_path / "beir" / name)
    return tmp_path / "beir"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random tiny T5 in Hugging Face's layout."""
    from inranker_jax.checkpoints import huggingface
    from inranker_jax.models import T5Config, t5
    from inranker_jax.prompts import Tokenizer, preset

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.from_pretrained(write_spiece(folder / "vocabulary"))
    config = T5Config(
        vocab_size=tokenizer.vocab_size,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=2,
    )
    huggingface.save(
        folder / "hf",
        config,
        t5.init_params(config, seed=0),
        tokenizer,
        preset("monot5").replace(max_length=64),
    )
    return folder / "hf"


def _command(*flags, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "inranker_jax.evaluate", "--gin_file=gin/eval_beir.gin", *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def _main(capsys, *flags):
    status = evaluate.main(["--gin_file=gin/eval_beir.gin", *map(str, flags)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_command_reranks_with_a_checkpoint_and_goes_on_from_its_output(beir, checkpoint, tmp_path):
    flags = [
        f"--checkpoint={checkpoint}", f"--beir_dir={beir}", "--datasets=mini,cqadupstack", "--output_dir=out",
        "--depth=2",
    ]  # fmt: skip
    done = _command(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["nDCG@10", "queries", "bm25", "model"]
    assert [line.split()[0] for line in lines[1:]] == ["mini", "cqadupstack", "average"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["complete"] is True
    assert list(results["datasets"]) == ["mini", "cqadupstack/android", "cqadupstack/english"]
    mini = results["datasets"]["mini"]
    assert list(mini["systems"]) == ["bm25", "model"]
    assert mini["provenance"]["settings"]["depth"] == 2
    assert mini["provenance"]["model"]["contract"]["name"] == "monot5"
    assert mini["systems"]["bm25"]["recall_100"] == mini["systems"]["model"]["recall_100"]
    assert (tmp_path / "out" / "cqadupstack" / "android" / "model.trec").is_file()

    # The scores are the Reranker's own.
    from inranker_jax.scorer import Reranker

    run = records.read_run(tmp_path / "out" / "mini" / "model.trec")
    first = records.read_run(tmp_path / "out" / "mini" / "bm25.trec")
    head = list(first["q2"])[:2]
    texts = {row["_id"]: row["text"] for row in map(json.loads, open(beir / "mini" / "corpus.jsonl"))}  # noqa: SIM115
    scores = Reranker.from_pretrained(checkpoint).scores("flat plate", [texts[document] for document in head])
    assert [run["q2"][document] for document in head] == pytest.approx(scores.tolist(), abs=1e-5)

    again = _command(*flags, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert again.stderr.count("not computed again") == 3


def test_bm25_alone_needs_no_model_and_no_accelerator(beir, tmp_path, capsys):
    out = tmp_path / "out"
    status, table, _ = _main(
        capsys, "--bm25_only", f"--beir_dir={beir}", "--datasets=mini,other", f"--output_dir={out}",
        "--gin.evaluation.Settings.k1=1.5", "--gin.evaluation.Settings.measures=['map','ndcg_cut_3']",
    )  # fmt: skip
    assert status == 0
    assert table.splitlines()[0].split() == ["MAP", "queries", "bm25"]
    results = json.loads((out / "results.json").read_text())
    assert results["checkpoint"] is None
    assert results["datasets"]["mini"]["provenance"]["settings"]["k1"] == 1.5
    assert results["average"]["bm25"].keys() == {"map", "ndcg_cut_3"}
    assert not (out / "mini" / "model.trec").exists()


def test_without_a_model_process_0_does_all(beir, tmp_path, capsys):
    out = tmp_path / "out"
    flags = [
        "--bm25_only",
        f"--beir_dir={beir}",
        "--datasets=mini",
        f"--output_dir={out}",
        "--process_count=2",
    ]
    status, table, message = _main(capsys, *flags, "--process_index=1")
    assert (status, table, out.exists()) == (0, "", False)
    assert "process 0 does all of the work" in message
    status, table, _ = _main(capsys, *flags, "--process_index=0")
    assert (status, table.splitlines()[1].split()[0]) == (0, "mini")
    assert json.loads((out / "results.json").read_text())["complete"] is True


def test_candidates_from_runs_and_other_judgments(beir, tmp_path, capsys):
    (tmp_path / "r.trec").write_text("q1 Q0 d3 1 2 t\nq1 Q0 d1 2 1 t\n")
    (tmp_path / "q.txt").write_text("q1 0 d1 1\n")
    common = ["--bm25_only", f"--beir_dir={beir}", f"--output_dir={tmp_path / 'out'}"]
    status, table, _ = _main(
        capsys,
        *common,
        "--datasets=mini,other",
        f"--runs=mini={tmp_path}/r.trec",
        f"--qrels=mini={tmp_path}/q.txt",
    )
    assert status == 0
    assert table.splitlines()[0].split() == ["nDCG@10", "queries", "candidates", "bm25"]
    assert table.splitlines()[1].split() == ["mini", "1", "0.6309", "-"]
    # With one dataset, files need no name; --split is passed over for a judgment file.
    status, table, _ = _main(
        capsys,
        *common,
        "--datasets=mini",
        f"--runs={tmp_path}/r.trec",
        f"--qrels={tmp_path}/q.txt",
        "--split=x",
    )
    assert status == 0
    assert table.splitlines()[1].split() == ["mini", "1", "0.6309"]


def test_ctrl_c_keeps_what_is_finished(beir, tmp_path, capsys, monkeypatch):
    from inranker_jax.evaluation import pipeline

    real = pipeline.evaluate_dataset

    def interrupted(name, *args, **kwargs):
        if name == "other":
            raise KeyboardInterrupt
        return real(name, *args, **kwargs)

    monkeypatch.setattr(pipeline, "evaluate_dataset", interrupted)
    out = tmp_path / "out"
    flags = ["--bm25_only", f"--beir_dir={beir}", "--datasets=mini,other", f"--output_dir={out}"]
    status, table, message = _main(capsys, *flags)
    assert (status, table) == (130, "")
    assert "run the same command to go on" in message
    results = json.loads((out / "results.json").read_text())
    assert (results["complete"], list(results["datasets"])) == (False, ["mini"])
    monkeypatch.undo()
    status, _, message = _main(capsys, *flags)
    assert status == 0
    assert "mini: finished in" in message


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_call_and_keeps_its_scores(
    beir, tmp_path, capsys, monkeypatch, number, expected
):
    calls = []

    def score_pairs(pairs):
        calls.append(len(pairs))
        if len(calls) == 1:
            signal.raise_signal(number)
        return np.array(overlap(pairs), np.float32)

    real = evaluate.gin.get_configurable
    fake = Model(score_pairs, {"fingerprint": "m"})
    monkeypatch.setattr(
        evaluate.gin,
        "get_configurable",
        lambda name: (lambda _: fake) if name == "evaluation.load_reranker" else real(name),
    )
    flags = [
        "--checkpoint=any", f"--beir_dir={beir}", "--datasets=mini", f"--output_dir={tmp_path}",
        "--gin.evaluation.Settings.pairs_per_call=1",
    ]  # fmt: skip
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    status, table, message = _main(capsys, *flags)
    assert (status, table, len(calls)) == (expected, "", 1)
    assert message.splitlines()[-1].startswith("interrupted: ")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    status, _, message = _main(capsys, *flags)
    assert (status, len(calls)) == (0, 3)
    assert "mini: going on after 1 queries" in message


def test_where_it_stands_still_is_told(beir, tmp_path, capsys, monkeypatch):
    told = []

    def stuck(pairs):
        if not told:
            told.append(wait_for_report(capsys))
        return np.array(overlap(pairs), np.float32)

    monkeypatch.setattr(evaluate, "_load_model", lambda *_: Model(stuck, {"fingerprint": "m"}))
    status, table, _ = _main(
        capsys, "--checkpoint=any", f"--beir_dir={beir}", "--datasets=mini", f"--output_dir={tmp_path / 'out'}",
        "--hang_seconds=0.1",
    )  # fmt: skip
    assert status == 0
    assert table.splitlines()[1].startswith("mini")
    assert "HANG? no group of queries was finished for " in told[0]
    assert "\n  last finished group of queries: none in this session\n  phase: scoring, for " in told[0]
    assert " in stuck\n" in told[0], "the function that is stuck"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset=mini"], "--datasets"),
        (["--datasets=mini", "--bm25_onyl"], "unknown flag --bm25_onyl. Did you mean '--bm25_only'?"),
        (["--datasets=mini"], "give a model with --checkpoint, or --bm25_only"),
        (["--datasets=mini", "--bm25_only", "--checkpoint=x"], "not both"),
        (["--datasets=minni", "--bm25_only"], "no dataset 'minni' in {beir}. Did you mean 'mini'? It has"),
        (["--datasets=,", "--bm25_only"], "--datasets is empty. {beir} has cqadupstack/android"),
        (["--datasets=mini", "--bm25_only", "--split=dev"], "no judgments for split 'dev'; this dataset"),
        (["--datasets=mini", "--bm25_only", "--runs=mini=none.trec"], "--runs=mini=none.trec: no such file"),
        (["--datasets=mini", "--bm25_only", "--runs=mimi=x"], "not among --datasets (mini). Did you mean"),
        (["--datasets=mini,other", "--bm25_only", "--qrels=q.txt"], "say which: --qrels=DATASET=FILE"),
        (["--datasets=mini", "--bm25_only", "--process_index=1"], "--process_index=1 of --process_count=1: expected"),
        (["--datasets=mini", "--bm25_only", "--hang_seconds=x"], "argument --hang_seconds: invalid"),
        (["--datasets=mini", "--bm25_only", "--depth=many"], "argument --depth: invalid int value: 'many'"),
        (["--datasets=mini", "--bm25_only", "--output_dir=ftp://b/x"], "no paths of the kind ftp://"),
        (["--datasets=mini", "--bm25_only", "--gin.evaluation.Settings.dept=3"], "dept"),
        (["--datasets=mini", "--bm25_only", "--gin.evaluation.Settings.language=\"englsh\""], "'english'"),
        (["--datasets=mini", "--bm25_only", "--beir_dir=/nowhere"], "--beir_dir=/nowhere: no such folder"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(beir, tmp_path, capsys, flags, message):
    common = [f"--beir_dir={beir}", f"--output_dir={tmp_path / 'out'}"]
    status, table, error = _main(capsys, *common, *[flag.replace("{beir}", str(beir)) for flag in flags])
    assert (status, table) == (2, "")
    explained = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(explained) == 1
    assert message.replace("{beir}", str(beir)) in error[error.index("error: ") :]
    assert "Traceback" not in error


def test_dl_2019_is_0_5058(shared_data, tmp_path, capsys):
    folder = shared_data / "beir" / "trec-dl-2019-pool"
    status, table, _ = _main(
        capsys, "--bm25_only", f"--beir_dir={folder.parent}", "--datasets=trec-dl-2019-pool",
        f"--runs=trec-dl-2019-pool={folder}/runs/bm25.top100.trec",
        f"--qrels={folder}/qrels/full-official.tsv", f"--output_dir={tmp_path}",
    )  # fmt: skip
    assert status == 0
    assert table.splitlines()[1].split() == ["trec-dl-2019-pool", "43", "0.5058"]


def test_shipped_settings_reproduce_the_published_bm25_figures(shared_data, tmp_path, capsys):
    datasets = "scifact,cranfield,nfcorpus-stopped,cisi,quati-human-pt,pira-pt,pira-en"
    status, table, _ = _main(
        capsys, "--bm25_only", f"--beir_dir={shared_data / 'beir'}", f"--datasets={datasets}",
        f"--output_dir={tmp_path}",
    )  # fmt: skip
    assert status == 0
    assert {line.split()[0]: f"{float(line.split()[2]):.3f}" for line in table.splitlines()[1:8]} == {
        "scifact": "0.676",
        "cranfield": "0.404",
        "nfcorpus-stopped": "0.327",
        "cisi": "0.368",
        "quati-human-pt": "0.845",
        "pira-pt": "0.845",
        "pira-en": "0.875",
    }
