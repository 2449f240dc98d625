"""Does distillation work on real data? A student trained on teacher labels beside the same student untrained.

    python benchmarks/distillation.py --output_dir=outputs/distillation

Trains the tiny student of `distillation.gin` from random initialisation on the teacher's labels for synthetic
queries of SciFact and Cranfield (`../shared/data/teacher`), then reranks BM25's candidates of every collection in
`../shared/data/beir` with it and with its untrained self, and prints one table. No test query, and no document or
query of the other collections, is trained on. Run again, it resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys

from inranker_jax.checkpoints import huggingface, native
from inranker_jax.models import initialisers

ROOT = pathlib.Path(__file__).resolve().parents[1]
TRAINED_ON = ("scifact", "cranfield")
COLLECTIONS = (
    *TRAINED_ON,
    "trec-dl-2019-pool",
    "nfcorpus-stopped",
    "cisi",
    "pira-en",
    "pira-pt",
    "quati-human-pt",
)
SEED = 42  # distil.gin's


def run(*arguments: str, shared: pathlib.Path) -> None:
    """Runs a binary of the package from the checkout, and stops when it fails."""
    environment = {**os.environ, "INRANKER_SHARED_DATA": str(shared)}
    subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, check=True)


def evaluate(checkpoint: pathlib.Path, output: pathlib.Path, shared: pathlib.Path, depth: int) -> dict:
    """Results of a checkpoint on every collection: dataset -> system -> nDCG@10."""
    dl = shared / "beir" / "trec-dl-2019-pool"
    run(
        "inranker_jax.evaluate",
        "--gin_file=gin/eval_beir.gin",
        f"--checkpoint={checkpoint}",
        f"--beir_dir={shared / 'beir'}",
        f"--datasets={','.join(COLLECTIONS)}",
        f"--output_dir={output}",
        f"--depth={depth}",
        f"--runs=trec-dl-2019-pool={dl / 'runs' / 'bm25.top100.trec'}",
        f"--qrels=trec-dl-2019-pool={dl / 'qrels' / 'full-official.tsv'}",
        shared=shared,
    )
    found = {}
    for name in COLLECTIONS:
        systems = json.loads((output / name / "result.json").read_text())["systems"]
        first_stage = systems.get("bm25") or systems["candidates"]
        found[name] = {"bm25": first_stage["ndcg_cut_10"], "model": systems["model"]["ndcg_cut_10"]}
    return found


def table(untrained: dict, trained: dict) -> str:
    """A Markdown table of nDCG@10."""
    lines = [
        "| collection | trained on its documents | untrained student | trained student | BM25 |",
        "|---|---|---|---|---|",
    ]
    for name in COLLECTIONS:
        seen = "yes, with synthetic queries" if name in TRAINED_ON else "no"
        before, after = untrained[name]["model"], trained[name]["model"]
        lines.append(f"| {name} | {seen} | {before:.4f} | {after:.4f} | {trained[name]['bm25']:.4f} |")
    return "\n".join(lines)


def main() -> None:
    """Trains, evaluates twice, prints and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="outputs/distillation", type=pathlib.Path)
    parser.add_argument("--shared", default=ROOT.parent / "shared" / "data", type=pathlib.Path)
    parser.add_argument("--depth", default=50, type=int, help="BM25 candidates that are reranked")
    parser.add_argument("gin", nargs="*", help="gin bindings for training, such as --gin.TRAIN_STEPS=10")
    flags, bindings = parser.parse_known_args()
    output, shared = flags.output_dir.resolve(), flags.shared.resolve()
    if not (shared / "teacher").is_dir():
        sys.exit(f"error: no teacher labels in {shared}. Name the folder with --shared.")

    vocabulary = output / "vocabulary"
    vocabulary.mkdir(parents=True, exist_ok=True)
    (vocabulary / "spiece.model").write_bytes((shared / "vocab" / "t5_spiece.model").read_bytes())
    run(
        "inranker_jax.train",
        "--gin_file=benchmarks/distillation.gin",
        f"--output_dir={output / 'run'}",
        f'--gin.VOCABULARY="{vocabulary}"',
        *bindings,
        *flags.gin,
        shared=shared,
    )
    description, _, tokenizer, _ = native.load_parts(str(output / "run"))
    start = initialisers.mimetic(description.config, SEED)
    huggingface.save(str(output / "untrained"), description.config, start, tokenizer, description.contract)

    untrained = evaluate(output / "untrained", output / "evaluated_untrained", shared, flags.depth)
    trained = evaluate(output / "run", output / "evaluated_trained", shared, flags.depth)
    (output / "table.md").write_text(table(untrained, trained) + "\n")
    print(f"\nnDCG@10, BM25's top {flags.depth} reranked:\n\n{table(untrained, trained)}")


if __name__ == "__main__":
    main()
