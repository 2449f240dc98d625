"""Throughput of every stage from documents to cached training examples, on this machine.

    python benchmarks/stages.py [--minilm=FOLDER] [--output_dir=outputs/stages]

Runs the commands that a user would type, each in a process of its own, on SciFact (`../shared/data/beir/scifact`), and
prints items, wall seconds (start of the process and loading included) and items a second. The 60M teacher has the
shape of t5-small and random weights; the language model's server answers at once, so that its row is the client's
limit. Nothing is resumed: the output folder must not exist.
"""

from __future__ import annotations

import argparse
import http.server
import itertools
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import jax
import numpy as np

from inranker_jax.checkpoints import huggingface
from inranker_jax.models import T5Config, init_params
from inranker_jax.prompts import Tokenizer, preset

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8}
SAMPLE = 60  # queries whose pairs a neural teacher scores


class Answers(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server that needs no time to think."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Answers a completion request."""
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {"text": f" What is known about item {time.perf_counter_ns()}?", "finish_reason": "stop"}
        body = json.dumps(
            {"choices": [choice], "usage": {"prompt_tokens": 500, "completion_tokens": 9}}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class Bench:
    """Runs commands and keeps a row for each."""

    def __init__(self, output: pathlib.Path) -> None:
        self.rows: list[tuple[str, int, str, float]] = []
        self._log = output / "log.txt"

    def run(self, what: str, unit: str, count: object, *command: str, **environment: str) -> None:
        """Times a command; `count` is a number, or a function called afterwards that counts its output."""
        with self._log.open("a") as log:
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
            )
            seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(f"error: {what} failed; see {self._log}")
        number = count() if callable(count) else int(str(count))
        self.rows.append((what, number, unit, seconds))
        print(
            f"{what:<58} {number:>7,} {unit:<9} {seconds:>7.1f} s {number / seconds:>9.1f} a second",
            flush=True,
        )


def lines(path: pathlib.Path) -> int:
    """Lines of a file."""
    with path.open("rb") as file:
        return sum(1 for _ in file)


def random_teacher(folder: pathlib.Path, vocabulary: pathlib.Path) -> None:
    """A checkpoint of t5-small's shape with random weights."""
    config = T5Config(**SMALL, num_layers=6, num_decoder_layers=6)
    tokenizer = Tokenizer.from_sentencepiece(vocabulary)
    params = jax.tree.map(np.asarray, init_params(config, 0))
    huggingface.save(str(folder), config, params, tokenizer, preset("monot5"))


def main() -> None:
    """Runs all stages and prints a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", default="outputs/stages", type=pathlib.Path)
    parser.add_argument("--shared", default=ROOT.parent / "shared" / "data", type=pathlib.Path)
    parser.add_argument(
        "--minilm", type=pathlib.Path, help="folder of all-MiniLM-L6-v2, for the bi-encoder's row"
    )
    flags = parser.parse_args()
    out = flags.output_dir.resolve()
    if out.exists():
        sys.exit(f"error: {out} exists; remove it, or name another --output_dir.")
    out.mkdir(parents=True)
    corpus = flags.shared.resolve() / "beir" / "scifact"
    source, bench = f"--corpus={corpus}", Bench(out)
    documents = lines(corpus / "corpus.jsonl")
    queries, run, sample = out / "queries.jsonl", out / "run.trec", out / "sample.jsonl"

    generate = ("-m", "inranker_jax.generate_queries", source)
    bench.run(
        "generate_queries: titles",
        "documents",
        documents,
        *generate,
        "--generator=title",
        f"--output={queries}",
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"openai:http://127.0.0.1:{server.server_port}/v1"
        written = out / "answered.jsonl"
        bench.run(
            "generate_queries: HTTP client, a server that answers at once", "queries", lambda: lines(written),
            *generate, f"--generator={url}", "--model=none", "--num_documents=2000", f"--output={written}",
        )  # fmt: skip
        server.shutdown()
    number = lines(queries)
    bench.run(
        "retrieve: index 5,183 documents, search, write 1,000 a query", "queries", number,
        "-m", "inranker_jax.retrieve", source, f"--queries={queries}", f"--index={out / 'index'}", f"--output={run}",
    )  # fmt: skip
    with queries.open() as all_queries:
        sample.write_text("".join(itertools.islice(all_queries, SAMPLE)))
    random_teacher(out / "t5", flags.shared / "vocab" / "t5_spiece.model")
    label = ("-m", "inranker_jax.label", source, f"--candidates={run}")
    few = (*label, f"--queries={sample}")
    bench.run(
        "label: T5 60M, float32",
        "pairs",
        SAMPLE * 10,
        *few,
        f"--teacher={out / 't5'}",
        f"--output_dir={out / 'l32'}",
    )
    bench.run(
        "label: T5 60M, bfloat16", "pairs", SAMPLE * 10, *few,
        f"--teacher=t5:{out / 't5'}?dtype=bfloat16", f"--output_dir={out / 'l16'}",
    )  # fmt: skip
    if flags.minilm:
        teacher = f"--teacher=bi-encoder:{flags.minilm.resolve()}"
        bench.run(
            "label: all-MiniLM-L6-v2", "pairs", SAMPLE * 10, *few, teacher, f"--output_dir={out / 'lmini'}"
        )
    labels = out / "labels"

    def pairs() -> int:
        counts: dict[str, int] = json.loads((labels / "labels.json").read_text())["counts"]
        return counts["pairs"]

    bench.run(
        "label: a TREC run as the teacher (sampling and store alone)", "pairs", pairs, *label, f"--queries={queries}",
        f"--teacher=bm25=run:{run}", f"--output_dir={labels}",
    )  # fmt: skip
    bench.run("verify_labels", "pairs", pairs, "-m", "inranker_jax.verify_labels", f"--labels={labels}")
    read = (
        "from inranker_jax import data; data.import_task_modules(['inranker_jax.tasks.label_folders']);"
        "print(len(data.open_stores('label_folder_lists')[0][0]))"
    )
    bench.run("SeqIO task to training examples, lists", "pairs", pairs, "-c", read, LABEL_FOLDER=str(labels))
    bench.run(
        "SeqIO offline caching, Beam DirectRunner, two workers", "pairs", pairs,
        "-m", "seqio.scripts.cache_tasks_main", "--module_import=inranker_jax.tasks.label_folders",
        "--tasks=^label_folder_lists$", f"--output_cache_dir={out / 'cache'}",
        "--pipeline_options=--runner=DirectRunner,--direct_num_workers=2,--direct_running_mode=multi_processing",
        LABEL_FOLDER=str(labels),
    )  # fmt: skip
    print("\n| stage | items | wall seconds | a second |\n|---|---|---|---|")
    for what, number, unit, seconds in bench.rows:
        print(f"| {what} | {number:,} {unit} | {seconds:.1f} | {number / seconds:.1f} |")


if __name__ == "__main__":
    main()
