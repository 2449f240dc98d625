"""Scores (query, document) pairs and ranks documents with a T5 reranker.

>>> from inranker_jax import Reranker  # doctest: +SKIP
>>> reranker = Reranker.from_pretrained("unicamp-dl/InRanker-small")  # doctest: +SKIP
>>> reranker.rank("who wrote Dom Casmurro?", ["A novel of 1899 by Machado de Assis."])  # doctest: +SKIP

How pairs share the arrays that are computed is a `packing.Layout`: sorted into rows of a few lengths, or several to
a row. Either way calls have a few fixed shapes, so little is compiled, and short documents do not pay for long ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from inranker_jax import compilation_cache, quiet
from inranker_jax.errors import InputError
from inranker_jax.models import trees
from inranker_jax.models.config import Compute, T5Config
from inranker_jax.models.t5 import abstract_params, apply, check_params, logical_axes
from inranker_jax.packing import Layout
from inranker_jax.partitioning import batch_sharding, batch_ways, param_shardings, replicated
from inranker_jax.prompts import ScoringContract, Tokenizer, preset
from inranker_jax.prompts.tokenizer import check_text
from inranker_jax.scoring_calls import Call, Statistics, Window, calls_side_by_side, stream

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from inranker_jax.models.t5 import Params

# Pairs that are laid out together; up to three windows are held at a time.
_WINDOW = 4096

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
      layout: how pairs share rows, with all its settings resolved.
      statistics: calls and tokens computed so far.
    """

    def __init__(
        self,
        config: T5Config,
        params: Params,
        tokenizer: Tokenizer,
        contract: ScoringContract,
        *,
        dtype: str = "float32",
        layout: Layout | str | None = None,
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
          layout: a `packing.Layout`, or the kind of one: "padded", "bucketed" or "packed"; by default "auto",
            what is fastest on the platform. Logits are the same up to rounding.
          tokens_per_call: tokens of one call on each device; by default the layout's. Less memory with fewer. On a
            CPU as many calls run at once as there are cores, at most 8.
          mesh: rows are divided over its `data` and `fsdp` axes, parameters over `fsdp` and `model`. One
            device without. With several processes, all call with the same pairs and all get the scores.

        Raises:
          InputError: the contract's label pieces are not in the vocabulary, parameters of another
            architecture, or an option out of range.
        """
        compilation_cache.enable()
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        wanted = Layout.of(layout)
        if tokens_per_call is not None:
            wanted = dataclasses.replace(wanted, tokens_per_call=tokens_per_call)
        self.config = config
        self.tokenizer = tokenizer
        self.contract = contract
        self.layout = wanted.resolve(platform, contract.max_length)
        self.statistics = Statistics()
        self._compute = Compute(dtype=dtype)
        self._mesh = mesh
        label_ids = contract.label_ids(tokenizer)
        slots = self.layout.slots if self.layout.kind == "packed" else None
        self._forward = _compiled(config, self._compute, label_ids, slots, mesh)
        self._outputs = len(label_ids)
        self._params = self._place(params)
        self._side_by_side = calls_side_by_side(platform) if mesh is None else 1
        self._compiling = threading.Lock()
        self._launched: set[tuple[int, ...]] = set()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        *,
        contract: ScoringContract | str | None = None,
        dtype: str = "float32",
        layout: Layout | str | None = None,
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
          layout: see `Reranker`.
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
        layout = Layout.of(layout)
        quiet.without_a_tpu()
        compilation_cache.enable()
        loaded = load_model(path_or_hub_id, on_host=True)  # no device need hold all of it
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
            layout=layout,
            tokens_per_call=tokens_per_call,
            mesh=mesh,
        )

    @property
    def compilations(self) -> int:
        """How many programs this process holds for rerankers of this architecture, precision and mesh."""
        count: int = self._forward._cache_size()
        return count

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
        if isinstance(pairs, Sequence):
            return self.contract.scores(self._all_logits(pairs))
        parts = [self.contract.scores(logits) for logits in self.logits_of_pairs(pairs)]
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
        iterator = iter(pairs)
        return self.logits_of_chunks(iter(lambda: list(itertools.islice(iterator, _WINDOW)), []))

    def logits_of_chunks(self, chunks: Iterable[Sequence[Pair]]) -> Iterator[np.ndarray]:
        """Raw label logits, one array for each chunk, whatever its size.

        The pairs of a chunk are laid out by themselves, so a chunk's values do not depend, to the bit, on the
        chunks around it: work that was interrupted can go on at any chunk. One chunk is tokenised while the one
        before is computed.

        Args:
          chunks: lists of (query, document) pairs, read as needed, one ahead.

        Yields:
          float32 [len(chunk), K], in the order given.

        Raises:
          InputError: an item is not a pair of str.
        """
        first = 0

        def numbered() -> Iterator[tuple[Sequence[Pair], range]]:
            nonlocal first
            for chunk in chunks:
                numbers = range(first, first + len(chunk))
                first = numbers.stop
                yield chunk, numbers

        return stream(numbered(), self._prepare, self._launcher(), self._side_by_side)

    def _all_logits(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Raw label logits of a whole list, float32 [len(pairs), K].

        Equal pairs are computed once. The others, in the order of their lengths and texts, are dealt to windows like
        cards: each gets long and short ones, and what is in it does not depend on the order of the list.
        """
        places: dict[tuple[str, str], list[int]] = {}
        for index, (query, document) in enumerate(zip(*_split_pairs(pairs, range(len(pairs))), strict=True)):
            places.setdefault((query, document), []).append(index)
        distinct = sorted(places, key=lambda pair: (len(pair[0]) + len(pair[1]), pair))
        count = math.ceil(len(distinct) / _WINDOW)
        dealt = [distinct[start::count] for start in range(count)]
        chunks = ((window, [places[pair][0] for pair in window]) for window in dealt)
        logits = np.zeros((len(pairs), self._outputs), np.float32)
        parts = stream(chunks, self._prepare, self._launcher(), self._side_by_side)
        for window, values in zip(dealt, parts, strict=True):
            members = [places[pair] for pair in window]
            logits[np.concatenate(members)] = np.repeat(values, list(map(len, members)), axis=0)
        return logits

    def _prepare(self, chunk: tuple[Sequence[Pair], Sequence[int]]) -> Window:
        """Tokenises and lays out pairs; the numbers beside them are how the caller counts them."""
        pairs, numbers = chunk
        window = Window(
            self.contract.encode(self.tokenizer, *_split_pairs(pairs, numbers)),
            numbers,
            self._outputs,
            self.layout,
            ways=1 if self._mesh is None else batch_ways(self._mesh),
            pad_id=self.config.pad_token_id,
            vocab_size=self.config.vocab_size,
        )
        for call in window.calls:
            self.statistics.add(call)
        return window

    def _launcher(self) -> Callable[[Call], jax.Array]:
        """Starts calls with the parameters of now, even where they are replaced before a call's turn comes."""
        return functools.partial(self._launch, self._params)

    def _launch(self, params: Any, call: Call) -> jax.Array:
        if self._mesh is None:
            # Of two threads that need the same new program, one compiles it.
            with contextlib.nullcontext() if call.tokens.shape in self._launched else self._compiling:
                output = self._forward(params, call.tokens, call.segment_ids)
                self._launched.add(call.tokens.shape)
        else:
            sharding = batch_sharding(self._mesh)
            placed = [
                None
                if array is None
                else jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
                for array in (call.tokens, call.segment_ids)
            ]
            with jax.set_mesh(self._mesh):
                output = self._forward(params, *placed)
        output.copy_to_host_async()
        return output

    def _place(self, params: Params) -> Any:
        """Puts parameters on the devices; under bfloat16, kernels are stored as the products read them."""
        check_params(self.config, params)

        def cast(path: str, leaf: Any) -> Any:
            if not self._compute.rounds(path):
                return leaf
            # What is on the host is rounded there: devices need no memory for float32, nor one for all of a model.
            return (
                leaf.astype(jnp.bfloat16) if isinstance(leaf, np.ndarray) else jnp.asarray(leaf, jnp.bfloat16)
            )

        flat = trees.flatten(params)
        params = trees.unflatten({path: cast(path, leaf) for path, leaf in flat.items()})
        if self._mesh is None:
            return jax.device_put(params)
        shardings = param_shardings(self._mesh, logical_axes(self.config), abstract_params(self.config))
        return jax.device_put(params, shardings)


@functools.lru_cache(maxsize=16)
def _compiled(
    config: T5Config, compute: Compute, label_ids: tuple[int, ...], slots: int | None, mesh: Mesh | None
) -> Any:
    """One jitted function for all rerankers of an architecture: new parameters do not compile anew."""

    labels: Any = np.array(label_ids, np.int32)  # a constant of the program

    def forward(params: Params, tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        return apply(config, params, tokens, labels, segment_ids=segment_ids, slots=slots, compute=compute)

    return jax.jit(forward, out_shardings=None if mesh is None else replicated(mesh))


def _texts(texts: Iterable[str], what: str) -> list[str]:
    """Lists texts and checks each, so that a message can name its place."""
    if isinstance(texts, str | bytes):
        raise InputError(f"{what} is one {type(texts).__name__}; expected a list of texts, such as [text].")
    if isinstance(texts, Mapping):
        raise InputError(
            f"{what} is a {type(texts).__name__}; expected a list of texts, such as its values()."
        )
    try:
        listed = list(texts)
    except TypeError:
        raise InputError(f"{what} is {type(texts).__name__}; expected a list of texts.") from None
    name = {"documents": "document", "queries": "query"}.get(what, f"{what}: item")
    for index, text in enumerate(listed):
        check_text(text, f"{name} {index}")
    return listed


def _split_pairs(pairs: Sequence[Pair], numbers: Sequence[int]) -> tuple[list[str], list[str]]:
    for number, pair in zip(numbers, pairs, strict=True):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(f"pair {number} is {pair!r:.80}; expected (query, document).")
        check_text(pair[0], f"the query of pair {number}")
        check_text(pair[1], f"the document of pair {number}")
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
