"""Writes synthetic queries for the documents of a corpus (InPars).

    python -m inranker_jax.generate_queries --corpus=PATH --output=queries.jsonl \\
        --generator=openai:http://localhost:8000/v1 [--model=NAME] [--num_documents=100000] [--top_k=10000]
    python -m inranker_jax.generate_queries --corpus=PATH --output=queries.jsonl --generator=local:MODEL
    python -m inranker_jax.generate_queries --corpus=PATH --output=queries.jsonl --generator=title

Three files: `queries.jsonl` in the keys of the InPars toolkit, `queries.generated.jsonl` (a journal of every answer,
before filters) and `queries.report.json`. Run the same command again to go on after an interruption, and with other
filters to choose again: what is in the journal is not generated again. An API key is read from an environment
variable, and appears in no file and no message.

Exit status: 0 when every document of the sample has an answer; 3 when the budget was spent or some documents got
none, and the files hold the others; 2 for an error; 130 or 143 after a signal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from inranker_jax import corpora
from inranker_jax.errors import InputError
from inranker_jax.flags import Parser, Stopped, positive, run_main
from inranker_jax.interruption import Interruption
from inranker_jax.progress import announce
from inranker_jax.query_generation import pipeline
from inranker_jax.query_generation.budget import Budget
from inranker_jax.query_generation.endpoint import APIS, EndpointGenerator, EndpointSettings
from inranker_jax.query_generation.filters import FilterSettings
from inranker_jax.query_generation.generators import Generator, TitleGenerator, split_spec
from inranker_jax.query_generation.local import LocalGenerator, LocalSettings
from inranker_jax.query_generation.secret import check_url, read_key
from inranker_jax.query_generation.templates import open_template

INCOMPLETE = 3


def natural(text: str) -> int:
    """An argparse type: a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def amount(text: str) -> float:
    """An argparse type: a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def prices(text: str) -> tuple[float, float]:
    """An argparse type: dollars for a million prompt and completion tokens."""
    prompt, comma, completion = text.partition(",")
    values = (float(prompt), float(completion if comma else prompt))
    if not all(0 <= value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: expected PROMPT,COMPLETION in dollars")
    return values


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line.

    Raises:
      InputError: an unknown flag, a missing one, or a value of the wrong type.
    """
    parser = Parser(
        "generate_queries",
        "Write synthetic queries for the documents of a corpus (InPars). Exit status: 0 when every sampled document "
        f"has an answer, {INCOMPLETE} when the budget was spent or some got none (the files hold the others), 2 for "
        "an error, 130 or 143 after a signal.",
    )
    add = parser.add_argument
    add("--corpus", required=True, help="the documents, in any format that `corpora.open_corpus` reads")
    add("--corpus_format", default="auto", help="beir, tsv, jsonl, parquet, ...")
    add("--skip_malformed", action="store_true", help="leave bad rows of the corpus out, and count them")
    add("--output", required=True, help="the queries: a .jsonl or .jsonl.gz")
    add("--journal", help="every answer before filters (default: NAME.generated.jsonl beside the output)")
    add("--generator", required=True, help="openai:URL, local:PATH_OR_HUB_NAME, or title (no language model)")
    add("--num_documents", type=natural, default=100_000, help="documents to sample; 0 for all")
    add("--seed", type=int, default=0, help="of the sample")
    add("--min_document_words", type=natural, default=3, help="documents with fewer words get no query")
    prompt = parser.add_argument_group("prompt")
    add = prompt.add_argument
    add("--prompt", default="inpars", help="'inpars' (the thesis's Figure 9), or a file with {document}")
    add("--examples", help="few-shot examples for {examples}: JSONL with document and query")
    add("--document_tokens", type=positive, default=256, help="where a document is cut")
    add("--max_new_tokens", type=positive, default=64, help="of an answer")
    add(
        "--api",
        choices=APIS,
        help="completions (default) or chat; for local models, chat applies the template",
    )
    server = parser.add_argument_group("openai:URL")
    add = server.add_argument
    add("--model", help="the model's name; may be left out where the server serves one")
    add(
        "--api_key_env", help="name of the environment variable with the key (default: OPENAI_API_KEY if set)"
    )
    add("--api_key_header", default="Authorization", help="another one gets the key without 'Bearer'")
    add(
        "--tokenizer",
        help="counts document tokens: tokenizer.json, folder or hub name (default: an estimate)",
    )
    add("--concurrency", type=positive, default=8, help="requests in flight")
    add("--max_retries", type=natural, default=6, help="further attempts for each prompt")
    add("--timeout", type=amount, default=120.0, help="seconds for one attempt")
    add("--max_failures", type=natural, default=10, help="documents without an answer before giving up")
    local = parser.add_argument_group("local:MODEL")
    add = local.add_argument
    add("--batch_size", type=positive, default=8, help="prompts at a time")
    add("--device", help="cpu, cuda, ... (default: an accelerator where there is one)")
    add("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16 or float16")
    budget = parser.add_argument_group("budget, over all sessions of a journal")
    add = budget.add_argument
    add("--budget_requests", type=positive)
    add("--budget_tokens", type=positive, help="prompt and completion tokens together")
    add("--budget_usd", type=amount)
    add("--usd_per_million_tokens", type=prices, help="PROMPT,COMPLETION; also for the progress line")
    chosen = parser.add_argument_group("filters")
    add = chosen.add_argument
    add("--min_query_tokens", type=natural, default=3, help="fewest words of a query")
    add(
        "--filter_copied", action="store_true", help="drop queries that stand in their document word for word"
    )
    add("--copied_overlap", type=float, default=1.0, help="share of a query's words that makes it a copy")
    add("--keep_duplicates", action="store_true", help="keep queries with the same words")
    add("--top_k", type=positive, help="keep the most probable (mean log-probability); InPars v1 keeps 10000")
    add("--teacher_labels", help="label folder or TREC run with a teacher's scores of the queries")
    add("--teacher", help="which teacher of the label folder")
    add(
        "--teacher_top_k",
        type=positive,
        help="keep those that the teacher scores highest; InPars v2 keeps 10000",
    )
    return parser.parse(argv)


def settings_of(flags: argparse.Namespace) -> pipeline.Settings:
    """The pipeline's settings, from the flags.

    Raises:
      InputError: a flag that contradicts another, or a URL that could hold a key.
    """
    title = flags.generator == "title"
    if title and flags.filter_copied:
        raise InputError(
            "--filter_copied with --generator=title: a title stands in its document, so none would be left."
        )
    kind, place = split_spec(flags.generator)
    if kind == "openai":
        check_url(place)
    for name in ("model", "tokenizer"):
        if getattr(flags, name) is not None and kind != "openai":
            raise InputError(f"--{name} belongs to --generator=openai:URL; {kind} does not read it.")
    return pipeline.Settings(
        num_documents=flags.num_documents or None,
        seed=flags.seed,
        min_document_words=flags.min_document_words,
        document_tokens=flags.document_tokens,
        max_failures=flags.max_failures,
        filters=FilterSettings(
            min_query_tokens=flags.min_query_tokens,
            copied_overlap=flags.copied_overlap if flags.filter_copied else None,
            deduplicate=not flags.keep_duplicates,
            top_k=flags.top_k,
            teacher_scores=flags.teacher_labels,
            teacher=flags.teacher,
            teacher_top_k=flags.teacher_top_k,
        ),
    )


def open_generator(flags: argparse.Namespace, budget: Budget) -> Generator:
    """Opens what `--generator` names.

    Raises:
      InputError: an unknown kind, a bad URL or key, a model that cannot be loaded.
    """
    kind, place = split_spec(flags.generator)
    if kind == "title":
        announce("no language model: every query is its document's title or first sentence")
        return TitleGenerator()
    if kind == "local":
        return LocalGenerator(
            LocalSettings(
                place, flags.api == "chat", flags.batch_size, flags.max_new_tokens, flags.device, flags.dtype
            ),
            budget,
        )
    settings = EndpointSettings(
        url=place,
        model=flags.model,
        api=flags.api,
        concurrency=flags.concurrency,
        max_retries=flags.max_retries,
        timeout=flags.timeout,
        max_new_tokens=flags.max_new_tokens,
        tokenizer=flags.tokenizer,
        key_header=flags.api_key_header,
    )
    return EndpointGenerator(settings, read_key(flags.api_key_env), budget)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses flags, generates, filters, writes. Returns the exit status."""

    def work(interruption: Interruption) -> int:
        flags = parse_flags(argv)
        settings = settings_of(flags)
        paths = pipeline.Paths.beside(flags.output, flags.journal)
        template = open_template(flags.prompt, flags.examples)
        budget = Budget(
            flags.budget_requests, flags.budget_tokens, flags.budget_usd, flags.usd_per_million_tokens
        )
        corpus = corpora.open_corpus(
            flags.corpus, flags.corpus_format, on_malformed="skip" if flags.skip_malformed else "raise"
        )
        outcome = pipeline.run(
            corpus,
            template,
            lambda budget: open_generator(flags, budget),
            paths,
            settings,
            budget,
            stop=lambda: interruption.requested,
            interrupt=Stopped,
        )
        for name, value in outcome.counts.items():
            print(f"{name}\t{value}")
        if flags.skip_malformed:
            announce(corpus.report.summary())
        announce(f"{outcome.written} queries in {paths.output}; every answer in {paths.journal}")
        if outcome.complete:
            return 0
        why = outcome.stopped or "some failed"
        remedy = "The same command with a larger budget" if outcome.stopped else "The same command"
        announce(
            f"incomplete: {outcome.counts['unanswered']} documents of the sample have no answer ({why}). {remedy} "
            "asks for them again."
        )
        return INCOMPLETE

    return run_main(work)


if __name__ == "__main__":
    sys.exit(main())
