"""Gin files in a bucket, with their includes, and a report of `compile` that is written there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from inranker_jax import configuration, paths
from inranker_jax.configuration import gin
from inranker_jax.errors import InputError
from inranker_jax.train import train
from tests.remote.object_store import ObjectStore


@pytest.fixture(autouse=True)
def _train_is_known() -> Iterator[None]:
    gin.external_configurable(train, "train", module="inranker_jax")
    yield
    gin.clear_config()


def test_a_gin_file_in_a_bucket_includes_its_neighbours_and_shipped_files(store: ObjectStore) -> None:
    text = 'include "rates.gin"\ninclude "gin/models/t5_small.gin"\nBATCH_SIZE = 8\n'
    paths.write("gs://bkt/gin/mine.gin", text)
    paths.write("gs://bkt/gin/rates.gin", "WARMUP_STEPS = 3\n")
    for name in ("gs://bkt/gin/mine.gin", "mine.gin"):
        configuration.parse_gin([name], search_paths=["gs://bkt/gin"])
        found = [gin.query_parameter(f"{macro}/macro.value") for macro in ("BATCH_SIZE", "WARMUP_STEPS")]
        assert found == [8, 3]
        assert gin.query_parameter("models.T5Config.d_model") == 512
    paths.write("gs://bkt/gin/mine.gin", "BATCH_SIZE = 16\n")
    configuration.parse_gin(["gs://bkt/gin/mine.gin"])
    assert gin.query_parameter("BATCH_SIZE/macro.value") == 16, "a file that was changed is read anew"


def test_a_missing_gin_file_in_a_bucket_is_named(store: ObjectStore) -> None:
    with pytest.raises(InputError, match=r"no gin file 'gs://bkt/gin/none\.gin'"):
        configuration.parse_gin(["gs://bkt/gin/none.gin"])


@pytest.mark.slow
def test_compile_writes_its_report_to_a_bucket(store: ObjectStore) -> None:
    flags = [
        "--gin_file=gin/small_synth.gin",
        "--topology=cpu:2",
        "--step=score",
        "--output=gs://bkt/reports/a.json",
    ]
    command = [sys.executable, "-m", "inranker_jax.compile", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(paths.of("gs://bkt/reports/a.json").read_text())["step"] == "score"
