"""Writes a prepared folder as a TensorFlow Datasets dataset, or a TFDS dataset as a BEIR folder.

    python -m inranker_jax.prepare_tfds --labels=LABEL_FOLDER --name=my_labels --data_dir=TFDS_FOLDER
    python -m inranker_jax.prepare_tfds --beir=BEIR_FOLDER --name=my_corpus --data_dir=TFDS_FOLDER
    python -m inranker_jax.prepare_tfds --from_tfds=beir/scifact:1.0.0 --output_dir=BEIR_FOLDER

Then `tfds.load("my_labels", data_dir=TFDS_FOLDER)` reads it, and a task of `data.add_tfds_task` trains on it.
All folders may be in gs:// or s3://. Nothing is fetched, except by TFDS for `--from_tfds` of a dataset that it has yet
to download (into a local --data_dir).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence

from inranker_jax import flags, quiet
from inranker_jax.errors import InputError
from inranker_jax.interruption import Interruption


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line.

    Raises:
      InputError: flags that are unknown, missing or do not go together.
    """
    parser = flags.Parser("prepare_tfds", __doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--labels", help="a label folder")
    source.add_argument("--beir", help="a BEIR folder")
    source.add_argument("--from_tfds", help="a TFDS dataset of the form of `beir`, written as a BEIR folder")
    parser.add_argument("--name", help="name of the dataset: lower-case letters, digits and _")
    parser.add_argument("--data_dir", help="folder of TFDS datasets")
    parser.add_argument("--output_dir", help="with --from_tfds: the BEIR folder to write")
    parser.add_argument("--list_size", type=flags.positive, default=10, help="documents per example, at most")
    parser.add_argument(
        "--validation_fraction", type=float, default=0.001, help="share of queries in split validation"
    )
    parser.add_argument("--teacher", help="whose labels, where the folder has those of several")
    parser.add_argument("--queries", help="other texts for the same query ids, such as a translation")
    parser.add_argument("--documents", help="other texts for the same document ids")
    parser.add_argument("--num_shards", type=flags.positive, help="files per split; by size by default")
    parser.add_argument("--overwrite", action="store_true", help="write the dataset anew where there is one")
    chosen = parser.parse(argv)
    needed = ("output_dir",) if chosen.from_tfds else ("name", "data_dir")
    for flag in needed:
        if getattr(chosen, flag) is None:
            raise InputError(f"--{flag} is missing. See --help.")
    return chosen


def prepare(chosen: argparse.Namespace, check: Callable[[], None]) -> os.PathLike[str]:
    """Writes what the flags ask for, and returns its folder; `check` is called between examples."""
    with quiet.native_stderr_held_back():
        from inranker_jax.data import label_folders, sources, tfds_collections
    if chosen.from_tfds:
        return tfds_collections.write_beir_folder(chosen.from_tfds, chosen.output_dir, chosen.data_dir, check)
    options = {"num_shards": chosen.num_shards, "overwrite": chosen.overwrite, "check": check}
    if chosen.beir:
        return tfds_collections.prepare_beir(chosen.name, chosen.data_dir, chosen.beir, **options)
    reader = label_folders.LabelFolderReader(chosen.labels, chosen.teacher, chosen.queries, chosen.documents)
    source = sources.LabelledPairs(
        reader,
        files=reader.files,
        list_size=chosen.list_size,
        validation_fraction=chosen.validation_fraction,
        relevance="first",
    )
    description = f"Labels of {chosen.labels}, {chosen.list_size} documents an example at most."
    return tfds_collections.prepare_labels(
        chosen.name, chosen.data_dir, source, description=description, **options
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""

    def work(interruption: Interruption) -> None:
        chosen = parse_flags(argv)

        def check() -> None:
            if interruption.requested:
                raise flags.Stopped  # what is unfinished was written aside, and is removed

        # TFDS talks on standard output, which is for the result.
        with contextlib.redirect_stdout(sys.stderr):
            written = prepare(chosen, check)
        print(os.fspath(written))

    return flags.run_main(work)


if __name__ == "__main__":
    sys.exit(main())
