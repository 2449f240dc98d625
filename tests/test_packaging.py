"""What is installed: the wheel holds gin files, tasks and the collection, and works without the checkout."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built offline from a copy of what git would ship."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], capture_output=True, check=True)
    (built,) = folder.glob("inranker_jax-*.whl")
    return built


def test_the_wheel_holds_everything_and_nothing_at_the_top(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {f"inranker_jax/{path.relative_to(ROOT)}" for path in (ROOT / "gin").rglob("*.gin")}
    shipped |= {f"inranker_jax/{path.relative_to(ROOT)}" for path in (ROOT / "tasks").glob("*.py")}
    collection = ROOT / "inranker_jax" / "collections"
    shipped |= {
        str(path.relative_to(ROOT))
        for path in collection.rglob("*")
        if path.is_file() and "pyc" not in path.name
    }
    shipped |= {"inranker_jax/py.typed"}
    assert shipped <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"inranker_jax"}


@pytest.mark.slow
def test_an_installed_wheel_trains_from_the_shipped_gin_file_in_any_folder(wheel, tmp_path):
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, capture_output=True, check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = [sys.executable, "-c", "import inranker_jax; print(inranker_jax.__file__)"]
    found = subprocess.run(where, cwd=elsewhere, env=environment, capture_output=True, text=True, check=True)
    assert pathlib.Path(found.stdout.strip()).is_relative_to(site)
    quick = [
        "--gin.TRAIN_STEPS=2",
        "--gin.WARMUP_STEPS=1",
        "--gin.BATCH_SIZE=2",
        "--gin.train.validation_batches=1",
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "inranker_jax.train",
            "--gin_file=gin/small_synth.gin",
            *quick,
            "--gin.evaluation.report_student.depth=2",
        ],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "outputs" / "small_synth" / "checkpoints" / "2").is_dir()
    table = done.stdout[done.stdout.index("python_docs  ") :]
    for system in ("BM25", "untrained student", "trained student", "teacher"):
        assert re.search(rf"^{system} +0\.\d{{4}}", table, re.MULTILINE), table


def test_the_core_needs_no_tensorflow_and_no_pytorch():
    requirements = importlib.metadata.requires("inranker_jax")
    core = [requirement for requirement in requirements if "extra ==" not in requirement]
    assert any(requirement.startswith("jax") for requirement in core)
    heavy = ("tensorflow", "torch", "seqio", "transformers", "gin")
    assert not [requirement for requirement in core if requirement.startswith(heavy)]
    extras = set(importlib.metadata.metadata("inranker_jax").get_all("Provides-Extra"))
    assert {"train", "eval", "tpu", "cuda", "dev"} <= extras
