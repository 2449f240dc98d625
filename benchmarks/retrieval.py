"""Time and memory of BM25 indexes and searches, at sizes of your choice, and what they say about MS MARCO.

    python benchmarks/retrieval.py --sizes=10000,100000,1000000
    python benchmarks/retrieval.py --corpus=scifact/ --queries=scifact/

Generated passages have 56 words on average, as MS MARCO's, drawn from a Zipf law whose first ranks are English
function words and which bends at rank 10,000, so that 8.8M passages would hold about 40 indexed words each and
3.0M different ones (Anserini's index of MS MARCO: 39.8 and 2.7M). They are written to a TSV collection, which is
then read as any user's is. Building and searching run in processes of their own, so each has its own peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import numpy as np

MSMARCO = 8_841_823
MEAN_WORDS = 56
VOCABULARY = 8_000_000
BEND = 10_000  # the rank from which words get rare faster
QUERY_WORDS = 6
COMMON = (
    "the", "of", "and", "to", "in", "a", "is", "for", "that", "or", "are", "as",
    "it", "with", "you", "on", "be", "by", "your", "this", "from", "an", "can", "at",
    "have", "not", "was", "if", "they", "will", "which", "when", "there", "but", "their", "more",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------- generated text


def texts(lengths: np.ndarray, seed: int) -> Iterator[str]:
    """Yields a text of each length [texts]; frequency 1 / (rank + 2.7), beyond the bend times (rank / bend)^-1.7."""
    random = np.random.default_rng(seed)
    rank = np.arange(VOCABULARY, dtype=np.float64)
    cumulative = np.cumsum((np.minimum(rank, BEND) + 2.7) ** -1.0 * np.maximum(rank / BEND, 1.0) ** -1.7)
    cumulative /= cumulative[-1]
    for first in range(0, len(lengths), 10_000):
        part = lengths[first : first + 10_000]
        ranks = np.searchsorted(cumulative, random.random(int(part.sum()))).tolist()
        begin = 0
        for length in part.tolist():
            yield " ".join(map(word, ranks[begin : begin + length]))
            begin += length


def word(rank: int) -> str:
    """The word at a rank: English function words first, then made-up ones, longer the rarer they are."""
    if rank < len(COMMON):
        return COMMON[rank]
    letters = []
    rank += 26 * 21
    while rank:
        rank, letter = divmod(rank, 21 if len(letters) % 2 else 26)
        letters.append(
            ("bcdfghjklmnpqrstvwxyz" if len(letters) % 2 else "aeioustrnlcdmpgbhfwykvxzjq")[letter]
        )
    return "".join(letters)


def write_collection(folder: pathlib.Path, size: int, num_queries: int) -> None:
    """Writes `collection.tsv` and `queries.tsv`."""
    random = np.random.default_rng(size)
    # MS MARCO's passages: about 20 to 120 words.
    lengths = np.clip(random.gamma(6.0, MEAN_WORDS / 6.0, size), 8, 250).astype(np.int64)
    with open(folder / "collection.tsv", "w", encoding="utf-8") as out:
        for number, text in enumerate(texts(lengths, seed=1)):
            out.write(f"{number}\t{text}\n")
    with open(folder / "queries.tsv", "w", encoding="utf-8") as out:
        for number, text in enumerate(texts(np.full(num_queries, QUERY_WORDS), seed=2)):
            out.write(f"{number}\t{text}\n")


# ---------------------------------------------------------------------------------------------- measured processes


class Memory:
    """Peak memory of this process: all of it, and what is not a memory-mapped file (which can be evicted)."""

    def __init__(self) -> None:
        self.anonymous = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._end.wait(0.05):
            status = pathlib.Path("/proc/self/status").read_text()
            value = int(status.split("RssAnon:")[1].split()[0]) * 1024
            self.anonymous = max(self.anonymous, value)

    def peaks(self) -> dict[str, int]:
        """Bytes."""
        self._end.set()
        self._thread.join()
        return {
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "anonymous": self.anonymous,
        }


def measure_build(corpus_path: str, index: str, language: str) -> dict[str, float]:
    """Builds an index from a corpus into a folder."""
    from inranker_jax.corpora import open_corpus
    from inranker_jax.retrieval import BM25Index

    memory = Memory()
    corpus = open_corpus(corpus_path)
    start = time.perf_counter()
    corpus.fingerprint()  # kept in memory: hashed apart from the build
    hashed = time.perf_counter()
    built = BM25Index.build(corpus.documents(), language, folder=index, corpus=corpus)
    end = time.perf_counter()
    return {
        "documents": len(built.ids),
        "hash_seconds": hashed - start,
        "seconds": end - hashed,
        "words": len(built._postings.vocabulary),
        "pairs": len(built._postings.data),
        "bytes": sum(path.stat().st_size for path in pathlib.Path(index).iterdir()),
        **memory.peaks(),
    }


def measure_search(
    index: str, queries_path: str, threads: int, num_queries: int, depth: int
) -> dict[str, float]:
    """Opens an index and searches it."""
    from inranker_jax.corpora import open_queries_any
    from inranker_jax.retrieval import BM25Index, runs

    memory = Memory()
    queries = list(open_queries_any(queries_path).queries())[:num_queries]
    start = time.perf_counter()
    opened = BM25Index.load(index)
    loaded = time.perf_counter()
    opened.search(queries[:20], depth)  # reads the pages that every search needs
    warm = time.perf_counter()
    found = 0
    with open(os.devnull, "w") as out:
        for query, scores in opened.stream_search(queries, depth, threads=threads):
            out.writelines(runs.run_lines(query, scores, "bm25"))
            found += len(scores)
    end = time.perf_counter()
    return {
        "load_seconds": loaded - start,
        "seconds": end - warm,
        "queries": len(queries),
        "candidates": found,
        **memory.peaks(),
    }


def in_a_process(*arguments: object) -> dict[str, float]:
    """Runs this file again as one measurement."""
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout)
    return result


# ---------------------------------------------------------------------------------------------- table


def measure(corpus: str, queries: str, folder: str, flags: argparse.Namespace) -> dict[str, float]:
    """All measurements of one corpus, as a row."""
    index = os.path.join(folder, "index")
    build = in_a_process("build", corpus, index, flags.language)
    row = {
        "passages": build["documents"],
        "different words": build["words"],
        "pairs": build["pairs"],
        "build s": build["seconds"],
        "passages/s": build["documents"] / build["seconds"],
        "build GiB": build["peak"] / 2**30,
        "of it anonymous": build["anonymous"] / 2**30,
        "index GiB": build["bytes"] / 2**30,
    }
    for threads in sorted({1, flags.threads}):
        search = in_a_process("search", index, queries, threads, flags.queries_per_size, flags.depth)
        row[f"ms/query x{threads}"] = search["seconds"] / search["queries"] * 1000
        row[f"queries/s x{threads}"] = search["queries"] / search["seconds"]
        row["load s"] = search["load_seconds"]
        row["search GiB"] = search["peak"] / 2**30
        row["search anonymous"] = search["anonymous"] / 2**30
        row["candidates/query"] = search["candidates"] / search["queries"]
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def extrapolate(rows: list[dict[str, float]]) -> dict[str, float]:
    """A row for MS MARCO: a straight line through the two largest sizes, rates from the extrapolated times."""
    small, large = rows[-2:]
    distance = (MSMARCO - large["passages"]) / (large["passages"] - small["passages"])
    row = {name: large[name] + (large[name] - small[name]) * distance for name in large}
    row["passages/s"] = MSMARCO / row["build s"]
    for name in [name for name in row if name.startswith("ms/query")]:
        row[name.replace("ms/query", "queries/s")] = 1000 / row[name]
    row["candidates/query"] = large["candidates/query"]
    return row


def table(rows: list[dict[str, float]], names: list[str]) -> str:
    """Rows side by side, one column each."""
    lines = [["", *names]]
    for key in rows[0]:
        lines.append([key, *(f"{row[key]:,.0f}" if row[key] >= 100 else f"{row[key]:.2f}" for row in rows)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def main() -> None:
    """Parses flags, measures, prints."""
    if sys.argv[1:2] == ["--measure"]:
        kind, arguments = sys.argv[2], sys.argv[3:]
        if kind == "write":
            write_collection(pathlib.Path(arguments[0]), int(arguments[1]), int(arguments[2]))
            result: dict[str, float] = {}
        elif kind == "build":
            result = measure_build(*arguments)
        else:
            result = measure_search(arguments[0], arguments[1], *map(int, arguments[2:]))
        print(json.dumps(result))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="10000,100000", help="passages to generate, comma-separated")
    parser.add_argument("--corpus", help="measure this corpus instead of generated ones")
    parser.add_argument("--queries", help="with --corpus")
    parser.add_argument("--language", default="english")
    parser.add_argument("--queries_per_size", type=int, default=500)
    parser.add_argument("--depth", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    flags = parser.parse_args()
    rows, names = [], []
    if flags.corpus:
        with tempfile.TemporaryDirectory() as folder:
            print(table([measure(flags.corpus, flags.queries, folder, flags)], ["measured"]))
        return
    for size in sorted(map(int, flags.sizes.split(","))):
        with tempfile.TemporaryDirectory() as folder:
            in_a_process("write", folder, size, flags.queries_per_size)
            rows.append(measure(f"{folder}/collection.tsv", f"{folder}/queries.tsv", folder, flags))
            names.append(f"{size:,}")
    if len(rows) > 1:
        rows.append(extrapolate(rows))
        names.append("MS MARCO (estimate)")
    print(table(rows, names))
    if len(names) > len(rows) - 1 > 1:
        print(
            f"The last column is not measured: a straight line through {names[-3]} and {names[-2]} passages."
        )


if __name__ == "__main__":
    main()
