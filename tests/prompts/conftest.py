"""Vocabularies for the tests of prompts: a small one always, the real ones where they are."""

from __future__ import annotations

import pathlib
import shutil

import pytest

from inranker_jax.prompts import Tokenizer
from tests.conftest import SHARED
from tests.tiny_vocabulary import write_spiece

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Query: what is relevance? Document: see 3.14, (x) and [y] Relevant:",
    "À Índia e à Ásia: ação, coração, pão, avó, três, Não há razão — “aspas” e ‘outras’…",
    "naïve café re\u0301sume\u0301 Å Å ﬁnance ½ ｆｕｌｌｗｉｄｔｈ ｶﾞ ™",
    "emoji 😀 👩‍👩‍👧‍👦 🇧🇷 👍🏽 end",
    "zero\u200bwidth \u200d joiner \ufeff bom \u2060word soft\xadhyphen",
    "control \x00\x01\x02\x07\x1b[31m \x7f \x85 end",
    "tabs\tand\nnew\r\nlines\x0b\x0c and\u00a0no-break\u2003em\u3000wide",
    "",
    " ",
    "   leading",
    "trailing   ",
    "many     inner      spaces",
    "\n\n\n",
    "▁ literal ▁▁marks▁",
    "</s>",
    "text </s> in the middle</s>glued",
    "<extra_id_0> and <extra_id_99>glued<extra_id_5>",
    "<pad> <unk> <s> </ s> <extra_id_100> <EXTRA_ID_0>",
    "{query} {document} {} {{}} %s \\n \\u0041",
    "日本語のテキスト 中文 한국어 русский עברית العربية ไทย",
    "\u0301starts with a combining mark",
    "a" * 5000,
    "https://example.org/path?query=1&x=%20#fragment user@example.org",
]


def folder_for(name: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Makes a folder with only `spiece.model`: trained, or real (skipped where it is not there)."""
    folder = tmp_path_factory.mktemp(name)
    if name == "trained":
        return write_spiece(folder)
    source = SHARED / "data" / "vocab" / f"{name}_spiece.model"
    if not source.is_file():
        pytest.skip(f"the real {name} vocabulary is not at {source}")
    shutil.copy(source, folder / "spiece.model")
    return folder


@pytest.fixture(scope="session", params=["trained", "t5", "ptt5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return folder_for(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return folder_for("trained", tmp_path_factory)


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return folder_for("t5", tmp_path_factory)


@pytest.fixture(scope="session")
def trained(trained_folder: pathlib.Path) -> Tokenizer:
    return Tokenizer.from_pretrained(trained_folder)
