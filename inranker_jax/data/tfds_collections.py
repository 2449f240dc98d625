"""TensorFlow Datasets: any prepared folder as a TFDS dataset, and TFDS datasets as folders; see `tfds_tasks` for tasks.

`prepare_labels` and `prepare_beir` write a dataset which `tfds.load(name, data_dir=...)`,
`tfds.builder_from_directory` and `seqio.TfdsDataSource` read without this package. Nothing is fetched: TFDS's
look at its cloud bucket is switched off.

- Labelled pairs become the features of a task (`features.OUTPUT_FEATURES`, and `example_number`), splits
  `train` and `validation`.
- A BEIR folder becomes the features and splits of TFDS's own `beir` datasets: `query`, `passage`, and one
  split of judged pairs for each qrels file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.utils import gcs_utils

from inranker_jax import paths
from inranker_jax.corpora import beir
from inranker_jax.data import sources
from inranker_jax.errors import InputError
from inranker_jax.records import PathType, atomic_text

VERSION = "1.0.0"
MARKER = "dataset_info.json"
"""The file by which TFDS knows the folder of a dataset."""
_NAME = re.compile(r"[a-z][a-z0-9_]*")

LABELLED_FEATURES: dict[str, Any] = {
    "query_id": tfds.features.Text(),
    "query": tfds.features.Text(),
    "document_ids": tfds.features.Sequence(tfds.features.Text()),
    "documents": tfds.features.Sequence(tfds.features.Text()),
    "teacher_logits": tfds.features.Tensor(shape=(None, 2), dtype=np.float32),
    "relevance": tfds.features.Tensor(shape=(None,), dtype=np.float32),
    sources.NUMBER: tfds.features.Scalar(np.int64),
}
"""TFDS features of prepared labels."""

BEIR_FEATURES: dict[str, Any] = {
    "query_id": tfds.features.Text(),
    "query": tfds.features.Text(),
    "query_metadata": tfds.features.Text(),
    "passage_id": tfds.features.Text(),
    "passage": tfds.features.Text(),
    "passage_metadata": tfds.features.Text(),
    "score": tfds.features.Scalar(np.float32),
}
"""Those of TFDS's `beir` datasets."""

_NO_QUERY = {"query_id": "", "query": "", "query_metadata": "{}", "score": -1.0}
_NO_PASSAGE = {"passage_id": "", "passage": "", "passage_metadata": "{}", "score": -1.0}

Rows = Callable[[], Iterator[dict[str, Any]]]
Check = Callable[[], None]


class CollectionBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A TFDS builder over readers of rows, one per split; examples keep the readers' order."""

    VERSION = tfds.core.Version(VERSION)
    # TFDS would look for a file of download checksums beside the code; nothing is downloaded.
    code_path = None
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "Prepared by inranker_jax."}

    def __init__(
        self,
        name: str,
        data_dir: PathType,
        feature_spec: Mapping[str, Any],
        splits: Mapping[str, Rows],
        description: str,
        check: Check = lambda: None,
    ):
        """Describes the dataset; nothing is read.

        Args:
          name: its name: lower-case letters, digits and `_`.
          data_dir: the folder of TFDS datasets in which it appears as `name/1.0.0`.
          feature_spec: its TFDS features.
          splits: a function that yields rows, for each split.
          description: what it is made from.
          check: called before each row; may raise to stop.

        Raises:
          InputError: the name is not one that TFDS takes.
        """
        if not _NAME.fullmatch(name):
            raise InputError(
                f"TFDS name {name!r}: expected lower-case letters, digits and '_', a letter first "
                "(for example 'my_labels')."
            )
        self.name = name
        self._feature_spec, self._rows, self._description = dict(feature_spec), dict(splits), description
        self._check = check
        # TFDS looks for metadata of every dataset in its public bucket; ours are not there.
        gcs_utils._is_gcs_disabled = True
        super().__init__(data_dir=os.fspath(data_dir))

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._description,
            features=tfds.features.FeaturesDict(self._feature_spec),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self._rows}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, row in enumerate(self._rows[split]()):
            self._check()
            yield number, row

    def prepare(self, num_shards: int | None = None, overwrite: bool = False) -> epath.Path:
        """Writes the dataset; it appears whole or not at all.

        Args:
          num_shards: files per split; by default TFDS decides by size.
          overwrite: write it anew where there is one, which stays until then. (TFDS itself would keep the old
            one without a word, or delete it first.)

        Returns:
          Its folder.

        Raises:
          InputError: there is one.
        """
        if self.is_prepared():
            if not overwrite:
                raise _taken(self.data_dir)
            self._replace(num_shards)
        else:
            self._write(num_shards)
        return epath.Path(self.data_dir)

    def _write(self, num_shards: int | None) -> None:
        config = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=num_shards)
        self.download_and_prepare(download_config=config)

    def _replace(self, num_shards: int | None) -> None:
        """Writes the dataset aside; the old one makes room when the new one is whole."""
        place = epath.Path(self.data_dir)
        aside = place.parent.parent / f".{self.name}.{os.getpid()}.incomplete"
        new = CollectionBuilder(
            self.name, aside, self._feature_spec, self._rows, self._description, self._check
        )
        try:
            new._write(num_shards)
            place.rename(aside / "old")
            try:
                epath.Path(new.data_dir).rename(place)
            except BaseException:
                (aside / "old").rename(place)
                raise
        finally:
            if aside.exists():
                aside.rmtree()


def _prepare(
    name: str,
    data_dir: PathType,
    feature_spec: Mapping[str, Any],
    splits: Mapping[str, Rows],
    description: str,
    *,
    num_shards: int | None,
    overwrite: bool,
    check: Check,
) -> epath.Path:
    """Writes a dataset, to a store by way of this machine: see `CollectionBuilder`.

    TFDS would write to a store through TensorFlow, which has other credentials than the rest and no `s3://`. An older
    dataset there is removed when the new one is ready to be uploaded; until that has ended there is none.
    """
    if not paths.is_remote(data_dir):
        builder = CollectionBuilder(name, data_dir, feature_spec, splits, description, check)
        return builder.prepare(num_shards, overwrite)
    paths.check_reachable(data_dir)
    place = paths.of(data_dir) / name / VERSION
    if (place / MARKER).exists() and not overwrite:
        raise _taken(place)
    with tempfile.TemporaryDirectory(prefix="inranker_jax.") as aside:
        builder = CollectionBuilder(name, aside, feature_spec, splits, description, check)
        written = builder.prepare(num_shards)
        paths.remove(place / MARKER)
        paths.remove(place)
        paths.upload(written, place, marker=MARKER)
    return epath.Path(place)


def _taken(place: PathType) -> InputError:
    return InputError.at(
        place, None, "this dataset is there already", "a new name",
        "Choose another name, or pass --overwrite (overwrite=True) to write it anew",
    )  # fmt: skip


def local_folder(data_dir: PathType, tfds_name: str) -> str:
    """A folder of TFDS datasets on this machine that holds the one of that name: a copy of a remote one.

    Raises:
      InputError: a remote one is not there.
    """
    if not paths.is_remote(data_dir):
        return os.fspath(data_dir)
    dataset, _, version = tfds_name.partition(":")
    place = paths.of(data_dir) / dataset
    paths.check_reachable(place)
    whole = [
        name.split("/")[0] for name in paths.names_below(place) if re.fullmatch(rf"[^/]+/{MARKER}", name)
    ]
    found = [other for other in whole if version in ("", other)]
    if not found:
        raise InputError.at(
            place, None, "no prepared TFDS dataset", f"{version or 'VERSION'}/{MARKER}",
            "Prepare it with `python -m inranker_jax.prepare_tfds`, or copy it there",
        )  # fmt: skip
    newest = max(found, key=lambda other: [int(part) for part in re.findall("[0-9]+", other)])
    copy = paths.local_copy(place / newest)
    link = copy.parent / dataset / newest  # TFDS finds a dataset by the names of its folders
    link.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(copy)
    return os.fspath(copy.parent)


def prepare_labels(
    name: str,
    data_dir: PathType,
    source: sources.LabelledPairs,
    *,
    description: str = "Labelled pairs.",
    num_shards: int | None = None,
    overwrite: bool = False,
    check: Check = lambda: None,
) -> epath.Path:
    """Writes the examples of a source (of a task: `task.source`) as a TFDS dataset.

    Args:
      name: name of the dataset.
      data_dir: folder of TFDS datasets, local or in a store.
      source: where the examples come from.
      description: what they are, for the dataset's metadata.
      num_shards: files per split.
      overwrite: write it anew where there is one.
      check: called before each row; may raise to stop.

    Returns:
      The dataset's folder.

    Raises:
      InputError: the name is not one that TFDS takes or taken, every split is empty, or as the source's reader raises.
    """
    splits = {split: _numbered(source, split) for split in source.splits if _has_rows(source, split)}
    if not splits:
        raise InputError(f"TFDS dataset {name}: the labels hold no examples. Expected at least one.")
    return _prepare(
        name, data_dir, LABELLED_FEATURES, splits, description,
        num_shards=num_shards, overwrite=overwrite, check=check,
    )  # fmt: skip


def _has_rows(source: sources.LabelledPairs, split: str) -> bool:
    return next(source.examples(split), None) is not None


def _numbered(source: sources.LabelledPairs, split: str) -> Rows:
    return lambda: source.numbered_examples(split)


def prepare_beir(
    name: str,
    data_dir: PathType,
    folder: PathType,
    *,
    num_shards: int | None = None,
    overwrite: bool = False,
    check: Check = lambda: None,
) -> epath.Path:
    """Writes a BEIR folder as a TFDS dataset with the features and splits of TFDS's own `beir`.

    A pair of the qrels whose query or document has no text is left out, as there.

    Args:
      name: name of the dataset.
      data_dir: folder of TFDS datasets, local or in a store.
      folder: the BEIR folder, likewise; all its qrels files become splits (`dev` becomes `validation`).
      num_shards: files per split.
      overwrite: write it anew where there is one.
      check: called before each row; may raise to stop.

    Returns:
      The dataset's folder.

    Raises:
      InputError: as the readers of the BEIR folder do, or the name is taken.
    """
    paths.check_reachable(folder)
    files = paths.names_below(paths.of(folder) / "qrels")
    qrels = [name.removesuffix(".tsv") for name in files if name.endswith(".tsv") and "/" not in name]

    def queries() -> Iterator[dict[str, Any]]:
        for query in beir.read_queries(folder):
            yield {"query_id": query.id, "query": query.text, "query_metadata": "{}", **_NO_PASSAGE}

    def passages() -> Iterator[dict[str, Any]]:
        for document in beir.read_corpus(folder):
            yield {**_passage(document.id, document.text, document.title), **_NO_QUERY}

    def judged(split: str) -> Rows:
        def rows() -> Iterator[dict[str, Any]]:
            pairs = beir.read_qrels(folder, split)
            wanted = {document for documents in pairs.values() for document in documents}
            texts = {document.id: document for document in beir.read_corpus(folder) if document.id in wanted}
            for query in beir.read_queries(folder):
                for document_id, grade in pairs.get(query.id, {}).items():
                    if document_id in texts:
                        document = texts[document_id]
                        yield {
                            "query_id": query.id,
                            "query": query.text,
                            "query_metadata": "{}",
                            **_passage(document.id, document.text, document.title),
                            "score": float(grade),
                        }

        return rows

    splits: dict[str, Rows] = {"query": queries, "passage": passages}
    splits |= {"validation" if split == "dev" else split: judged(split) for split in qrels}
    return _prepare(
        name, data_dir, BEIR_FEATURES, splits, f"BEIR folder {folder}.",
        num_shards=num_shards, overwrite=overwrite, check=check,
    )  # fmt: skip


def _passage(identifier: str, text: str, title: str) -> dict[str, Any]:
    metadata = json.dumps({"title": title} if title else {}, ensure_ascii=False)
    return {"passage_id": identifier, "passage": text, "passage_metadata": metadata}


def write_beir_folder(
    tfds_name: str, output: PathType, data_dir: PathType | None = None, check: Check = lambda: None
) -> os.PathLike[str]:
    """Writes a TFDS dataset of the `beir` form as a BEIR folder, which every stage of this project reads.

    TFDS prepares the dataset first where it is not in a local `data_dir`; its own `beir/*` are downloaded then.

    Args:
      tfds_name: `beir/scifact:1.0.0`, or the name of one that `prepare_beir` wrote.
      output: the folder to write.
      data_dir: folder of TFDS datasets; default: TFDS's own.
      check: called before each row (not while TFDS downloads); may raise to stop. Files that are whole stay.

    Returns:
      The folder.

    Raises:
      InputError: TFDS does not know the dataset, or it has not the form.
    """
    paths.check_reachable(output)
    builder = open_builder(tfds_name, data_dir)
    if not {"query", "passage"} <= set(builder.info.features or ()) or "passage" not in builder.info.splits:
        raise InputError(
            f"TFDS dataset {tfds_name} has features {sorted(builder.info.features or ())} and splits "
            f"{sorted(builder.info.splits)}. Expected the form of TFDS's beir: splits query and passage."
        )
    folder: Any = paths.of(output)

    def rows(split: str) -> Iterator[dict[str, Any]]:
        for row in tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False)):
            check()
            yield {key: value.decode() if isinstance(value, bytes) else value for key, value in row.items()}

    def lines(split: str) -> Iterator[dict[str, str]]:
        for row in rows(split):
            if split == "query":
                yield {"_id": row["query_id"], "text": row["query"]}
            else:
                title = json.loads(row["passage_metadata"] or "{}").get("title", "")
                yield {"_id": row["passage_id"], "title": title, "text": row["passage"]}

    for split, file in (("passage", "corpus.jsonl"), ("query", "queries.jsonl")):
        with atomic_text(folder / file) as out:
            out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines(split))
    for split in sorted(set(builder.info.splits) - {"query", "passage"}):
        with atomic_text(folder / "qrels" / f"{'dev' if split == 'validation' else split}.tsv") as out:
            out.write("query-id\tcorpus-id\tscore\n")
            out.writelines(
                f"{row['query_id']}\t{row['passage_id']}\t{int(row['score'])}\n" for row in rows(split)
            )
    return folder


def open_builder(tfds_name: str, data_dir: PathType | None = None) -> Any:
    """Opens a TFDS dataset, preparing it where it is known to TFDS and not prepared yet (not in a store).

    Raises:
      InputError: there is no such dataset.
    """
    gcs_utils._is_gcs_disabled = True
    folder = None if data_dir is None else local_folder(data_dir, tfds_name)
    try:
        builder = tfds.builder(tfds_name, data_dir=folder)
        if not builder.is_prepared():
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"no TFDS dataset {tfds_name!r} in {data_dir or 'the default folder of TFDS'} ({reason}). "
            "Prepare it with `python -m inranker_jax.prepare_tfds`."
        ) from error
    except ModuleNotFoundError as error:
        # TFDS imports what the preparation of its own datasets needs only then, and does not require it.
        raise InputError(
            f"TFDS needs the package {error.name!r} to prepare {tfds_name!r}. Run `pip install {error.name}`."
        ) from error
    return builder
