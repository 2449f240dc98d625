"""Queries a second of `generate_queries`, apart from the language model's own time.

    python benchmarks/query_generation.py [--documents=5000] [--delay=0.25] [--concurrency=8,64,256]

A server in a process of its own answers every prompt after `--delay` seconds with a constant, so `concurrency / delay`
is what a perfect client would reach; below it, the client (or the benchmark's server, on the same cores) is the limit.
The CPU time is the command's alone. `title` has no server: it is the time of reading, sampling, journal and output.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection

ANSWER = {
    "choices": [
        {
            "text": " what does this document say?",
            "finish_reason": "stop",
            "logprobs": {
                "tokens": [" what", " does", " this", " document", " say", "?"],
                "token_logprobs": [-0.5] * 6,
            },
        }
    ],
    "usage": {"prompt_tokens": 400, "completion_tokens": 6},
}


class Server(ThreadingHTTPServer):
    """Accepts as many connections at once as the client opens."""

    request_queue_size = 1024
    daemon_threads = True


def serve(delay: float, port: Connection) -> None:
    """Answers prompts for ever, and tells its port."""
    body = json.dumps(ANSWER).encode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            """Keeps quiet."""

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(delay)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = Server(("127.0.0.1", 0), Handler)
    port.send(server.server_address[1])
    server.serve_forever()


def write_corpus(path: pathlib.Path, documents: int) -> None:
    """Documents of 56 words, MS MARCO's mean, of a Zipf-like vocabulary."""
    chance = random.Random(0)
    vocabulary = [f"w{number}" for number in range(20_000)]
    weights = [1 / (rank + 2.7) for rank in range(len(vocabulary))]
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            file.write(f"{number}\t{' '.join(chance.choices(vocabulary, weights, k=56))}\n")


def measure(corpus: pathlib.Path, folder: pathlib.Path, *flags: str) -> tuple[float, float]:
    """Runs the command; returns its wall and CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    own = [
        f"--corpus={corpus}",
        f"--output={folder / 'queries.jsonl'}",
        "--keep_duplicates",
        "--num_documents=0",
    ]
    subprocess.run(
        [sys.executable, "-m", "inranker_jax.generate_queries", *own, *flags],
        check=True,
        capture_output=True,
        cwd=pathlib.Path(__file__).resolve().parents[1],
    )
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--documents", type=int, default=5000)
    parser.add_argument(
        "--delay", type=float, default=0.25, help="seconds that the server takes for an answer"
    )
    parser.add_argument("--concurrency", default="8,64,256")
    flags = parser.parse_args()
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(flags.delay, there), daemon=True
    )
    server.start()
    url = f"http://127.0.0.1:{here.recv()}/v1"
    print(f"{flags.documents} documents, {os.cpu_count()} cores, the server takes {flags.delay:g} s")
    print(f"{'generator':24}{'queries/s':>12}{'perfect client':>16}{'CPU ms a query':>16}")
    try:
        with tempfile.TemporaryDirectory() as name:
            corpus = pathlib.Path(name, "corpus.tsv")
            write_corpus(corpus, flags.documents)
            rows: list[tuple[str, float, list[str]]] = [("title", float("inf"), ["--generator=title"])]
            for concurrency in map(int, flags.concurrency.split(",")):
                own = [f"--generator=openai:{url}", "--model=constant", f"--concurrency={concurrency}"]
                rows.append((f"openai, {concurrency} in flight", concurrency / flags.delay, own))
            for title, perfect, own in rows:
                with tempfile.TemporaryDirectory() as folder:
                    wall, cpu = measure(corpus, pathlib.Path(folder), *own)
                ideal = f"{perfect:.0f}" if perfect < float("inf") else "-"
                per_query = 1000 * cpu / flags.documents
                print(f"{title:24}{flags.documents / wall:>12.0f}{ideal:>16}{per_query:>16.2f}", flush=True)
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
