"""A tiny training run for tests: task, vocabulary, gin file, and how its end is compared."""

from __future__ import annotations

import json
import os
import pathlib
import random
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from inranker_jax import paths
from tests.tiny_vocabulary import write_spiece

TASK = """
from inranker_jax.corpora import inranker
from inranker_jax.data import add_labelled_task
PATH = {path!r}
add_labelled_task({name!r}, lambda: inranker.read_beir_jsonl(PATH, check_orientation=False), files=[PATH], list_size=4,
                  validation_fraction=0.2)
"""
WORDS = [
    "wing",
    "flow",
    "heat",
    "plate",
    "shock",
    "layer",
    "speed",
    "drag",
    "lift",
    "tube",
    "mach",
    "jet",
    "cone",
    "body",
    "wave",
]


def write_task(folder: pathlib.Path, name: str, bad_logit: float | None = None) -> pathlib.Path:
    """A task of 30 queries with 4 documents each; `bad_logit` replaces the teacher's logit of one document."""
    rng = random.Random(0)
    rows = []
    for q in range(30):
        query = " ".join(rng.sample(WORDS, 3)) + f" {q}"
        for d in range(4):
            margin = rng.uniform(-3, 3)
            text = " ".join(rng.choices(WORDS, k=rng.randrange(4, 20))) + f" {q} {d}"
            rows.append({"query": query, "contents": text, "true_logit": margin, "false_logit": -margin})
    if bad_logit is not None:
        rows[37]["true_logit"] = bad_logit
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = folder / f"{name}.py"
    module.write_text(TASK.format(path=str(data), name=name))
    return module


def write_setting(folder: pathlib.Path, task: str = "tiny_task") -> pathlib.Path:
    """A gin file for a tiny run of 12 steps, its task and its vocabulary.

    Modules that train in their own process name tasks of their own: SeqIO takes each name once.
    """
    (folder / "vocabulary").mkdir()
    write_spiece(folder / "vocabulary", size=300)
    module = write_task(folder, task)
    gin_file = folder / "tiny_run.gin"
    gin_file.write_text(f"""
include "runs/distil.gin"
include "models/tiny.gin"
include "meshes/single.gin"
MIXTURE_OR_TASK_NAME = "{task}"
MIXTURE_OR_TASK_MODULE = "{module}"
VOCABULARY = "{folder / "vocabulary"}"
TRAIN_STEPS = 12
WARMUP_STEPS = 2
LEARNING_RATE = 3e-3
BATCH_SIZE = 4
DROPOUT_RATE = 0.1
models.T5Config.vocab_size = 512
models.T5Config.d_model = 32
models.T5Config.d_kv = 8
models.T5Config.d_ff = 64
train.lengths = (32, 64)
train.contract = @prompts.preset()
prompts.preset.name = "monot5"
train.validation_period = 4
train.checkpoint_period = 2
train.log_every = 1
""")
    return gin_file


def flags(setting, output, *more):
    return [f"--gin_file={setting}", f"--output_dir={output}", *more]


def command(setting, output, *more):
    return [sys.executable, "-m", "inranker_jax.train", *flags(setting, output, *more)]


def environment(folder):
    """One compilation cache for all processes: equal programs, and seconds saved a start."""
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def final_state(output, step=12):
    """Every array of the last checkpoint, optimiser state and RNG included."""
    folder = paths.absolute(output) / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        leaves = reader.metadata(folder).item_metadata.tree
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), leaves)
        tree = reader.restore(folder, restore_args=on_host)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same_bytes(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert any("mu" in key for key in ours), "the optimiser's moments belong to the comparison"
    for key, value in theirs.items():
        assert ours[key].tobytes() == value.tobytes(), key
