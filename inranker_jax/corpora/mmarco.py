"""mMARCO (Bonifacio et al., 2021): MS MARCO's passages and queries, translated; ids are MS MARCO's.

The published folders are `data/google` (version 2, 14 languages) and `data/helsinki` (version 1, 9 languages),
earlier called `v2` and `v1`. The relevance judgments of the training queries are MS MARCO's own.
"""

from __future__ import annotations

import itertools

from inranker_jax.corpora import files
from inranker_jax.corpora.corpus import Corpus
from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.records import PathType

LANGUAGES = {
    "ar": "arabic",
    "de": "german",
    "en": "english",
    "es": "spanish",
    "fr": "french",
    "hi": "hindi",
    "id": "indonesian",
    "it": "italian",
    "ja": "japanese",
    "nl": "dutch",
    "pt": "portuguese",
    "ru": "russian",
    "vi": "vietnamese",
    "zh": "chinese",
}
_TRANSLATIONS = {
    "google": ("data/google", "google", "data/v2", "v2"),
    "helsinki": ("data/helsinki", "helsinki", "data/v1", "v1"),
}


def language_name(language: str) -> str:
    """mMARCO's name of a language, given that name or its two letters: `pt` -> `portuguese`.

    Raises:
      InputError: mMARCO has no such language.
    """
    name = LANGUAGES.get(language.lower(), language.lower())
    if name not in LANGUAGES.values():
        known = sorted(LANGUAGES.values())
        raise InputError(
            f"mMARCO has no language {language!r}.{did_you_mean(name, known)} It has {', '.join(known)}."
        )
    return name


def find(
    folder: PathType, language: str, *, translation: str | None = None, split: str = "train"
) -> tuple[str, str]:
    """Finds the collection and the queries of a language.

    Args:
      folder: a copy of the dataset (or of one of its folders), or a folder that holds the two files.
      language: its English name or its two letters.
      translation: "google" (version 2) or "helsinki" (version 1); default: google where it is there.
      split: which queries: "train", "dev" or "dev.small".

    Returns:
      (path of `{language}_collection.tsv`, path of `{language}_queries.{split}.tsv`), plain or compressed.

    Raises:
      InputError: an unknown language or translation, or the files are not in any of the known places.
    """
    name = language_name(language)
    if translation is not None and translation not in _TRANSLATIONS:
        raise InputError(
            f"translation {translation!r}: expected 'google' or 'helsinki'."
            f"{did_you_mean(translation, _TRANSLATIONS)}"
        )
    chosen = [translation] if translation else list(_TRANSLATIONS)
    bases = [base for key in chosen for base in _TRANSLATIONS[key]]
    tried = []
    for base in (*bases, "."):
        collection = _first(folder, base, ("collections", "."), f"{name}_collection.tsv")
        queries = _first(
            folder,
            base,
            (f"queries/{split.partition('.')[0]}", "queries", "."),
            f"{name}_queries.{split}.tsv",
        )
        if collection and queries:
            return collection, queries
        if collection or queries:
            tried.append(f"{base} has only {collection or queries}")
    raise InputError.at(
        folder, None, f"no {name} collection with {split} queries" + "".join(f"; {words}" for words in tried),
        f"collections/{name}_collection.tsv and queries/{split.partition('.')[0]}/{name}_queries.{split}.tsv "
        f"in one of {', '.join(bases)} or in the folder itself",
        "Fetch both files from unicamp-dl/mmarco",
    )  # fmt: skip


def _first(folder: PathType, base: str, places: tuple[str, ...], name: str) -> str | None:
    for place in places:
        parts = [part for part in (base, place) if part != "."]
        found = files.in_folder(folder, "/".join([*parts, name]))
        if found is not None:
            return found
    return None


def find_original(translated: PathType, folder: PathType) -> str | None:
    """MS MARCO's own passages: `collection.tsv` in `folder`, else mMARCO's English copy beside the translation."""
    beside = files.as_path(translated).parent
    return files.in_folder(folder, "collection.tsv") or files.in_folder(beside, "english_collection.tsv")


def check_aligned(translated: Corpus, original: Corpus) -> int:
    """Checks that two corpora have the same ids in the same order, in one pass over both.

    Labels of the original's pairs are joined with the translated texts by id alone. Ids of these files are row
    numbers, so a collection that lost rows and was numbered anew would lend its texts to other passages' labels.
    About ten seconds a million documents.

    Returns:
      How many documents each has.

    Raises:
      InputError: naming the first position where they differ.
    """
    count = 0
    for count, (one, other) in enumerate(
        itertools.zip_longest(translated.documents(), original.documents()), start=1
    ):
        if one is None or other is None or one.id != other.id:
            here = "its end" if one is None else f"id {one.id!r}"
            there = "the end" if other is None else f"id {other.id!r}"
            raise InputError.at(
                translated.path, None, f"document {count} is {here} where {original.path} has {there}",
                "the same ids in the same order", "Take both languages whole, from one release",
            )  # fmt: skip
    return count
