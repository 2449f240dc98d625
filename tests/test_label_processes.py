"""`python -m inranker_jax.label` in several processes of one JAX program: labels of one process, to the bit."""

from __future__ import annotations

import json
import pathlib
import signal
import sys
from collections.abc import Sequence

import pytest

from benchmarks.process_group import Ended, Group
from inranker_jax.checkpoints import huggingface
from inranker_jax.corpora.label_folder import LISTS, LabelFolder
from inranker_jax.labeling.job import Settings
from inranker_jax.models import T5Config, init_params
from inranker_jax.prompts import Tokenizer, preset
from tests.labeling.small_mixture import write_mixture
from tests.tiny_vocabulary import write_spiece

pytest.importorskip("pyarrow")
pytestmark = pytest.mark.slow

CHUNKS = 15  # of 60 pairs


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return write_mixture(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("t5")
    tokenizer = Tokenizer.from_pretrained(write_spiece(root / "vocabulary"))
    config = T5Config(
        vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=1, num_heads=4
    )
    contract = preset("monot5").replace(max_length=64)
    huggingface.save(root / "monot5-tiny", config, init_params(config, seed=0), tokenizer, contract)
    return root / "monot5-tiny"


def command(mixture: Settings, teacher: pathlib.Path, output: pathlib.Path) -> list[str]:
    names = ("queries", "corpus", "candidates", "qrels")
    return [
        sys.executable, "-m", "inranker_jax.label", f"--output_dir={output}", "--negatives=4", "--depth=20",
        *[f"--{name}={getattr(mixture, name)}" for name in names], f"--chunk_size={60 // CHUNKS}",
        f"--teacher=t5:{teacher}", f"--teacher=bm25=run:{mixture.candidates}", "--ensemble=1,0.5",
    ]  # fmt: skip


def run(command: Sequence[str], count: int) -> list[Ended]:
    with Group(command, count) as group:
        return group.end()


def contents(output: pathlib.Path) -> dict[str, bytes]:
    """The lists and every part of the store."""
    files = [output / LISTS, *sorted(output.glob("store/teachers/*/part-*.parquet"))]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def assert_complete(output: pathlib.Path, expected: dict[str, bytes]) -> None:
    info = LabelFolder(output).info
    assert info["complete"] is True
    assert list(info["teachers"]) == ["monot5-tiny", "bm25", "ensemble"]
    assert info["conflicting_labels"] == {"bm25": 0}
    assert contents(output) == expected
    assert not list(output.rglob(".*.tmp"))


@pytest.fixture(scope="module")
def expected(
    mixture: Settings, teacher: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What one process writes."""
    output = tmp_path_factory.mktemp("alone") / "labels"
    (ended,) = run(command(mixture, teacher, output), 1)
    assert ended.status == 0, ended.stderr
    found = contents(output)
    assert len(found) == 1 + 3 * CHUNKS
    assert_complete(output, found)
    return found


def test_two_processes_write_the_labels_of_one(
    mixture: Settings, teacher: pathlib.Path, tmp_path: pathlib.Path, expected: dict[str, bytes]
) -> None:
    first, second = run(command(mixture, teacher, tmp_path / "labels"), 2)
    assert (first.status, second.status) == (0, 0), first.stderr + second.stderr
    assert_complete(tmp_path / "labels", expected)
    assert "labels of monot5-tiny, bm25, ensemble are complete" in first.stdout
    assert second.stdout == "", "one host writes the summary"
    assert "[1/2] scored 56 pairs, the share of this process" in second.stderr
    sessions = [json.loads(path.read_text()) for path in (tmp_path / "labels/sessions").glob("*.json")]
    assert sorted((own["process_index"], own["process_count"]) for own in sessions) == [(0, 2), (1, 2)]


def test_killed_process_is_named_and_another_number_of_processes_goes_on(
    mixture: Settings, teacher: pathlib.Path, tmp_path: pathlib.Path, expected: dict[str, bytes]
) -> None:
    labels = tmp_path / "labels"
    with Group(command(mixture, teacher, labels), 2) as group:
        group.wait_for("12 lists, 60 pairs", 1, errors=True)  # its teacher is not loaded yet
        group.kill(1)
        first, second = group.end()
    assert second.status == -signal.SIGKILL
    assert first.status not in (0, 2)
    assert "waiting for process 1 (" in first.stderr
    assert "run the same command again, with any number of processes" in first.stderr
    assert LabelFolder(labels).info["complete"] is False
    kept = contents(labels)
    assert 1 < len(kept) < len(expected)
    again = run(command(mixture, teacher, labels), 3)
    assert [ended.status for ended in again] == [0, 0, 0], again[0].stderr
    assert_complete(labels, expected)


def test_sigterm_to_one_process_stops_all_and_keeps_what_is_finished(
    mixture: Settings, teacher: pathlib.Path, tmp_path: pathlib.Path, expected: dict[str, bytes]
) -> None:
    labels = tmp_path / "labels"
    with Group(command(mixture, teacher, labels), 2) as group:
        group.wait_for("12 lists, 60 pairs", 1, errors=True)
        group.processes[1].send_signal(signal.SIGTERM)
        ended = group.end()
    assert [each.status for each in ended] == [143, 143], ended[0].stderr + ended[1].stderr
    assert "interrupted: what was finished is kept" in ended[1].stderr
    assert "process 1 has stopped (by a signal)" in ended[0].stderr
    kept = contents(labels)
    assert len(kept) < len(expected)
    (alone,) = run(command(mixture, teacher, labels), 1)
    assert alone.status == 0, alone.stderr
    assert_complete(labels, expected)
    assert kept.items() <= contents(labels).items()
