"""Scores (query, document) pairs and ranks documents with a T5 reranker.

>>> from inranker_jax import Reranker  # doctest: +SKIP
>>> reranker = Reranker.from_pretrained("unicamp-dl/InRanker-small")  # doctest: +SKIP
>>> reranker.rank("who wrote Dom Casmurro?", ["A novel of 1899 by Machado de Assis."])  # doctest: +SKIP

Pairs are sorted by length and cut into calls of a few fixed shapes: `lengths` tokens a row, and as many rows
as make `tokens_per_call`. A call with fewer pairs is filled with dummy rows. So a process compiles at most
one program per length, and long and short documents do not pay for each other.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from inranker_jax.errors import InputError
from inranker_jax.models.config import Compute, T5Config
from inranker_jax.models.t5 import abstract_params, apply, check_params, logical_axes
from inranker_jax.partitioning import batch_sharding, batch_ways, param_shardings, replicated
from inranker_jax.prompts import ScoringContract, Tokenizer, pad_batch, preset
from inranker_jax.prompts.tokenizer import check_text

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from inranker_jax.models.t5 import Params

LENGTHS = (64, 96, 128, 192, 256, 320, 384, 512)
# Tokens a call and device. CPU caches want few (performance.md); accelerators need many to be busy.
_CPU_TOKENS, _ACCELERATOR_TOKENS = 2048, 16384
# Pairs that are sorted together. A stream holds two windows at a time; a list given whole is one window up to
# the larger size, so that equal pairs in it are scored once.
_STREAM_WINDOW, _LIST_WINDOW = 4096, 65536

Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class RankedDocument:
    """One document of a ranking.

    Attributes:
      index: its place in the list that was given, from 0.
      score: the contract's score; higher is more relevant.
      text: the document.
    """

    index: int
    score: float
    text: str


class Reranker:
    """A T5 cross-encoder with its tokenizer and scoring contract.

    A pair's score depends on the pair alone, up to rounding (1e-5 in float32): not on the other pairs, their
    order or number. Equal pairs in one list get the same score to the bit.

    Attributes:
      config: the architecture.
      tokenizer: the model's tokenizer.
      contract: how text becomes ids and logits become scores.
      lengths: the padded lengths in use; the last is the contract's `max_length`.
    """

    def __init__(
        self,
        config: T5Config,
        params: Params,
        tokenizer: Tokenizer,
        contract: ScoringContract,
        *,
        dtype: str = "float32",
        tokens_per_call: int | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Prepares a model that is already in memory.

        Args:
          config: the architecture.
          params: its parameters; left as they are, except for copies in another type or sharding.
          tokenizer: the model's tokenizer.
          contract: the scoring contract the model was trained with.
          dtype: "float32", or "bfloat16" for matrix products of bfloat16 with float32 sums: faster, logits
            differ in the second decimal.
          tokens_per_call: tokens computed at once on each device; 2048 on CPU and 16384 elsewhere by default.
            Less memory with fewer.
          mesh: rows are divided over its `data` and `fsdp` axes, parameters over `fsdp` and `model`. One
            device without. With several processes, all call with the same pairs and all get the scores.

        Raises:
          InputError: the contract's label pieces are not in the vocabulary, parameters of another
            architecture, or an option out of range.
        """
        if tokens_per_call is None:
            platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
            tokens_per_call = _CPU_TOKENS if platform == "cpu" else _ACCELERATOR_TOKENS
        if isinstance(tokens_per_call, bool) or not isinstance(tokens_per_call, int) or tokens_per_call < 1:
            raise InputError(f"tokens_per_call is {tokens_per_call!r}; expected a number such as 2048.")
        self.config = config
        self.tokenizer = tokenizer
        self.contract = contract
        self.lengths = (*(n for n in LENGTHS if n < contract.max_length), contract.max_length)
        self._compute = Compute(dtype=dtype)
        self._tokens_per_call = tokens_per_call
        self._mesh = mesh
        label_ids = contract.label_ids(tokenizer)
        self._forward = _compiled(config, self._compute, label_ids, mesh)
        self._outputs = len(label_ids)
        self._params = self._place(params)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        *,
        contract: ScoringContract | str | None = None,
        dtype: str = "float32",
        tokens_per_call: int | None = None,
        mesh: Mesh | None = None,
    ) -> Reranker:
        """Loads a reranker.

        Args:
          path_or_hub_id: a training output folder or one of its checkpoints, a Hugging Face folder, or a hub
            id.
          contract: a contract or a preset's name; by default the one stored with the model, else the one its
            name is known for.
          dtype: see `Reranker`.
          tokens_per_call: see `Reranker`.
          mesh: see `Reranker`.

        Returns:
          The reranker.

        Raises:
          InputError: no model there, no tokenizer with it, or no contract known for it.
        """
        from inranker_jax.checkpoints import load_model

        # Before the weights, which may take minutes.
        chosen = preset(contract) if isinstance(contract, str) else contract
        loaded = load_model(path_or_hub_id)
        if loaded.tokenizer is None:
            raise InputError(
                f"{path_or_hub_id} has no tokenizer. "
                "Copy tokenizer.json or spiece.model of its base model into it."
            )
        chosen = chosen or loaded.contract
        if chosen is None:
            raise InputError(
                f"{path_or_hub_id} stores no scoring contract, and its name belongs to no known family. "
                "Say how it was trained, for example contract='monot5' (see inranker_jax.prompts.PRESETS)."
            )
        return cls(
            loaded.config,
            loaded.params,
            loaded.tokenizer,
            chosen,
            dtype=dtype,
            tokens_per_call=tokens_per_call,
            mesh=mesh,
        )

    def update_params(self, params: Params) -> None:
        """Replaces the parameters, as validation during training does; nothing is compiled again.

        Raises:
          InputError: parameters of another architecture.
        """
        self._params = self._place(params)

    def logits(self, query: str, documents: Iterable[str]) -> np.ndarray:
        """Raw label logits.

        Args:
          query: one query.
          documents: n documents of any length.

        Returns:
          float32 [n, K] in the order of the contract's label pieces: [false, true], or [single].

        Raises:
          InputError: the query or a document is not a str.
        """
        check_text(query, "query")
        texts = _texts(documents, "documents")
        return self._all_logits([(query, text) for text in texts])

    def scores(self, query: str, documents: Iterable[str]) -> np.ndarray:
        """Scores of documents for one query; higher is more relevant.

        Args:
          query: one query.
          documents: n documents of any length.

        Returns:
          float32 [n], in the order given.

        Raises:
          InputError: the query or a document is not a str.
        """
        return self.contract.scores(self.logits(query, documents))

    def rank(self, query: str, documents: Iterable[str], top_k: int | None = None) -> list[RankedDocument]:
        """Sorts documents by relevance to a query.

        Args:
          query: one query.
          documents: n documents of any length.
          top_k: how many to return; all by default.

        Returns:
          The documents, most relevant first; equal scores in the order given.

        Raises:
          InputError: the query or a document is not a str, or `top_k` is not a positive number.
        """
        check_text(query, "query")
        return self.rank_batch([query], [documents], top_k)[0]

    def rank_batch(
        self, queries: Iterable[str], documents: Iterable[Iterable[str]], top_k: int | None = None
    ) -> list[list[RankedDocument]]:
        """Sorts each query's own documents; faster than one `rank` after another when the lists are short.

        Args:
          queries: m queries.
          documents: m lists of documents, of any lengths.
          top_k: how many to return for each query; all by default.

        Returns:
          m rankings as of `rank`.

        Raises:
          InputError: as `rank`, or unequal numbers of queries and lists.
        """
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise InputError(f"top_k is {top_k!r}; expected a positive number, or None for all documents.")
        queries = _texts(queries, "queries")
        if isinstance(documents, str):
            raise InputError("documents is one str; expected one list of texts per query.")
        lists = [_texts(texts, f"documents of query {i}") for i, texts in enumerate(documents)]
        if len(lists) != len(queries):
            raise InputError(f"{len(queries)} queries but {len(lists)} lists of documents; expected as many.")
        pairs = [(query, text) for query, texts in zip(queries, lists, strict=True) for text in texts]
        scores = self.contract.scores(self._all_logits(pairs))
        rankings, start = [], 0
        for texts in lists:
            own = scores[start : start + len(texts)]
            start += len(texts)
            order = np.argsort(-own, kind="stable")[:top_k]
            rankings.append([RankedDocument(int(i), float(own[i]), texts[i]) for i in order])
        return rankings

    def score_pairs(self, pairs: Iterable[Pair]) -> np.ndarray:
        """Scores any number of pairs; of an iterator, only a few thousand are held at a time.

        Args:
          pairs: n (query, document) pairs.

        Returns:
          float32 [n], in the order given.

        Raises:
          InputError: an item is not a pair of str; the message says which.
        """
        window = _LIST_WINDOW if isinstance(pairs, Sequence) else _STREAM_WINDOW
        parts = [self.contract.scores(logits) for logits in self._logit_windows(pairs, window)]
        return np.concatenate([np.zeros(0, np.float32), *parts])

    def logits_of_pairs(self, pairs: Iterable[Pair]) -> Iterator[np.ndarray]:
        """Raw label logits of any number of pairs, in parts, for callers that write them out as they come.

        Args:
          pairs: (query, document) pairs, read as needed.

        Yields:
          float32 [w, K] for the next w pairs, in the order given.

        Raises:
          InputError: an item is not a pair of str.
        """
        return self._logit_windows(pairs, _STREAM_WINDOW)

    def logits_of_chunks(self, chunks: Iterable[Sequence[Pair]]) -> Iterator[np.ndarray]:
        """Raw label logits, one array for each chunk, whatever its size.

        The pairs of a chunk are sorted and cut into calls by themselves, so a chunk's values do not depend, to
        the bit, on the chunks around it: work that was interrupted can go on at any chunk. One chunk is
        dispatched before the one before is waited for, so devices do not wait for text.

        Args:
          chunks: lists of (query, document) pairs, read as needed, one ahead.

        Yields:
          float32 [len(chunk), K], in the order given.

        Raises:
          InputError: an item is not a pair of str.
        """
        waiting: Callable[[], np.ndarray] | None = None
        first = 0
        for chunk in chunks:
            dispatched = self._dispatch(chunk, first)
            first += len(chunk)
            if waiting is not None:
                yield waiting()
            waiting = dispatched
        if waiting is not None:
            yield waiting()

    def _all_logits(self, pairs: Sequence[Pair]) -> np.ndarray:
        empty = np.zeros((0, self._outputs), np.float32)
        return np.concatenate([empty, *self._logit_windows(pairs, _LIST_WINDOW)])

    def _logit_windows(self, pairs: Iterable[Pair], window: int) -> Iterator[np.ndarray]:
        iterator = iter(pairs)
        return self.logits_of_chunks(iter(lambda: list(itertools.islice(iterator, window)), []))

    def _dispatch(self, pairs: Sequence[Pair], first: int) -> Callable[[], np.ndarray]:
        """Starts the calls for one window; `first` is the number of its first pair, for messages.

        Returns:
          A function that waits for them and gives float32 [len(pairs), K].
        """
        queries, documents = _split_pairs(pairs, first)
        # Equal pairs are computed once. Sorting by content after length makes calls independent of the order.
        members: dict[bytes, list[int]] = {}
        for index, ids in enumerate(self.contract.encode(self.tokenizer, queries, documents)):
            members.setdefault(ids.tobytes(), []).append(index)
        contents = sorted(members, key=lambda content: (-len(content), content))
        sequences = [np.frombuffer(content, np.int32) for content in contents]
        for content, ids in zip(contents, sequences, strict=True):
            if ids.max() >= self.config.vocab_size:
                raise InputError(
                    f"pair {first + members[content][0]} has the token id {ids.max()}, but the model's "
                    f"vocabulary has {self.config.vocab_size}. Use the tokenizer that belongs to this model."
                )
        calls: list[tuple[list[bytes], jax.Array]] = []
        start = 0
        while start < len(sequences):
            length = next(n for n in self.lengths if n >= len(sequences[start]))
            rows = self._rows(length)
            taken = sequences[start : start + rows]
            tokens = pad_batch(taken, length, self.config.pad_token_id)
            # A dummy row repeats the first: all rows then hold ordinary values.
            tokens = np.concatenate([tokens, np.repeat(tokens[:1], rows - len(taken), axis=0)])
            calls.append((contents[start : start + rows], self._call(tokens)))
            start += rows

        def wait() -> np.ndarray:
            logits = np.zeros((len(pairs), self._outputs), np.float32)
            for keys, values in calls:
                for key, row in zip(keys, np.asarray(values), strict=False):
                    logits[members[key]] = row
            bad = np.flatnonzero(~np.isfinite(logits).all(axis=-1))
            if bad.size:
                raise InputError(
                    f"the model gave the logits {logits[bad[0]].tolist()} for pair {first + bad[0]} "
                    f"({bad.size} of {len(pairs)} are not finite). Check the checkpoint's parameters for NaN."
                )
            return logits

        return wait

    def _rows(self, length: int) -> int:
        """Rows of a call: what makes its tokens, on each of the devices that divide a batch."""
        ways = 1 if self._mesh is None else batch_ways(self._mesh)
        return max(1, self._tokens_per_call // length) * ways

    def _call(self, tokens: np.ndarray) -> jax.Array:
        if self._mesh is None:
            return self._forward(self._params, tokens)
        sharding = batch_sharding(self._mesh)
        placed = jax.make_array_from_callback(tokens.shape, sharding, lambda index: tokens[index])
        with jax.set_mesh(self._mesh):
            return self._forward(self._params, placed)

    def _place(self, params: Params) -> Any:
        """Puts parameters on the devices; under bfloat16, kernels are stored as the products read them."""
        check_params(self.config, params)
        narrow = self._compute.dtype == "bfloat16"

        def cast(path: Any, leaf: Any) -> Any:
            is_kernel = path[-1] == jax.tree_util.DictKey("kernel")
            return jnp.asarray(leaf, jnp.bfloat16) if narrow and is_kernel else leaf

        params = jax.tree_util.tree_map_with_path(cast, params)
        if self._mesh is None:
            return jax.tree.map(jnp.asarray, params)
        shardings = param_shardings(self._mesh, logical_axes(self.config), abstract_params(self.config))
        return jax.device_put(params, shardings)


@functools.lru_cache(maxsize=16)
def _compiled(config: T5Config, compute: Compute, label_ids: tuple[int, ...], mesh: Mesh | None) -> Any:
    """One jitted function for all rerankers of an architecture: new parameters do not compile anew."""

    labels: Any = np.array(label_ids, np.int32)  # a constant of the program

    def forward(params: Params, tokens: jax.Array) -> jax.Array:
        return apply(config, params, tokens, labels, compute=compute)

    return jax.jit(forward, out_shardings=None if mesh is None else replicated(mesh))


def _texts(texts: Iterable[str], what: str) -> list[str]:
    """Lists texts and checks each, so that a message can name its place."""
    if isinstance(texts, str | bytes):
        raise InputError(f"{what} is one {type(texts).__name__}; expected a list of texts, such as [text].")
    try:
        listed = list(texts)
    except TypeError:
        raise InputError(f"{what} is {type(texts).__name__}; expected a list of texts.") from None
    name = {"documents": "document", "queries": "query"}.get(what, f"{what}: item")
    for index, text in enumerate(listed):
        check_text(text, f"{name} {index}")
    return listed


def _split_pairs(pairs: Sequence[Pair], first: int) -> tuple[list[str], list[str]]:
    for index, pair in enumerate(pairs, first):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(f"pair {index} is {pair!r:.80}; expected (query, document).")
        check_text(pair[0], f"the query of pair {index}")
        check_text(pair[1], f"the document of pair {index}")
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
