"""Offline caching with SeqIO's Beam job: two workers, every kind of task, and the task's own order again."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import pathlib
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from inranker_jax import data
from inranker_jax.data.sorting import sort_key
from inranker_jax.errors import InputError
from inranker_jax.records import LabelledPair
from tests.data import label_folders as toy
from tests.data.conftest import make_example

seqio = pytest.importorskip("seqio", reason="needs the [train] extra")
registry = pytest.importorskip("inranker_jax.data.registry")

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass
class FakeTask:
    """A cached task, as far as reading it goes."""

    name: str = "fake"
    source: Any = None
    preprocessors: tuple[Any, ...] = ()
    examples: int = 50
    cache_dir: str = "cache/fake"

    def get_cached_stats(self, split: str) -> dict[str, int]:
        return {"examples": self.examples}


def read(monkeypatch: pytest.MonkeyPatch, rows: list[Any], **arguments: Any) -> list[bytes]:
    monkeypatch.setattr(registry, "_through_seqio", lambda *_: iter(rows))
    task = FakeTask(**arguments.pop("task", {}))
    return [example.to_bytes() for example in registry.read_examples(task, "train", True, **arguments)]


@pytest.mark.parametrize("memory_limit", [1000, 1 << 30])
def test_numbers_decide_the_order(
    memory_limit: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [make_example(number) for number in range(50)]
    rows = list(enumerate(examples))
    shuffled = random.Random(1).sample(rows, len(rows))
    found = read(monkeypatch, shuffled, memory_limit=memory_limit, cache_dir=tmp_path)
    assert found == [example.to_bytes() for example in examples]
    # Without numbers any order of the files gives one and the same.
    orders = {
        tuple(read(monkeypatch, [(None, e) for _, e in order], memory_limit=memory_limit, cache_dir=tmp_path))
        for order in (rows, shuffled)
    }
    assert len(orders) == 1
    assert sorted(orders.pop()) == sorted(found)


def test_a_damaged_cache_is_seen(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(number, make_example(number)) for number in range(50)]
    with pytest.raises(InputError, match=r"fake:train: .*cache/fake holds 49 examples.* says 50\. Remove"):
        read(monkeypatch, rows[1:], cache_dir=tmp_path)
    with pytest.raises(InputError, match="two examples have number 7"):
        read(monkeypatch, [*rows[:-1], rows[7]], cache_dir=tmp_path)
    assert read(monkeypatch, [], task={"examples": 0}, cache_dir=tmp_path) == []


def make_data(folder: pathlib.Path) -> None:
    """The files behind `cached_tasks`."""
    from inranker_jax.data import tfds_collections

    labels = toy.write_label_folder(folder / "labels", queries=60)
    toy.write_beir(folder / "pt", 60, 20, language="em português: ")
    pairs = list(data.LabelFolderReader(labels)())
    write_tsv(folder / "labels.tsv", pairs)
    (folder / "lines.tsv").write_text("".join(f"{p.query}\t{p.document}\t1.5\t-2\n" for p in pairs))
    source = data.LabelledPairs(data.LabelFolderReader(labels), list_size=4, validation_fraction=0.2)
    tfds_collections.prepare_labels("toy_labels", folder / "tfds", source, num_shards=3)
    tfds_collections.prepare_beir("toy_beir", folder / "tfds", folder / "labels_source", num_shards=2)
    # For the tasks that ship: one query in a thousand is held out, and the 4461st is the first of these.
    shipped = toy.write_label_folder(folder / "beir_synthetic" / "scifact", queries=4462, first=4450)
    pairs = list(data.LabelFolderReader(shipped)())
    write_tsv(folder / "InRanker_msmarco.tsv", pairs)
    for name, texts in (
        ("queries.train.tsv", {pair.query_id: pair.query for pair in pairs}),
        ("collection.tsv", {pair.document_id: pair.document for pair in pairs}),
    ):
        (folder / name).write_text("".join(f"{key}\t{text}\n" for key, text in texts.items()))


def write_tsv(path: pathlib.Path, pairs: list[LabelledPair]) -> None:
    """InRanker's TSV."""
    rows = (f"{p.logits[1]}\t{p.logits[0]}\t{p.query_id}\t{p.document_id}\n" for p in pairs)
    path.write_text("".join(rows))


def records(name: str, split: str, **arguments: Any) -> list[bytes]:
    (store,), _ = data.open_stores(name, split, **arguments)
    return [store[number].to_bytes() for number in range(len(store))]


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    pytest.importorskip("apache_beam", reason="offline caching needs the [beam] extra")
    pytest.importorskip("google_crc32c", reason="offline caching needs the [beam] extra")
    pytest.importorskip("pyarrow", reason="needs the [label] extra")
    monkeypatch.setenv("CACHED_TASKS_FOLDER", str(tmp_path))
    monkeypatch.setenv("INRANKER_DATA_DIR", str(tmp_path))
    before = seqio.get_global_cache_dirs()
    make_data(tmp_path)
    yield tmp_path
    seqio.set_global_cache_dirs(before)


@pytest.mark.slow
def test_two_workers_cache_every_kind_of_task(folder: pathlib.Path) -> None:
    cache = folder / "seqio"
    tasks = importlib.import_module("tests.data.cached_tasks")
    command = [sys.executable, "-m", "seqio.scripts.cache_tasks_main", "--min_shards=3"]
    command += [f"--tasks={','.join(f'{name}$' for name in ('cached_.*', *tasks.SHIPPED))}"]
    command += ["--module_import=tests.data.cached_tasks", f"--output_cache_dir={cache}"]
    command += [
        "--pipeline_options=--runner=DirectRunner,--direct_num_workers=2,"
        "--direct_running_mode=multi_processing"
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    arguments: dict[str, Any] = {"cache_dir": folder / "examples"}
    cached: dict[str, Any] = {**arguments, "use_cached": True, "seqio_cache_dirs": [str(cache)]}
    for name in tasks.NUMBERED + tasks.UNNUMBERED + tasks.SHIPPED:
        for split in seqio.TaskRegistry.get(name).splits:
            if (name, split) == ("cached_translated", "validation"):
                with pytest.raises(InputError, match="holds no examples"):
                    records(name, split, **cached)
                continue
            here, there = records(name, split, **arguments), records(name, split, **cached)
            if name in tasks.UNNUMBERED:
                # Workers write them in any order; read back, the order depends on the examples alone.
                here = sorted(here, key=functools.partial(sort_key, None))
            assert here == there, (name, split)
            shipped = (
                {"train": 11, "validation": 1} if name.endswith("_lists") else {"train": 44, "validation": 4}
            )
            assert len(here) >= 8 if name not in tasks.SHIPPED else len(here) == shipped[split], (name, split)
