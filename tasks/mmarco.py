"""mMARCO with MS MARCO's soft labels: an English teacher's logits for translated pairs.

mMARCO's ids are those of MS MARCO, so InRanker's `InRanker_msmarco.tsv` labels its pairs in any language. Put
that file into the folder in INRANKER_DATA_DIR, and mMARCO as published into its folder `mmarco` (translation
`google` where it is there, else `helsinki`). Tasks: `mmarco_pt_human_soft`, and with `_lists` a query's consecutive
pairs, ten together. `register("fr")` in your task file adds another language. One query in a thousand is in
split `validation`. The ids are checked against MS MARCO's `collection.tsv` where it is in INRANKER_DATA_DIR, or
against mMARCO's English collection where it lies beside the translated one.

The prompt is the student's affair: its contract (`prompts.preset("monoptt5")` for one) makes token ids of the
texts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from inranker_jax.tasks import msmarco

from inranker_jax.corpora import inranker, mmarco, open_corpus
from inranker_jax.data import add_labelled_task, data_path
from inranker_jax.progress import announce
from inranker_jax.records import LabelledPair, PathType

REMEDY = "Download mMARCO (the Hugging Face dataset unicamp-dl/mmarco, folder data) into it"


@functools.cache  # once for all splits and variants of the tasks
def check(collection: str, folder: str) -> None:
    """Checks a translated collection's ids against the original's, or says that there is no original to do so.

    Raises:
      InputError: the ids differ; see `corpora.mmarco.check_aligned`.
    """
    original = mmarco.find_original(collection, folder)
    if original is None:
        announce(
            f"{collection}: its ids are taken for MS MARCO's unchecked, as there is no collection.tsv in {folder} "
            "and no english_collection.tsv beside it to compare them with."
        )
        return
    announce(f"Comparing the ids of {collection} with those of {original}")
    mmarco.check_aligned(open_corpus(collection, "tsv"), open_corpus(original, "tsv"))


def find(language: str) -> tuple[str, str]:
    """mMARCO's collection and training queries in a language, below INRANKER_DATA_DIR."""
    return mmarco.find(data_path("mmarco", remedy=REMEDY), language)


def find_files(labels: msmarco.LazyPath | None, language: str) -> list[PathType]:
    """The labels, and what `find` finds."""
    return [msmarco.find(labels, msmarco.LABELS), *find(language)]


def read_pairs(labels: msmarco.LazyPath | None, language: str) -> Iterator[LabelledPair]:
    """Reads the labels, joined with mMARCO's texts."""
    path, collection, queries = find_files(labels, language)
    check(str(collection), data_path())
    return inranker.read_msmarco_tsv(path, queries, collection)


def register(
    language: str, labels: msmarco.LazyPath | None = None, *, validation_fraction: float = 0.001
) -> None:
    """Registers `mmarco_{language}_human_soft`, and `..._lists`.

    Args:
      language: two letters, as in `corpora.mmarco.LANGUAGES`.
      labels: the label file; default: the published one below INRANKER_DATA_DIR.
      validation_fraction: share of queries, by their text, in split "validation".

    Raises:
      InputError: mMARCO has no such language.
    """
    mmarco.language_name(language)
    for suffix, size in (("", 1), ("_lists", 10)):
        add_labelled_task(
            f"mmarco_{language}_human_soft{suffix}",
            functools.partial(read_pairs, labels, language),
            files=functools.partial(find_files, labels, language),
            list_size=size,
            validation_fraction=validation_fraction,
        )


register("pt")
