"""mMARCO with MS MARCO's soft labels: an English teacher's logits for translated pairs.

mMARCO's ids are those of MS MARCO, so InRanker's `InRanker_msmarco.tsv` labels its pairs in any language. Put
that file into the folder in INRANKER_DATA_DIR, and mMARCO as published into its folder `mmarco` (translation
`google` where it is there, else `helsinki`). Tasks: `mmarco_pt_human_soft`, and with `_lists` a query's consecutive
pairs, ten together. `register("fr")` in your task file adds another language. One query in a thousand is in
split `validation`.

The prompt is the student's affair: its contract (`prompts.preset("monoptt5")` for one) makes token ids of the
texts.
"""

from __future__ import annotations

import functools

from inranker_jax.tasks import msmarco

from inranker_jax.corpora import mmarco
from inranker_jax.data import data_path
from inranker_jax.records import PathType

REMEDY = "Download mMARCO (the Hugging Face dataset unicamp-dl/mmarco, folder data) into it"


def find(language: str, part: int) -> PathType:
    """mMARCO's collection (part 0) or training queries (part 1) in a language, below INRANKER_DATA_DIR."""
    return mmarco.find(data_path("mmarco", remedy=REMEDY), language)[part]


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
        msmarco.register(
            f"mmarco_{language}_human_soft{suffix}",
            labels,
            functools.partial(find, language, 1),
            functools.partial(find, language, 0),
            list_size=size,
            validation_fraction=validation_fraction,
        )


register("pt")
