"""Scoring needs neither TensorFlow nor PyTorch nor Orbax: proved in a process that imported nothing else."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from tests.tiny_vocabulary import write_spiece

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
HEAVY = (
    "tensorflow",
    "tensorflow_datasets",
    "tensorflow_text",
    "seqio",
    "torch",
    "transformers",
    "gin",
    "orbax",
)

PROGRAM = """
import sys

import pytest

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HEAVY:
            raise ImportError(f"{name} must not be imported for scoring")

HEAVY = set(sys.argv[2].split(","))
sys.meta_path.insert(0, Refuse())

import inranker_jax
assert "jax" not in sys.modules, "import inranker_jax alone should cost nothing"
from inranker_jax import Reranker, ScoringContract
from inranker_jax.checkpoints import huggingface
from inranker_jax.models import T5Config, init_params
from inranker_jax.prompts import Tokenizer, preset

tokenizer = Tokenizer.from_pretrained(sys.argv[1])
sizes = dict(d_model=8, d_kv=4, d_ff=16, num_layers=1, num_decoder_layers=1, num_heads=2)
config = T5Config(vocab_size=tokenizer.vocab_size, **sizes)
contract = preset("monot5").replace(max_length=32)
huggingface.save(sys.argv[1] + "/export", config, init_params(config, 0), tokenizer, contract)
ranking = Reranker.from_pretrained(sys.argv[1] + "/export").rank("what", ["one text", "another", "one text"])
assert sorted(item.index for item in ranking) == [0, 1, 2]
loaded = sorted(HEAVY & {name.split(".")[0] for name in sys.modules})
assert not loaded, loaded
print("scored", len(ranking))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_scoring_imports_no_heavy_package(tmp_path: pathlib.Path) -> None:
    result = run(str(write_spiece(tmp_path)), ",".join(HEAVY))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "scored 3"


def test_the_check_sees_imports(tmp_path: pathlib.Path) -> None:
    """The same program fails when a package that scoring does use is on the list."""
    result = run(str(write_spiece(tmp_path)), "tokenizers")
    assert result.returncode != 0
    assert "tokenizers must not be imported for scoring" in result.stderr


def test_a_checkout_finds_its_tasks_without_an_editable_install():
    program = (
        "import importlib.util, sys\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'ditable' not in repr(finder)]\n"
        "print(importlib.util.find_spec('inranker_jax.tasks.python_docs').origin)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert pathlib.Path(found.stdout.strip()) == REPOSITORY / "tasks" / "python_docs.py"


@pytest.mark.parametrize("binary", ["train", "evaluate"])
def test_a_binary_that_needs_gin_says_how_to_get_it(binary):
    program = (
        "import runpy, sys\n"
        "sys.modules['gin'] = None\n"
        f"runpy.run_module('inranker_jax.{binary}', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: this command needs the package 'gin'. Run `pip install '.[train]'`")
    assert "Traceback" not in done.stderr
