"""What the contenders are given: token ids, the same for all, in files that every worker reads."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from .models import VOCABULARY
from .worker import read_arrays, sequences_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
COLLECTIONS = ("scifact", "trec-dl-2019-pool", "cranfield")
SYNTHETIC = "synthetic-mix"
_SEED = 4
_LONGEST = 512
_EOS = 1
# Ids of ordinary pieces: beyond the special ones, below the sentinels.
_FIRST, _LAST = 3, 32000


@dataclasses.dataclass(frozen=True)
class Workload:
    """Pairs as token ids.

    Attributes:
      name: in tables and commands.
      path: the file that `worker.read_arrays` reads.
      lengths: int64 [n], tokens of each pair.
    """

    name: str
    path: pathlib.Path
    lengths: np.ndarray

    @property
    def described(self) -> str:
        """One line about the lengths."""
        low, high = int(self.lengths.min()), int(self.lengths.max())
        span = (
            f"all of {low} tokens"
            if low == high
            else f"{low} to {high} tokens, {self.lengths.mean():.0f} on average"
        )
        return f"{len(self.lengths)} pairs, {span}"


def save(name: str, folder: pathlib.Path, sequences: list[np.ndarray], **extra: np.ndarray) -> Workload:
    """Writes a workload's file."""
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    path = folder / f"{name}.npz"
    arrays: dict[str, Any] = {"ids": np.concatenate(sequences).astype(np.int32), "lengths": lengths, **extra}
    np.savez(path, **arrays)
    return Workload(name, path, lengths)


def random_sequences(lengths: np.ndarray, seed: int = _SEED) -> list[np.ndarray]:
    """Random pieces, each sequence with `</s>` at its end."""
    assert _LAST <= VOCABULARY
    random = np.random.default_rng(seed)
    return [np.append(random.integers(_FIRST, _LAST, n - 1), _EOS).astype(np.int32) for n in lengths]


def collection_sequences(name: str, pairs: int, shared: pathlib.Path) -> list[np.ndarray]:
    """A seeded sample of different (query, document) pairs of a collection, as monoT5 reads them.

    Queries and documents are drawn evenly and apart from each other, so the lengths are the collection's own.
    """
    from inranker_jax.corpora import open_corpus, open_queries_any
    from inranker_jax.prompts import Tokenizer, preset

    folder = shared / "beir" / name
    documents = list(open_corpus(folder).texts().values())
    queries = [query.text for query in open_queries_any(folder).queries()]
    random = np.random.default_rng(_SEED)
    drawn = random.choice(len(documents) * len(queries), 2 * pairs, replace=False)
    tokenizer = Tokenizer.from_sentencepiece(shared / "vocab" / "t5_spiece.model")
    found = preset("monot5").encode(
        tokenizer,
        [queries[number // len(documents)] for number in drawn],
        [documents[number % len(documents)] for number in drawn],
    )
    # Equal pairs are scored once by ours: there must be none.
    different = list({sequence.tobytes(): sequence for sequence in found}.values())
    return different[:pairs]


def make(name: str, pairs: int, folder: pathlib.Path, shared: pathlib.Path) -> Workload:
    """Makes a workload by its name: `fixed-256` (any length), a collection, or `synthetic-mix`.

    Raises:
      SystemExit: there is no workload of that name.
    """
    if name.startswith("fixed-") and name.removeprefix("fixed-").isdigit():
        lengths = np.full(pairs, int(name.removeprefix("fixed-")))
        return save(name, folder, random_sequences(lengths))
    if name == SYNTHETIC:
        # A log-normal law through MS MARCO's quartiles of about 80 and 135 tokens with a query and the template.
        drawn = np.random.default_rng(_SEED).lognormal(4.65, 0.4, pairs)
        return save(name, folder, random_sequences(np.clip(drawn, 16, _LONGEST).astype(np.int64)))
    if name in COLLECTIONS:
        return save(name, folder, collection_sequences(name, pairs, shared))
    raise SystemExit(
        f"error: no workload {name!r}. Expected fixed-LENGTH, {', '.join(COLLECTIONS)} or {SYNTHETIC}."
    )


def head(workload: Workload, pairs: int, name: str) -> Workload:
    """A workload's first pairs, in a file beside its own or, under its own name, in place of it."""
    sequences = sequences_of(read_arrays(str(workload.path)))
    return save(name, workload.path.parent, sequences[:pairs])


def within(workload: Workload, tokens: int) -> Workload:
    """As many of a workload's first pairs as have `tokens` tokens together, at least four of them."""
    pairs = int(np.searchsorted(np.cumsum(workload.lengths), tokens, side="right"))
    return head(workload, max(4, pairs), workload.name)


def labelled(
    workload: Workload, name: str, folder: pathlib.Path, batch_size: int, max_length: int
) -> Workload:
    """The pairs of a workload as batches for training, with random teacher logits."""
    sequences = sequences_of(read_arrays(str(workload.path)))
    teacher = np.random.default_rng(_SEED).normal(0.0, 3.0, (len(sequences), 2)).astype(np.float32)
    sizes = {"batch_size": np.asarray(batch_size), "max_length": np.asarray(max_length)}
    return save(name, folder, sequences, teacher=teacher, **sizes)


def available(names: list[str], shared: pathlib.Path) -> tuple[list[str], str | None]:
    """Leaves out collections that are not on this machine; one synthetic mix takes their place.

    Returns:
      The names, and a message where something was left out.
    """
    missing = [
        name
        for name in names
        if name in COLLECTIONS and not (shared / "beir" / name / "corpus.jsonl").is_file()
    ]
    if not missing:
        return names, None
    kept = [name for name in names if name not in missing]
    kept += [] if SYNTHETIC in kept else [SYNTHETIC]
    return kept, (
        f"{', '.join(missing)}: not below {shared} (--shared); {SYNTHETIC}, a log-normal mix of lengths, "
        "takes their place."
    )
