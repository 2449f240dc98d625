"""The scoring contract: from a (query, document) pair to its token ids, and from logits to a score.

Training, labelling and scoring call `ScoringContract.encode`; there is no second way to make ids. The record
is plain data, stored in every checkpoint and export.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.prompts.tokenizer import Tokenizer, check_text

if TYPE_CHECKING:
    import jax

TRUNCATIONS = ("suffix_safe", "longest_first", "paper_training")
SCORE_KINDS = ("logit_difference", "probability", "log_probability", "single_logit")

# InRanker's training script keeps ten positions free beside query and document (compatibility.md).
PAPER_MARGIN = 10
# The share of max_length that a document keeps, if it has as much, before a very long query is cut: 32 of
# 512. Without any, all documents of such a query would get one and the same score.
_DOCUMENT_FLOOR = 16
_PLACEHOLDERS = ("query", "document")
# How many pairs are handed to the tokenizer at once: bounds the memory of a call with millions of pairs.
_CHUNK = 4096


@dataclasses.dataclass(frozen=True)
class ScoringContract:
    """How a pair becomes token ids and how logits become a score.

    Attributes:
      template: text with `{query}` and `{document}`, each once. Any other brace is written twice (`{{`,
        `}}`).
      label_pieces: vocabulary pieces whose logits are read at the first decoder position: (false, true), or
        one piece for models with a single logit.
      append_eos: whether `</s>` follows the text.
      truncation: what is cut from a pair longer than `max_length`:
        * `suffix_safe`: tokens of the document, from its end. All other ids stay what they are in the
          tokenisation of the complete text, so `Relevant:` and `</s>` survive. A document is not cut below
          `max_length // 16` tokens (32 of 512); when that is not enough, the query is cut from its end, and
          only when nothing of the query is left the rest of the document.
        * `longest_first`: the end of the text, whatever stands there; then `</s>`. Equals
          `T5Tokenizer(text, truncation=True, max_length=max_length)`, as InRanker and others score.
        * `paper_training`: as InRanker's training script. Query part, document part and suffix are tokenised
          one by one; the document part is cut to `max_length - 10 - len(query part)`, whether or not the pair
          would have fitted, and no `</s>` follows. A query so long that the sum still passes `max_length` is
          cut from its end.
      max_length: limit in tokens, `</s>` included.
      score: `logit_difference` (true - false: ranks like the probability but never saturates), `probability`
        (softmax p(true)), `log_probability`, or `single_logit`.
      name: the preset's name, or the user's own.

    Raises:
      InputError: a field is out of its range; see each field.

    >>> contract = ScoringContract("Query: {query} Document: {document} Relevant:", ("▁false", "▁true"))
    >>> contract.render("who?", "{query} is only text here")
    'Query: who? Document: {query} is only text here Relevant:'
    """

    template: str
    label_pieces: tuple[str, ...]
    append_eos: bool = True
    truncation: str = "suffix_safe"
    max_length: int = 512
    score: str = "logit_difference"
    name: str = "custom"

    def __post_init__(self) -> None:
        if isinstance(self.label_pieces, str) or not all(isinstance(p, str) and p for p in self.label_pieces):
            raise InputError(
                f"label_pieces is {self.label_pieces!r}; expected a tuple such as ('▁false', '▁true')."
            )
        object.__setattr__(self, "label_pieces", tuple(self.label_pieces))
        if not isinstance(self.template, str):
            raise InputError(f"template is {type(self.template).__name__}; expected str.")
        for field, value, options in (
            ("truncation", self.truncation, TRUNCATIONS),
            ("score", self.score, SCORE_KINDS),
        ):
            if value not in options:
                hint = did_you_mean(str(value), options)
                raise InputError(f"{field} is {value!r}.{hint} Expected one of {', '.join(options)}.")
        if not isinstance(self.append_eos, bool):
            raise InputError(f"append_eos is {self.append_eos!r}; expected True or False.")
        if isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 1:
            raise InputError(
                f"max_length is {self.max_length!r}; expected a positive number of tokens, such as 512."
            )
        wanted = 1 if self.score == "single_logit" else 2
        if len(self.label_pieces) != wanted:
            raise InputError(
                f"score {self.score!r} reads {wanted} label piece(s), "
                f"but label_pieces is {self.label_pieces!r}. Give (false, true) for two logits, "
                "or one piece with score='single_logit'."
            )
        if len(set(self.label_pieces)) != wanted:
            raise InputError(f"label_pieces is {self.label_pieces!r}: false and true are the same piece.")
        order = [kind for kind, _ in _split_template(self.template) if kind != "text"]
        if self.truncation == "paper_training":
            if self.append_eos:
                raise InputError("truncation 'paper_training' writes no </s>; set append_eos=False with it.")
            if order != list(_PLACEHOLDERS):
                raise InputError(
                    "truncation 'paper_training' needs {query} before {document}; "
                    f"the template is {self.template!r}."
                )

    def to_dict(self) -> dict[str, Any]:
        """Returns the contract as JSON-ready plain data; `from_dict` reads it back."""
        return {**dataclasses.asdict(self), "label_pieces": list(self.label_pieces)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScoringContract:
        """Builds a contract from `to_dict`'s data.

        Args:
          values: fields by name; `template` and `label_pieces` are required.

        Returns:
          The contract.

        Raises:
          InputError: an unknown or a missing key, or a value out of range.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in fields:
                raise InputError(
                    f"a scoring contract has no {key!r}.{did_you_mean(str(key), fields)} "
                    f"Keys: {', '.join(fields)}."
                )
        for key in ("template", "label_pieces"):
            if key not in values:
                raise InputError(
                    f"the scoring contract lacks {key!r}; it has {', '.join(values) or 'no keys'}."
                )
        return cls(**values)

    def replace(self, **changes: Any) -> ScoringContract:
        """Returns a copy with some fields changed.

        Raises:
          InputError: an unknown field, or a value out of range.
        """
        return self.from_dict({**self.to_dict(), **changes})

    def label_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Looks the label pieces up.

        Args:
          tokenizer: the model's tokenizer.

        Returns:
          One id per label piece, (false, true) or (single,).

        Raises:
          InputError: the vocabulary lacks a piece.
        """
        ids = []
        for piece in self.label_pieces:
            found = tokenizer.piece_to_id(piece)
            if found is None:
                bare = piece.lstrip("▁")
                forms = {
                    f"{mark}{form}" for mark in ("", "▁") for form in (bare, bare.lower(), bare.title())
                } - {""}
                there = sorted(form for form in forms if tokenizer.piece_to_id(form) is not None)
                near = f" It has {', '.join(map(repr, there))}." if there else ""
                raise InputError(
                    f"the vocabulary of {tokenizer.vocab_size} pieces has no {piece!r}, a label piece of the "
                    f"scoring contract {self.name!r}.{near} Use the contract that belongs to this model (see "
                    "inranker_jax.prompts.PRESETS), or label_pieces that its vocabulary holds."
                )
            ids.append(found)
        return tuple(ids)

    def render(self, query: str, document: str) -> str:
        """Puts a pair into the template. Braces inside the texts mean nothing."""
        return "".join(part for _, part in self._pieces(query, document))

    def encode(
        self, tokenizer: Tokenizer, queries: Sequence[str], documents: Sequence[str]
    ) -> list[np.ndarray]:
        """Turns pairs into token ids.

        Ids of a pair that fits are those of the complete rendered text (except under `paper_training`), then
        `</s>`. Each pair depends on itself only.

        Args:
          tokenizer: the model's tokenizer.
          queries: n texts.
          documents: n texts, `documents[i]` beside `queries[i]`.

        Returns:
          n arrays int32 [length], 0 < length <= max_length, without padding.

        Raises:
          InputError: unequal numbers, a text that is not a str or not Unicode, or a template that alone
            exceeds `max_length`.
        """
        if isinstance(queries, str) or isinstance(documents, str):
            raise InputError("encode takes sequences of texts, not one str; wrap it in a list.")
        if len(queries) != len(documents):
            raise InputError(
                f"{len(queries)} queries but {len(documents)} documents; expected one document per query."
            )
        for role, texts in (("query", queries), ("document", documents)):
            for index, text in enumerate(texts):
                check_text(text, f"{role} {index}")
        encode = self._encode_separately if self.truncation == "paper_training" else self._encode_whole
        encoded: list[np.ndarray] = []
        for start in range(0, len(queries), _CHUNK):
            stop = start + _CHUNK
            encoded += encode(tokenizer, queries[start:stop], documents[start:stop])
        return encoded

    def scores(self, logits: np.ndarray | jax.Array) -> Any:
        """Turns label logits into scores; higher is more relevant.

        Args:
          logits: [..., K], K as many as `label_pieces`; numpy or jax.

        Returns:
          [...] scores of the same library and dtype.

        Raises:
          InputError: the last dimension is not K.
        """
        if not hasattr(logits, "shape"):
            logits = np.asarray(logits, np.float32)
        wanted = len(self.label_pieces)
        if logits.ndim < 1 or logits.shape[-1] != wanted:
            raise InputError(
                f"logits have shape {tuple(logits.shape)}; contract {self.name!r} needs [..., {wanted}]."
            )
        if self.score == "single_logit":
            return logits[..., 0]
        difference = logits[..., 1] - logits[..., 0]
        if self.score == "logit_difference":
            return difference
        xp: Any = np
        if not isinstance(logits, np.ndarray):
            import jax.numpy as jnp

            xp = jnp
        # log softmax over two entries: -log(1 + exp(-difference)), without overflow.
        log_probability = -xp.logaddexp(xp.zeros_like(difference), -difference)
        return log_probability if self.score == "log_probability" else xp.exp(log_probability)

    def _pieces(self, query: str, document: str) -> list[tuple[str, str]]:
        texts = {"query": query, "document": document}
        return [(kind, texts.get(kind, part)) for kind, part in _split_template(self.template)]

    def _encode_whole(
        self, tokenizer: Tokenizer, queries: Sequence[str], documents: Sequence[str]
    ) -> list[np.ndarray]:
        """`suffix_safe` and `longest_first`: the complete text is tokenised, then cut."""
        eos = [tokenizer.eos_id] if self.append_eos else []
        room = self.max_length - len(eos)
        rendered = [self.render(query, document) for query, document in zip(queries, documents, strict=True)]
        all_ids = tokenizer.encode_batch(rendered)
        if self.truncation == "suffix_safe":
            # Spans cost time, so only the pairs that must be cut are tokenised with them.
            long = [index for index, ids in enumerate(all_ids) if len(ids) > room]
            spans = tokenizer.encode_with_spans([rendered[index] for index in long])
            for index, (ids, token_spans) in zip(long, spans, strict=True):
                all_ids[index] = self._cut_document(ids, token_spans, queries[index], documents[index], room)
        return [np.array(ids[:room] + eos, np.int32) for ids in all_ids]

    def _cut_document(
        self, ids: list[int], spans: list[tuple[int, int]], query: str, document: str, room: int
    ) -> list[int]:
        """Drops tokens that lie wholly inside the document, then the query, until `room` are left.

        A token that reaches over the edge of a text belongs to the template and stays. Nothing is tokenised
        anew: the ids that remain are the ids of the complete text.
        """
        owned: dict[str, np.ndarray] = {}
        starts, ends = np.array(spans, np.int64).reshape(-1, 2).T
        position = 0
        for kind, part in self._pieces(query, document):
            if kind != "text":
                owned[kind] = np.flatnonzero((starts >= position) & (ends <= position + len(part)))
            position += len(part)
        keep = np.ones(len(ids), bool)
        excess = len(ids) - room
        floor = max(1, self.max_length // _DOCUMENT_FLOOR)
        for kind, least in (("document", floor), ("query", 0), ("document", 0)):
            left = owned[kind][keep[owned[kind]]]
            cut = min(excess, max(0, len(left) - least))
            keep[left[len(left) - cut :]] = False
            excess -= cut
        if excess > 0:
            raise InputError(
                f"the template {self.template!r} alone takes {room + excess} tokens, more than the {room} "
                f"that max_length={self.max_length} leaves. Raise max_length or shorten the template."
            )
        return np.array(ids)[keep].tolist()

    def _encode_separately(
        self, tokenizer: Tokenizer, queries: Sequence[str], documents: Sequence[str]
    ) -> list[np.ndarray]:
        """`paper_training`: three strings a pair, "Query: q", " Document: d", " Relevant:"."""
        parts: list[str] = []
        for query, document in zip(queries, documents, strict=True):
            pieces = self._pieces(query, document)
            after_query = 1 + [kind for kind, _ in pieces].index("query")
            after_document = 1 + [kind for kind, _ in pieces].index("document")
            bounds = (0, after_query, after_document, len(pieces))
            parts += ["".join(text for _, text in pieces[a:b]) for a, b in itertools.pairwise(bounds)]
        ids = tokenizer.encode_batch(parts)
        encoded = []
        for query_ids, document_ids, suffix in zip(ids[::3], ids[1::3], ids[2::3], strict=True):
            if len(suffix) >= self.max_length:
                raise InputError(
                    f"the end of the template {self.template!r} takes {len(suffix)} tokens; max_length is "
                    f"{self.max_length}. Raise max_length or shorten the template."
                )
            document_room = max(0, self.max_length - PAPER_MARGIN - len(query_ids))
            body = (query_ids + document_ids[:document_room])[: self.max_length - len(suffix)]
            encoded.append(np.array(body + suffix, np.int32))
        return encoded


def pad_batch(sequences: Sequence[np.ndarray], length: int, pad_id: int = 0) -> np.ndarray:
    """Stacks sequences of different lengths, padded at the end.

    Args:
      sequences: n arrays int32 [<= length].
      length: tokens a row.
      pad_id: fills the rest; 0 in every T5.

    Returns:
      int32 [n, length].

    Raises:
      InputError: a sequence is longer than `length`.

    >>> pad_batch([np.array([7, 8]), np.array([9])], 3).tolist()
    [[7, 8, 0], [9, 0, 0]]
    """
    batch = np.full((len(sequences), length), pad_id, np.int32)
    for row, sequence in enumerate(sequences):
        if len(sequence) > length:
            raise InputError(f"sequence {row} has {len(sequence)} tokens; expected at most {length}.")
        batch[row, : len(sequence)] = sequence
    return batch


@functools.lru_cache(maxsize=64)
def _split_template(template: str) -> tuple[tuple[str, str], ...]:
    """Splits a template into ("text" | "query" | "document", text) parts, in order, and checks it."""
    expected = "Expected {query} and {document}, each once; write any other brace twice ({{ or }})."
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"template {template!r}: {error}. {expected}") from error
    parts: list[tuple[str, str]] = []
    for text, name, spec, conversion in parsed:
        if text:
            parts.append(("text", text))
        if name is None:
            continue
        if name not in _PLACEHOLDERS or spec or conversion:
            hint = did_you_mean(name.lower(), _PLACEHOLDERS)
            raise InputError(
                f"template {template!r} has the unknown placeholder {{{name}}}.{hint} {expected}"
            )
        parts.append((name, ""))
    for name in _PLACEHOLDERS:
        count = sum(kind == name for kind, _ in parts)
        if count != 1:
            raise InputError(f"template {template!r} has {{{name}}} {count} times. {expected}")
    return tuple(parts)
