"""Words: every Snowball language, stop words where there are some, vowels that are combining marks."""

from __future__ import annotations

import pytest

from inranker_jax.errors import InputError
from inranker_jax.records import Document, Query
from inranker_jax.retrieval import BM25Index, words

TEXTS = [
    "Waves of SHOCK waves, and a naïve co-operation in 1969!",
    "",
    "the of and",
    "perguntas para os navios e as perguntas",
    "Übergänge größer straße don't x y",
]


def test_every_language_of_pystemmer_is_known():
    import Stemmer

    assert {*Stemmer.algorithms()} <= {*words.LANGUAGES}
    for language in words.LANGUAGES:
        words.stemmer(language)


def test_stop_word_languages_are_those_of_bm25s():
    tokenization = words.bm25s().tokenization
    for language in words.STOP_WORDS:
        assert tokenization._infer_stopwords(language)
    for language in words.STEMMER_ONLY:
        with pytest.raises(ValueError, match="not recognized"):
            tokenization._infer_stopwords(language)


@pytest.mark.parametrize(
    "language", ["english", "portuguese", "german", "turkish", "finnish", "none", "hindi"]
)
def test_streamed_words_are_those_of_bm25s_tokenize(language):
    tokenizer = words.Tokenizer(language)
    numbers = list(tokenizer.number(TEXTS[:2])) + list(tokenizer.number(TEXTS[2:]))
    names = {number: word for word, number in tokenizer.vocabulary.items()}
    assert sorted(names) == list(range(len(names)))
    assert [[names[number] for number in row] for row in numbers] == words.words_of(TEXTS, language)


def test_combining_vowels_stay_inside_words():
    assert words.words_of(["हिन्दी में लिखना"], "hindi") == [["हिन्द", "म", "लिख"]]
    assert words.words_of(["கிளி"], "tamil") != [[]]
    assert len(words.words_of(["كِتَاب"], "arabic")[0]) == 1
    found = BM25Index.build([Document("1", "किताब पढ़ना"), Document("2", "कलम")], "hindi").search(
        [Query("q", "किताबें")]
    )
    assert list(found["q"]) == ["1"]


def test_unknown_language():
    with pytest.raises(
        InputError, match=r"no stemmer for language 'finish'. Did you mean 'finnish'\? Choose one of"
    ):
        words.check_language("finish")
