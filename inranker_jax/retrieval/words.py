"""Words of a text for BM25: bm25s's splitting and stop words, Snowball's stems."""

from __future__ import annotations

import importlib
import logging
import re
import sys
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from inranker_jax.errors import InputError, did_you_mean

# Languages with a list of stop words in bm25s.
STOP_WORDS = (
    "danish",
    "dutch",
    "english",
    "french",
    "german",
    "italian",
    "norwegian",
    "portuguese",
    "russian",
    "spanish",
    "swedish",
    "turkish",
)
# Languages with a Snowball stemmer in PyStemmer but without stop words: every word counts. ("porter" is the
# older English algorithm, "dutch_porter" the older Dutch one.)
STEMMER_ONLY = (
    "arabic",
    "armenian",
    "basque",
    "catalan",
    "czech",
    "dutch_porter",
    "esperanto",
    "estonian",
    "finnish",
    "greek",
    "hindi",
    "hungarian",
    "indonesian",
    "irish",
    "lithuanian",
    "nepali",
    "persian",
    "polish",
    "porter",
    "romanian",
    "serbian",
    "sesotho",
    "tamil",
    "yiddish",
)
# "none" stems nothing and stops nothing.
LANGUAGES = (*sorted(STOP_WORDS + STEMMER_ONLY), "none")

# Scripts whose vowels are combining marks, which `\w` does not match: bm25s's pattern would cut words at each.
_WITH_MARKS = ("arabic", "hindi", "nepali", "persian", "tamil", "yiddish")
_PATTERN = r"(?u)\b\w\w+\b"  # bm25s's and scikit-learn's
_import_lock = threading.Lock()


def bm25s() -> Any:
    """Imports bm25s without waking JAX.

    Its top-k module runs a JAX kernel on import when JAX is there, which starts the backend (and takes the
    accelerator) before `jax.distributed` can be set up. A `None` entry in `sys.modules` makes that one import
    fail, and bm25s then selects NumPy.

    Raises:
      InputError: the package is not installed.
    """
    with _import_lock:
        if "bm25s" in sys.modules:
            return sys.modules["bm25s"]
        missing = object()
        before: Any = sys.modules.get("jax.lax", missing)
        sys.modules["jax.lax"] = None  # type: ignore[assignment]
        try:
            module = importlib.import_module("bm25s")
            # Its logger is set to DEBUG, and would talk through any handler that another package installed.
            logging.getLogger("bm25s").setLevel(logging.WARNING)
            return module
        except ModuleNotFoundError as error:
            raise InputError(
                f"BM25 needs the package {error.name!r}: run `pip install 'inranker_jax[eval]'`, or give "
                "candidates from a TREC run."
            ) from error
        finally:
            if before is missing:
                del sys.modules["jax.lax"]
            else:
                sys.modules["jax.lax"] = before


def check_language(language: str) -> None:
    """Raises InputError when `language` is not one of `LANGUAGES`."""
    if language not in LANGUAGES:
        raise InputError(
            f"BM25 has no stemmer for language {language!r}.{did_you_mean(language, LANGUAGES)} "
            f"Choose one of {', '.join(LANGUAGES)}."
        )


def stemmer(language: str) -> Any:
    """PyStemmer's stemmer of a language, None for "none".

    Raises:
      InputError: PyStemmer is not installed, or is too old for the language.
    """
    if language == "none":
        return None
    try:
        import Stemmer
    except ModuleNotFoundError as error:
        raise InputError(
            "BM25 stems with PyStemmer, which is not installed: run `pip install 'inranker_jax[eval]'`, or "
            "set the language to 'none'."
        ) from error
    try:
        return Stemmer.Stemmer(language)
    except KeyError as error:
        raise InputError(
            f"the installed PyStemmer has no stemmer for {language!r}: run `pip install --upgrade PyStemmer`, "
            "or set the language to 'none'."
        ) from error


@lru_cache(maxsize=2)
def word_pattern(language: str) -> str:
    """The regular expression of a word: two or more letters or digits (with their combining marks)."""
    if language not in _WITH_MARKS:
        return _PATTERN
    # Mc, Me and Mn as ranges of a character class; the joiners hold Indic and Persian words together.
    spans: list[list[int]] = []
    for code in (c for c in range(0x300, 0x11FFF) if unicodedata.category(chr(c))[0] == "M"):
        if spans and spans[-1][1] == code - 1:
            spans[-1][1] = code
        else:
            spans.append([code, code])
    marks = "".join(f"{chr(first)}-{chr(last)}" for first, last in spans)
    inside = f"[\\w\u200c\u200d{marks}]"
    return rf"\w{inside}+"


class Tokenizer:
    """Turns texts into word numbers while the vocabulary grows.

    The words are exactly those of `bm25s.tokenize`: lower-cased runs of two or more letters or digits, without
    stop words, stemmed. That function wants all texts at once; this one streams, with one table of words where
    `bm25s.tokenization.Tokenizer` keeps two, and is as fast.

    Args:
      language: one of `LANGUAGES`.

    Attributes:
      vocabulary: stem (or word, for "none") -> number, dense from 0.
    """

    def __init__(self, language: str) -> None:
        self.vocabulary: dict[str, int] = {}
        self._find = re.compile(word_pattern(language)).findall
        self._numbers = _Numbers(self.vocabulary, language)

    def number(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yields the word numbers of each text, in its order; new words get the next number."""
        find, number_of = self._find, self._numbers.__getitem__
        for text in texts:
            yield [number for number in map(number_of, find(text.lower())) if number >= 0]


class _Numbers(dict[str, int]):
    """Word -> number of its stem, -1 for a stop word; worked out when a word is first asked for."""

    def __init__(self, vocabulary: dict[str, int], language: str) -> None:
        super().__init__(dict.fromkeys(stop_words(language), -1))
        self._vocabulary = vocabulary
        found = stemmer(language)
        self._stem = found.stemWord if found is not None else str

    def __missing__(self, word: str) -> int:
        number = self._vocabulary.setdefault(self._stem(word), len(self._vocabulary))
        self[word] = number
        return number


def stop_words(language: str) -> tuple[str, ...]:
    """bm25s's stop words of a language; none where it has no list."""
    if language not in STOP_WORDS:
        return ()
    stopped: tuple[str, ...] = tuple(bm25s().tokenization._infer_stopwords(language))
    return stopped


def words_of(texts: list[str], language: str) -> list[list[str]]:
    """The words of each text as `Tokenizer` finds them: stopped, stemmed, in order, repeated ones too."""
    if not texts:
        return []
    words: list[list[str]] = bm25s().tokenize(
        texts,
        token_pattern=word_pattern(language),
        stopwords=language if language in STOP_WORDS else None,
        stemmer=stemmer(language),
        return_ids=False,
        show_progress=False,
    )
    return words
