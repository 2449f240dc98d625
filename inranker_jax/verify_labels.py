"""Looks through teacher labels before a student is trained on them.

    python -m inranker_jax.verify_labels --labels=DIR --qrels=QRELS --plot=margins.png
    python -m inranker_jax.verify_labels --labels=teacher.tsv --queries=queries.tsv --corpus=collection.tsv
    python -m inranker_jax.verify_labels --labels=nq=nq.jsonl --labels=fiqa=fiqa.jsonl --json=report.json

The report goes to standard output. Exit status: 0 when all is well, 1 for errors in the labels, 2 for a file
or a flag that cannot be used.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence

from inranker_jax import paths
from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.flags import Parser, Stopped, run_main
from inranker_jax.interruption import Interruption
from inranker_jax.labeling.verification import POSITIVES, Verification, verify
from inranker_jax.labeling.verification_report import check_image, plot, text_report
from inranker_jax.labeling.verification_sources import FORMATS, open_sources
from inranker_jax.progress import announce
from inranker_jax.records import atomic_text, read_qrels

_NAMED = re.compile(r"([\w.+-]+)=(.+)")


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command line.

    Raises:
      InputError: a bad flag.
    """
    parser = Parser("verify_labels", "Check teacher labels; exit status 1 where they have errors.")
    add = parser.add_argument
    add(
        "--labels",
        action="append",
        required=True,
        metavar="[NAME=]PATH",
        help="label folder, InRanker TSV or JSONL; may be given several times",
    )
    add("--format", default="auto", help=f"of the labels: {', '.join(FORMATS)}")
    add("--teacher", help="which teacher of a label folder; all of them without")
    for flag, meaning in (
        ("--qrels", "judgments (BEIR or TREC form): the margins' agreement with them is reported"),
        ("--queries", "texts of a TSV's queries, or other texts for a label folder's"),
        ("--corpus", "texts of a TSV's documents, or other texts for a label folder's"),
    ):
        add(flag, action="append", default=[], metavar="[NAME=]PATH", help=meaning)
    add("--queries_format", default="auto", help="see corpora.open_queries_any")
    add("--corpus_format", default="auto", help="see corpora.open_corpus")
    add("--skip_malformed", action="store_true", help="leave out queries and documents that cannot be used")
    add(
        "--positives",
        default="first",
        help=f"{', '.join(POSITIVES)}: each list's first (a label folder's own), those judged relevant, unknown",
    )
    add("--plot", metavar="FILE.png", help="histograms of the margins (.png, .pdf or .svg)")
    add("--json", metavar="FILE", help="all figures and findings")
    return parser.parse(argv)


def named(values: Sequence[str]) -> list[tuple[str, str]]:
    """Names of `[NAME=]PATH`: the given one, else the last part of the path, made distinct.

    >>> named(["nq=a/x.jsonl", "b/fiqa.jsonl.gz", "c/fiqa.jsonl"])
    [('nq', 'a/x.jsonl'), ('fiqa', 'b/fiqa.jsonl.gz'), ('c/fiqa.jsonl', 'c/fiqa.jsonl')]
    """
    found: list[tuple[str, str]] = []
    for value in values:
        match = _NAMED.fullmatch(value)
        if match and not os.path.exists(value):
            name, path = match.groups()
            if name in dict(found):
                raise InputError(f"--labels: two are called {name!r}. Give each a name of its own.")
        else:
            path = value
            last = os.path.basename(path.rstrip("/")) or path
            name = re.sub(r"\.(tsv|jsonl|json|txt)?(\.gz|\.zst)?$", "", last) or last
            name = path if name in dict(found) else name
        found.append((name, path))
    return found


def of_each(flag: str, values: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Which file of `flag` belongs to which labels; one without a name belongs to all that have none.

    Raises:
      InputError: a name that no labels have, or two files for the same.
    """
    own: dict[str, str] = {}
    shared: list[str] = []
    for value in values:
        match = _NAMED.fullmatch(value)
        if not match or os.path.exists(value):
            shared.append(value)
            continue
        name, path = match.groups()
        if name not in names:
            raise InputError(
                f"{flag}={value}: no --labels are called {name!r}.{did_you_mean(name, names)} "
                f"There are {', '.join(names)}."
            )
        if name in own:
            raise InputError(f"{flag}: two files for {name!r}.")
        own[name] = path
    if len(shared) > 1:
        raise InputError(
            f"{flag}={shared[1]}: two files for all labels. Say which is whose: {flag}=NAME=PATH."
        )
    return {**{name: path for name in names for path in shared}, **own}


def verify_all(flags: argparse.Namespace, interruption: Interruption) -> list[Verification]:
    """Verifies everything the flags name, printing each report as it comes.

    Raises:
      InputError: a bad flag or file.
      Stopped: a signal arrived.
    """
    labels = named(flags.labels)
    names = [name for name, _ in labels]
    qrels, queries, corpora = (
        of_each(f"--{flag}", getattr(flags, flag), names) for flag in ("qrels", "queries", "corpus")
    )
    if flags.plot:
        check_image(flags.plot)
    for output in filter(None, (flags.plot, flags.json)):
        paths.check_reachable(output)

    def on_progress(pairs: int) -> None:
        announce(f"{name}: {pairs} pairs read")
        if interruption.requested:
            raise Stopped

    done: list[Verification] = []
    for name, path in labels:
        sources = open_sources(
            path,
            flags.format,
            teacher=flags.teacher,
            queries=queries.get(name),
            documents=corpora.get(name),
            queries_format=flags.queries_format,
            corpus_format=flags.corpus_format,
            on_malformed="skip" if flags.skip_malformed else "raise",
        )
        judgments = read_qrels(qrels[name]) if name in qrels else None
        for source in sources:
            row = f"{name} ({source.teacher})" if len(sources) > 1 else name
            found = verify(source, row, qrels=judgments, positives=flags.positives, on_progress=on_progress)
            print(text_report(found), flush=True)
            done.append(found)
            if interruption.requested:
                raise Stopped
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """Verifies what the command line names. Returns the exit status."""

    def work(interruption: Interruption) -> int:
        flags = parse_flags(argv)
        done = verify_all(flags, interruption)
        if flags.plot:
            plot(done, flags.plot)
        if flags.json:
            with atomic_text(flags.json) as out:
                json.dump({"labels": [found.to_dict() for found in done]}, out, indent=2, allow_nan=False)
                out.write("\n")
        bad = [found.name for found in done if found.errors]
        if len(done) > 1 or bad:
            print(
                f"{len(done) - len(bad)} of {len(done)} ok" + (f"; errors in {', '.join(bad)}" if bad else "")
            )
        return 1 if bad else 0

    return run_main(work)


if __name__ == "__main__":
    sys.exit(main())
