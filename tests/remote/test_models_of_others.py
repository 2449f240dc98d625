"""Models that PyTorch runs, from a bucket: teachers' and the language model that writes queries."""

from __future__ import annotations

import pathlib

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
from tests.remote.object_store import ObjectStore


@pytest.mark.parametrize(
    ("kind", "labels", "options"), [("cross-encoder", 1, ""), ("bi-encoder", None, "?pooling=mean")]
)
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


def test_a_language_model_in_a_bucket_writes_the_same_queries(
    store: ObjectStore, tmp_path: pathlib.Path
) -> None:
    folder = tiny_model.write_model(tmp_path / "model")
    paths.upload(folder, "gs://bkt/models/gpt2")
    prompts = [Request(Document("d1", "one"), "What is the meaning"), Request(Document("d2", "two"), "of")]
    answers, files = [], []
    for model in (str(folder), "gs://bkt/models/gpt2"):
        generator = LocalGenerator(LocalSettings(model, max_new_tokens=5))
        answers.append(list(generator.generate(prompts, lambda: False)))
        files.append(generator.identity["files"])
        assert generator.name == f"local:{model}"
    assert answers[0] == answers[1]
    assert files[0] == files[1]
    with pytest.raises(InputError, match=r"gs://bkt/models/none: no such file or folder"):
        LocalGenerator(LocalSettings("gs://bkt/models/none"))
