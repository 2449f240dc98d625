"""Models that PyTorch runs, from a bucket: teachers' and the language model that writes queries."""

from __future__ import annotations

import pathlib
import re
import sys
import urllib.parse

import numpy as np
import pytest

from inranker_jax import paths
from inranker_jax.errors import InputError
from inranker_jax.labeling.teachers import open_teacher
from inranker_jax.labeling.teachers.base import check_model
from inranker_jax.labeling.teachers.spec import parse_spec
from inranker_jax.query_generation.generators import Request
from inranker_jax.query_generation.local import LocalGenerator, LocalSettings
from inranker_jax.records import Document
from tests.labeling import tiny_teachers
from tests.query_generation import tiny_model
from tests.remote.object_store import ObjectStore, StatusError

# Beside the weights, and never read: other frameworks' copies of them, and a trainer's.
NEVER_READ = (
    "onnx/model.onnx",
    "tf_model.h5",
    "flax_model.msgpack",
    "checkpoint-500/model.safetensors",
    "optimizer.pt",
)
KINDS = [("cross-encoder", 1, ""), ("bi-encoder", None, "?pooling=mean")]


def fetched(store: ObjectStore) -> list[str]:
    """Names of the objects whose contents were asked for."""
    found = [re.search(r"/o/([^?]+)\?.*alt=media", path) for _, path in store.requests]
    return sorted({urllib.parse.unquote(match[1]) for match in found if match})


@pytest.mark.parametrize(("kind", "labels", "options"), KINDS)
def test_a_teacher_in_a_bucket_gives_what_it_gives_here(
    store: ObjectStore, tmp_path: pathlib.Path, kind: str, labels: int | None, options: str
) -> None:
    folder = tiny_teachers.write_bert(tmp_path / "model", labels)
    paths.upload(folder, "gs://bkt/models/tiny")
    pairs = tiny_teachers.make_pairs(4)
    here = open_teacher(f"{kind}:{folder}{options}")
    spec = f"{kind}:gs://bkt/models/tiny{options}"
    check_model(parse_spec(spec))
    there = open_teacher(spec)
    np.testing.assert_array_equal(*(next(iter(teacher.logits([pairs]))) for teacher in (here, there)))
    assert here.identity == there.identity
    with pytest.raises(InputError, match=r"gs://bkt/models/other: no such file or folder"):
        open_teacher(f"{kind}:gs://bkt/models/other{options}")


@pytest.mark.parametrize(("kind", "labels", "options"), KINDS)
def test_a_teacher_is_checked_without_its_weights_and_read_without_what_it_never_reads(
    store: ObjectStore, tmp_path: pathlib.Path, kind: str, labels: int | None, options: str
) -> None:
    paths.upload(tiny_teachers.write_bert(tmp_path / "model", labels), "gs://bkt/m")
    for name in NEVER_READ:
        store.put("bkt", f"m/{name}", b"gigabytes", {})
    spec = f"{kind}:gs://bkt/m{options}"
    check_model(parse_spec(spec))
    assert fetched(store) == []
    assert len(next(iter(open_teacher(spec).logits([tiny_teachers.make_pairs(2)])))) == 2
    read = {name for name in store.names("bkt") if name.removeprefix("m/") not in NEVER_READ}
    assert set(fetched(store)) == read


def test_a_teacher_that_a_bucket_lacks_is_told_before_the_work(store: ObjectStore) -> None:
    store.put("bkt", "m/model.safetensors", b"", {})
    with pytest.raises(InputError, match=r"gs://bkt/m: it has no config.json. Expected a cross-encoder"):
        check_model(parse_spec("cross-encoder:gs://bkt/m"))
    with pytest.raises(InputError, match=r"there is no bucket 'missing'"):
        check_model(parse_spec("cross-encoder:gs://missing/m"))

    def fault(method: str, name: str) -> None:
        raise StatusError(400, "not today")

    store.fault = fault
    with pytest.raises(OSError, match=r"gs://bkt/m: could not be read or written \(not today"):
        check_model(parse_spec("cross-encoder:gs://bkt/m"))


def test_a_package_that_is_missing_is_told_before_a_model_is_fetched(
    store: ObjectStore, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths.upload(tiny_model.write_model(tmp_path / "model"), "gs://bkt/models/not_fetched")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"--generator=local needs the package 'transformers'"):
        LocalGenerator(LocalSettings("gs://bkt/models/not_fetched"))
    assert fetched(store) == []


def test_a_language_model_in_a_bucket_writes_the_same_queries(
    store: ObjectStore, tmp_path: pathlib.Path
) -> None:
    folder = tiny_model.write_model(tmp_path / "model")
    paths.upload(folder, "gs://bkt/models/gpt2")
    for name in NEVER_READ:
        store.put("bkt", f"models/gpt2/{name}", b"gigabytes", {})
    prompts = [Request(Document("d1", "one"), "What is the meaning"), Request(Document("d2", "two"), "of")]
    answers, files = [], []
    for model in (str(folder), "gs://bkt/models/gpt2"):
        generator = LocalGenerator(LocalSettings(model, max_new_tokens=5))
        answers.append(list(generator.generate(prompts, lambda: False)))
        files.append(generator.identity["files"])
        assert generator.name == f"local:{model}"
    assert answers[0] == answers[1]
    assert files[0] == files[1]
    assert not {name.removeprefix("models/gpt2/") for name in fetched(store)} & {*NEVER_READ}
    with pytest.raises(InputError, match=r"gs://bkt/models/none: no such file or folder"):
        LocalGenerator(LocalSettings("gs://bkt/models/none"))
