"""The registrations that ship: they import without data, and read what they promise."""

from __future__ import annotations

import importlib
import itertools
import pathlib

import numpy as np
import pytest

from inranker_jax import data, tasks
from inranker_jax.errors import InputError

seqio = pytest.importorskip("seqio", reason="needs the [train] extra")

MODULES = sorted(
    path.stem
    for folder in tasks.__path__
    for path in pathlib.Path(folder).glob("*.py")
    if not path.stem.startswith("_")
)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports_without_data(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INRANKER_DATA_DIR", raising=False)
    data.import_task_modules([f"inranker_jax.tasks.{module}"])
    registered = [name for name in seqio.TaskRegistry.names() if name.startswith(module.removesuffix("s"))]
    assert registered
    for name in registered:
        task = seqio.TaskRegistry.get(name)
        assert "train" in task.splits
        assert task.supports_caching
        assert set(task.output_features) == set(data.OUTPUT_FEATURES)


def test_python_docs(tmp_path: pathlib.Path) -> None:
    data.import_task_modules(["inranker_jax.tasks.python_docs"])
    arguments = {"cache_dir": tmp_path}
    (train,), _ = data.open_stores("python_docs", "train", **arguments)
    (validation,), _ = data.open_stores("python_docs", "validation", **arguments)
    (pairs,), _ = data.open_stores("python_docs_pairs", "validation", **arguments)
    assert train.max_list_size == validation.max_list_size == 10
    assert len(pairs) == sum(len(validation[number]) for number in range(len(validation)))
    assert pairs.max_list_size == 1
    queries = [{store[number].query for number in range(len(store))} for store in (train, validation)]
    assert not queries[0] & queries[1]
    for number in itertools.chain(range(0, len(train), 997), range(5)):
        example = train[number]
        assert example.relevance.tolist() == [1] + [0] * (len(example) - 1)
        assert example.teacher_logits is not None
        np.testing.assert_allclose(example.teacher_logits.sum(-1), 0, atol=1e-3)
    # The teacher never saw the judgments, and still prefers the positives.
    margins = np.stack([train[n].teacher_logits @ [-1, 1] for n in range(200) if len(train[n]) == 10])
    assert margins[:, 0].mean() > margins[:, 1:].mean() + 2


def test_inranker_beir_on_the_real_format(
    shared_data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("inranker_jax.tasks.inranker_beir")
    (tmp_path / module.LABELS).symlink_to(shared_data / "teacher" / "cranfield_synthetic.jsonl")
    monkeypatch.setenv("INRANKER_DATA_DIR", str(tmp_path))
    (train,), _ = data.open_stores("inranker_beir", cache_dir=tmp_path)
    (validation,), _ = data.open_stores("inranker_beir", "validation", cache_dir=tmp_path)
    assert len(train) + len(validation) == 4000
    assert train.max_list_size == 1
    (lists,), _ = data.open_stores("inranker_beir_lists", cache_dir=tmp_path)
    assert lists.max_list_size == 10
    assert sum(len(lists[number]) for number in range(len(lists))) == len(train)
    first = lists[0]
    assert first.query == "experimental investigation of the aerodynamics of a wing in a slipstream"
    assert first.teacher_logits is not None
    np.testing.assert_array_equal(first.teacher_logits[0], np.float32([-2.3682, 2.3682]))


def test_msmarco_with_paths_of_ones_own(shared_data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    module = importlib.import_module("inranker_jax.tasks.msmarco")
    teacher, cranfield = shared_data / "teacher", shared_data / "beir" / "cranfield"
    module.register(
        "test_cranfield",
        teacher / "cranfield_synthetic.tsv",
        teacher / "cranfield_synthetic.queries.tsv",
        cranfield,
        titles=False,
        list_size=10,
        validation_fraction=0.1,
    )
    stores = [
        data.open_stores("test_cranfield", split, cache_dir=tmp_path)[0][0]
        for split in ("train", "validation")
    ]
    assert sum(len(store) for store in stores) == 1397
    assert 100 < len(stores[1]) < 180
    assert [store[0].query_id for store in stores] == ["syn-2", "syn-1"]


def test_msmarco_with_the_published_names(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("inranker_jax.tasks.msmarco")
    monkeypatch.delenv("INRANKER_DATA_DIR", raising=False)
    with pytest.raises(InputError, match="INRANKER_DATA_DIR is not set"):
        data.open_stores("msmarco_human_soft")
    monkeypatch.setenv("INRANKER_DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"InRanker_msmarco\.tsv: no such file"):
        data.open_stores("msmarco_human_soft")
    (tmp_path / "InRanker_msmarco.tsv").write_text("1.5\t-2\t100\t1\n-3\t2.5\t100\t0\n")
    (tmp_path / "queries.train.tsv").write_text("100\twhat is jax\n")
    (tmp_path / "collection.tsv").write_text("0\ta bird\n1\ta library\n")
    (tmp_path / "qrels.train.tsv").write_text("100\t0\t1\t1\n")
    examples = {}
    for name in ("msmarco_human_soft", "msmarco_human_soft_lists", "msmarco_human_hard"):
        (store,), _ = data.open_stores(name, cache_dir=tmp_path / "cache")
        examples[name] = [store[number] for number in range(len(store))]
    assert [e.documents for e in examples["msmarco_human_soft"]] == [("a library",), ("a bird",)]
    (both,) = examples["msmarco_human_soft_lists"]
    assert both.documents == ("a library", "a bird")
    assert both.teacher_logits is not None
    assert both.teacher_logits.tolist() == [[-2.0, 1.5], [2.5, -3.0]]
    assert both.relevance.tolist() == [-1, -1]
    assert [e.relevance.tolist() for e in examples["msmarco_human_hard"]] == [[1], [0]]
    (tmp_path / "InRanker_msmarco.tsv").write_text("1.5\t-2\t100\t1\n-3\t2.5\t100\t2\n")
    with pytest.raises(InputError, match=r"InRanker_msmarco\.tsv:2: unknown document id '2'"):
        data.open_stores("msmarco_human_soft", cache_dir=tmp_path / "cache")
