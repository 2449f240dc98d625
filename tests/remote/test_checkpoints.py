"""Checkpoints of training in a bucket: written by TensorStore, complete by their marker, never restored torn."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inranker_jax import paths
from inranker_jax.checkpoints import huggingface, load_model, native
from inranker_jax.errors import InputError
from inranker_jax.models import T5Config, t5
from inranker_jax.prompts import Tokenizer, preset
from tests.remote.object_store import ObjectStore
from tests.tiny_vocabulary import write_spiece

RUN = "gs://bkt/runs/one"
CONFIG = T5Config(
    vocab_size=512, d_model=16, d_kv=4, d_ff=32, num_heads=2, num_layers=1, num_decoder_layers=1
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("vocabulary")
    write_spiece(folder, size=300)
    return Tokenizer.from_pretrained(folder)


def state(step: int) -> dict[str, Any]:
    params = jax.jit(lambda: t5.init_params(CONFIG, step))()
    return {"params": params, "step": jnp.int32(step)}


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def open_run(tokenizer: Tokenizer, where: str = RUN, keep: int = 1) -> native.Checkpointer:
    return native.Checkpointer(where, native.ModelDescription(CONFIG, preset("monot5")), tokenizer, keep)


def same(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours, theirs)


def test_steps_go_to_a_bucket_and_come_back(store: ObjectStore, tokenizer: Tokenizer) -> None:
    assert native.describe(RUN) is None
    run = open_run(tokenizer)
    for step, loss in ((1, 0.5), (2, 0.7), (3, 0.6)):
        run.save(step, state(step), {"step": step}, loss)
    run.close()
    kept = {name.split("/")[3] for name in store.names("bkt", "runs/one/checkpoints/")}
    assert kept == {"1", "3"}  # the best and the newest

    again = open_run(tokenizer)
    tree, position = again.restore(abstract(state(0)))
    again.close()
    assert position == {"step": 3}
    same(tree, state(3))
    description, restored_tokenizer = native.describe(RUN) or (None, None)
    assert description is not None
    assert restored_tokenizer is not None
    assert description.config == CONFIG
    assert restored_tokenizer.fingerprint == tokenizer.fingerprint

    best = load_model(RUN, on_host=True)
    assert best.source == f"{RUN}/checkpoints/1"
    same(best.params, state(1)["params"])
    assert load_model(f"{RUN}/checkpoints/3", on_host=True).source == f"{RUN}/checkpoints/3"


def test_a_torn_step_is_never_restored_and_is_written_again(store: ObjectStore, tokenizer: Tokenizer) -> None:
    run = open_run(tokenizer, keep=2)
    for step in (1, 2):
        run.save(step, state(step), {"step": step})
    run.close()
    # What a machine leaves that dies while it uploads: the marker was not reached.
    del store.buckets["bkt"]["runs/one/checkpoints/2/commit_success.txt"]
    torn = {name: store.buckets["bkt"][name] for name in store.names("bkt", "runs/one/checkpoints/2/")}
    assert len(torn) > 5
    assert load_model(RUN, on_host=True).source == f"{RUN}/checkpoints/1"

    again = open_run(tokenizer, keep=2)
    assert again.latest_step == 1
    tree, _ = again.restore(abstract(state(0)))
    same(tree, state(1))
    again.save(2, state(5), {"step": 2})
    again.wait()
    tree, _ = again.restore(abstract(state(0)))
    again.close()
    same(tree, state(5))
    # Orbax removes what was torn in a thread, and waits for it before it saves: every object is a new one.
    assert not {name for name, old in torn.items() if store.buckets["bkt"].get(name) == old}


def test_a_torn_tokenizer_is_written_again(store: ObjectStore, tokenizer: Tokenizer) -> None:
    store.put("bkt", "runs/one/tokenizer/tokenizer.json", b"{", {})
    run = open_run(tokenizer)
    run.save(1, state(1), {"step": 1})
    run.close()
    described = native.describe(RUN)
    assert described is not None
    assert described[1].fingerprint == tokenizer.fingerprint


def test_a_checkpoint_of_a_bucket_equals_that_of_a_disk(
    store: ObjectStore, tokenizer: Tokenizer, tmp_path: pathlib.Path
) -> None:
    for where in (RUN, str(tmp_path / "run")):
        run = open_run(tokenizer, where)
        run.save(1, state(1), {"step": 1})
        run.close()
    same(load_model(RUN, on_host=True).params, load_model(tmp_path / "run", on_host=True).params)


def test_a_model_is_exported_into_a_bucket(store: ObjectStore, tokenizer: Tokenizer) -> None:
    target = "gs://bkt/models/one"
    params = state(1)["params"]
    huggingface.save(target, CONFIG, params, tokenizer, preset("monot5"), max_shard_bytes=20_000)
    assert len([name for name in store.names("bkt") if name.endswith(".safetensors")]) > 1
    same(huggingface.load(paths.local_copy(target)).params, params)

    huggingface.save(target, CONFIG, state(2)["params"], None, None)  # fewer files
    written = {name: found.generation for name, found in store.buckets["bkt"].items()}
    assert sorted(written) == ["models/one/config.json", "models/one/model.safetensors"]
    assert max(written, key=lambda name: written[name]) == "models/one/config.json"
    same(huggingface.load(paths.local_copy(target)).params, state(2)["params"])

    paths.write(f"{target}/thesis.tex", "years of work")
    with pytest.raises(InputError, match=r"not an exported model's: thesis.tex"):
        huggingface.save(target, CONFIG, params, None, None)
