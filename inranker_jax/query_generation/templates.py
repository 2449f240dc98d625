"""Few-shot prompts that make a language model write a query for a document.

The default is the prompt of InPars as the thesis prints it (Figure 9): three documents, each with a relevant query,
and a fourth document whose query the model is to write.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from inranker_jax import paths, records
from inranker_jax.errors import InputError, did_you_mean, json_problem
from inranker_jax.records import PathType

Cutter = Callable[[str, int], str]

_PLACEHOLDERS = ("document", "examples", "number")
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]+)\}")
# A word is a run of letters and digits; scripts without blanks between words count each character.
# Thai, Lao, Burmese, Khmer, kana, Han.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
# What a byte-pair vocabulary of 50k pieces does to text, roughly: a short word is one piece, long ones are split.
_PIECE = re.compile(rf"[{_UNSPACED}]|[^\W\d_{_UNSPACED}]{{1,7}}|\d{{1,3}}|_+|[^\w\s]")


@dataclass(frozen=True)
class Example:
    """A document and the query that a person wrote for it."""

    document: str
    query: str
    document_id: str = ""


INPARS_EXAMPLES = (
    Example(
        "We don't know a lot about the effects of caffeine during pregnancy on you and your baby. So it's best to "
        "limit the amount you get each day. If you are pregnant, limit caffeine to 200 milligrams each day. This is "
        "about the amount in 1½ 8-ounce cups of coffee or one 12-ounce cup of coffee.",
        "Is a little caffeine ok during pregnancy?",
    ),
    # InPars' own file has this passage twice in a row; the thesis prints it once.
    Example(
        "Passiflora herbertiana. A rare passion fruit native to Australia. Fruits are green-skinned, white fleshed, "
        "with an unknown edible rating. Some sources list the fruit as edible, sweet and tasty, while others list "
        "the fruits as being bitter and inedible.",
        "What fruit is native to Australia?",
    ),
    Example(
        "The Canadian Armed Forces. 1 The first large-scale Canadian peacekeeping mission started in Egypt on "
        "November 24, 1956. 2 There are approximately 65,000 Regular Force and 25,000 reservist members in the "
        "Canadian military. 3 In Canada, August 9 is designated as National Peacekeepers' Day.",
        "How large is the Canadian military?",
    ),
)
INPARS_TEMPLATE = "{examples}Example {number}:\nDocument: {document}\nRelevant Query:"


@dataclass(frozen=True)
class Template:
    """A prompt with a place for the document.

    Attributes:
      name: "inpars", or the file that it was read from.
      text: holds `{document}`, and optionally `{examples}` (the few-shot examples, each followed by an empty line)
        and `{number}` (the number of examples plus one).
      examples: what `{examples}` stands for.
    """

    name: str
    text: str
    examples: tuple[Example, ...] = ()

    def render(self, document: str) -> str:
        """The prompt for one document, whose line breaks and runs of blanks become single blanks.

        >>> Template("t", "Text: {document}\\nQuery:").render("one\\n\\n two")
        'Text: one two\\nQuery:'
        """
        values = {
            "document": " ".join(document.split()),
            "examples": "".join(
                f"Example {number}:\nDocument: {example.document}\nRelevant Query: {example.query}\n\n"
                for number, example in enumerate(self.examples, start=1)
            ),
            "number": str(len(self.examples) + 1),
        }
        # One pass, so that a document which mentions a placeholder stays as it is.
        return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), self.text)

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of the prompt for an empty document."""
        return hashlib.sha256(self.render("").encode()).hexdigest()[:16]

    def example_queries(self) -> list[str]:
        """Queries and other lines of the prompt, which a weak model likes to repeat as its answer."""
        return [line.removeprefix("Relevant Query:").strip() for line in self.render("").splitlines()]


def open_template(prompt: str, examples: PathType | None = None) -> Template:
    """Opens the built-in prompt or a user's template file.

    Args:
      prompt: "inpars", or a UTF-8 text file with `{document}` in it; its last line breaks are dropped.
      examples: a JSONL file with the few-shot examples, `{"document" (or "text"), "query", "doc_id" (optional)}`;
        default: the three of the thesis's Figure 9 for "inpars", none for a file.

    Raises:
      InputError: no such file, a placeholder that is missing or misspelt, a malformed example.
    """
    own = None if examples is None else tuple(read_examples(examples))
    if prompt == "inpars":
        return Template("inpars", INPARS_TEMPLATE, INPARS_EXAMPLES if own is None else own)
    if not pathlib.Path(prompt).is_file() and "://" not in prompt:
        raise InputError(
            f"--prompt={prompt}: no such file.{did_you_mean(prompt, ['inpars'])} Expected 'inpars' or a text file "
            "that holds {document}."
        )
    with records.open_text(prompt) as file:
        text = file.read().removeprefix("\ufeff").rstrip("\r\n")
    found = set(_PLACEHOLDER.findall(text))
    if "document" not in found:
        near = next((did_you_mean(name, ["document"]) for name in sorted(found - {*_PLACEHOLDERS})), "")
        raise InputError.at(
            prompt, None, f"no {{document}} in the template{near.rstrip('?').replace('. D', '; d')}",
            "a prompt with {document} where the document belongs",
        )  # fmt: skip
    if own and "examples" not in found:
        raise InputError.at(
            prompt, None, "--examples is given, and the template has no {examples}",
            "{examples} where they belong", "Add it, or leave --examples out",
        )  # fmt: skip
    if "examples" in found and not own:
        raise InputError.at(
            prompt,
            None,
            "the template has {examples}, and there are none",
            remedy="Give them with --examples=FILE",
        )
    return Template(os.fspath(prompt), text, own or ())


def read_examples(path: PathType) -> list[Example]:
    """Reads few-shot examples from JSONL.

    Raises:
      InputError: naming file and line, for malformed JSON or a missing text; or for an empty file.
    """
    found = []
    for number, line in records.numbered_lines(path):
        if not line.strip():
            continue
        expected = '{"document": "...", "query": "..."}'
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError.at(path, number, json_problem(error), expected) from error
        row = row if isinstance(row, dict) else {}
        values: list[Any] = [row.get("document", row.get("text")), row.get("query")]
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise InputError.at(path, number, "not an example", expected)
        document, query = (" ".join(value.split()) for value in values)
        found.append(Example(document, query, str(row.get("doc_id", ""))))
    if not found:
        raise InputError.at(path, None, "the file holds no examples")
    return found


# ---------------------------------------------------------------------------------------------- lengths


def words(text: str) -> list[str]:
    """The words of a text, lower case, without punctuation; each character where a script has no blanks.

    >>> words("What's BM25, exactly?"), len(words("小さな模型"))
    (['what', 's', 'bm25', 'exactly'], 5)
    """
    return _WORD.findall(text.casefold())


def estimate_tokens(text: str) -> int:
    """About how many pieces a language model's vocabulary makes of a text, without knowing the vocabulary."""
    return sum(1 for _ in _PIECE.finditer(text))


def cut_by_estimate(text: str, limit: int) -> str:
    """Cuts a text after `limit` estimated tokens."""
    for number, match in enumerate(_PIECE.finditer(text), start=1):
        if number > limit:
            return text[: match.start()].rstrip()
    return text


def tokenizer_cutter(source: str) -> Cutter:
    """A function that cuts a text after a number of tokens of a real vocabulary.

    Args:
      source: a `tokenizer.json` or a folder that holds one, local or remote, or a model on the Hugging Face hub.

    Raises:
      InputError: there is no such tokenizer.
    """
    from tokenizers import Tokenizer

    path = paths.local_copy(source)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(path)) if path.exists() else Tokenizer.from_pretrained(source)
    except Exception as error:  # the Rust library raises bare Exception
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--tokenizer={source}: cannot be opened ({reason}). Expected a tokenizer.json, a folder with one, or the "
            "name of a model on the Hugging Face hub."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def cut(text: str, limit: int) -> str:
        # A token is seldom longer than 16 characters: this keeps a book from being tokenised whole.
        offsets = tokenizer.encode(text[: limit * 32], add_special_tokens=False).offsets
        return cut_at(text, offsets, limit)

    return cut


def cut_at(text: str, offsets: Sequence[tuple[int, int]], limit: int) -> str:
    """Cuts a text where its token number `limit` ends; `offsets` are (start, stop) characters of its tokens."""
    return text if len(offsets) <= limit else text[: offsets[limit - 1][1]].rstrip()
