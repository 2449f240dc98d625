"""A model folder with a tokenizer, for benchmarks that begin with text."""

from __future__ import annotations

import pathlib
import shutil

from .processes import ContenderError, run_module

CONTRACT = "monot5"
_VOCABULARY_FILES = ("spiece.model", "tokenizer.json", "tokenizer_config.json")


def random_model(shape: str, work: pathlib.Path, environment: dict[str, str]) -> pathlib.Path:
    """Folder of the random model of a shape in transformers' form, written where it is not there yet.

    Raises:
      SystemExit: torch or transformers is missing.
    """
    folder = work / shape / "transformers"
    if not folder.is_dir():
        try:
            run_module("models", "transformers", shape, str(folder), environment=environment)
        except ContenderError as error:
            raise SystemExit(
                f"error: no model: {error}. The benchmark makes one with torch and transformers: "
                "pip install -e '.[benchmark]'"
            ) from None
    return folder


def with_tokenizer(model: pathlib.Path, target: pathlib.Path, shared: pathlib.Path) -> str:
    """Puts a model's files and a vocabulary into one folder; returns which vocabulary.

    It is T5's own where the shared data has it, else the one of the collection that the package ships.
    """
    target.mkdir(parents=True)
    for path in model.iterdir():
        (target / path.name).symlink_to(path.resolve())
    vocabulary = shared / "vocab" / "t5_spiece.model"
    if vocabulary.is_file():
        shutil.copy(vocabulary, target / "spiece.model")
        return "T5's vocabulary"
    from inranker_jax.corpora.shipped import find_shipped

    for path in pathlib.Path(find_shipped("python_docs/vocabulary")).iterdir():
        if path.name in _VOCABULARY_FILES:
            shutil.copy(path, target / path.name)
    return "the shipped vocabulary of python_docs"
