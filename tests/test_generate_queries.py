"""The command: files, resume, budget, signals, filters."""

from __future__ import annotations

import gzip
import json
import pathlib
import random
import signal
import subprocess
import time
from typing import Any

import pytest

from inranker_jax import corpora
from inranker_jax.corpora import inpars
from inranker_jax.query_generation import endpoint
from inranker_jax.query_generation.templates import open_template
from inranker_jax.records import write_run
from tests.query_generation import server, tiny_model
from tests.query_generation.commands import read, report, run, start, write_corpus
from tests.query_generation.server import Behaviour, serve, status

KEY = "sk-proj-Abc123Def456Ghi789Jkl012"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_LONGEST_BACK_OFF", 0.02)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


# ---------------------------------------------------------------------------------------------- files


def test_rows_are_those_of_the_inpars_toolkit(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, output = write_corpus(tmp_path), tmp_path / "out" / "queries.jsonl"
    with serve(Behaviour()) as behaviour:
        assert run(corpus, output, f"openai:{behaviour.url}", "--num_documents=0", "--concurrency=5") == 0
    rows = read(output)
    assert [row["doc_id"] for row in rows] == [f"d{i}" for i in range(40)]
    assert list(rows[0]) == [
        "doc_id", "text", "query", "log_probs", "prompt_text", "fewshot_examples", "query_id", "generator",
    ]  # fmt: skip
    first = rows[0]
    assert first["text"] == "Title of number 0 This is text number0. It goes on about word0"
    assert first["query"] == "what is meant by word0 here?"
    assert first["log_probs"] == [-0.25, -0.5, -0.75, -1.0, -1.25, -1.5]
    assert first["prompt_text"] == open_template("inpars").render(first["text"])
    assert first["query_id"] == inpars.query_id("d0", first["query"])
    assert first["generator"] == "openai:tiny"
    # Our own reader takes it, as queries with their positives.
    queries = corpora.open_queries_any(output)
    assert queries.format == "inpars"
    assert next(iter(queries.queries())).id == first["query_id"]
    assert (queries.positives or {})[first["query_id"]] == ["d0"]
    captured = capsys.readouterr()
    assert "written\t40\n" in captured.out
    assert "queries/s" in captured.err


def test_the_same_bytes_whatever_the_order_of_answers(tmp_path: pathlib.Path) -> None:
    corpus = write_corpus(tmp_path)
    outputs = []
    for name, concurrency in (("one", 1), ("many", 9)):
        slow = {f"word{i}": random.Random(i).uniform(0, 0.03) for i in range(40)}

        def answer(prompt: str, slow: dict[str, float] = slow) -> str:
            text = server.answer_of(prompt)
            time.sleep(slow[text.split()[-2]])
            return text

        output = tmp_path / f"{name}.jsonl"
        with serve(Behaviour(answer=answer)) as behaviour:
            assert run(corpus, output, f"openai:{behaviour.url}", f"--concurrency={concurrency}") == 0
        outputs.append(output.read_bytes())
    assert outputs[0] == outputs[1]
    assert read(tmp_path / "many.generated.jsonl")[1:] != read(tmp_path / "one.generated.jsonl")[1:]


def test_documents_are_cut(tmp_path: pathlib.Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"_id": "d", "text": "many words " * 5000}), encoding="utf-8")
    with serve(Behaviour()) as behaviour:
        assert run(corpus, tmp_path / "q.jsonl", f"openai:{behaviour.url}", "--document_tokens=7") == 0
    assert behaviour.prompts()[0].endswith(
        "\nDocument: many words many words many words many\nRelevant Query:"
    )
    assert len(read(tmp_path / "q.jsonl")[0]["text"]) == len("many words " * 5000) - 1


def test_compressed_output_and_examples(tmp_path: pathlib.Path) -> None:
    corpus, output = write_corpus(tmp_path, 3), tmp_path / "q.jsonl.gz"
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"text": "a text", "query": "a query", "doc_id": "x9"}\n', encoding="utf-8")
    with serve(Behaviour()) as behaviour:
        assert run(corpus, output, f"openai:{behaviour.url}", f"--examples={examples}", "--api=chat") == 0
    rows = [json.loads(line) for line in gzip.decompress(output.read_bytes()).splitlines()]
    assert rows[0]["fewshot_examples"] == ["x9"]
    assert rows[0]["prompt_text"].startswith(
        "Example 1:\nDocument: a text\nRelevant Query: a query\n\nExample 2:"
    )
    assert (tmp_path / "q.generated.jsonl").exists()
    assert (tmp_path / "q.report.json").exists()


def test_titles_are_labelled_as_such(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / "q.jsonl"
    rows = [
        {"_id": "a", "title": "The title of a", "text": "Its text."},
        {"_id": "b", "text": "A first sentence, e.g. this one. And a second."},
        {"_id": "c", "text": "最初の文です。次の文です。"},
        {"_id": "d", "text": "##  1. How C# ranks ##\nIts text. More."},
        {"_id": "e", "text": "#\n\n# The whole heading\n\nIts text."},
        {"_id": "f", "title": "# A marked title", "text": "Its text."},
        {"_id": "g", "text": "#1 is no heading. More."},
    ]
    corpus.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert run(corpus, output, "title") == 0
    found = read(output)
    assert [row["query"] for row in found] == [
        "The title of a", "A first sentence, e.g. this one.", "最初の文です。", "1. How C# ranks",
        "The whole heading", "A marked title", "#1 is no heading.",
    ]  # fmt: skip
    assert {row["generator"] for row in found} == {"title (no language model)"}
    assert report(output)["generator"] == "title (no language model)"
    assert "no language model" in capsys.readouterr().err
    assert found[0]["prompt_text"] == ""
    assert found[0]["log_probs"] == []


def test_a_local_model(tmp_path: pathlib.Path) -> None:
    model = tiny_model.write_model(tmp_path / "model")
    corpus, output = write_corpus(tmp_path, 6), tmp_path / "q.jsonl"
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Document: {document}\nRelevant Query:", encoding="utf-8")
    flags = [
        f"--prompt={prompt}",
        "--max_new_tokens=8",
        "--batch_size=4",
        "--min_query_tokens=0",
        "--device=cpu",
    ]
    assert run(corpus, output, f"local:{model}", *flags) == 0
    rows = read(output)
    assert 1 <= len(rows) <= 6
    assert all(row["log_probs"] and max(row["log_probs"]) <= 0 for row in rows)
    assert report(output)["cost"]["prompt_tokens"] > 0


# ---------------------------------------------------------------------------------------------- resume and budget


def test_nothing_is_asked_twice(tmp_path: pathlib.Path) -> None:
    corpus, output = write_corpus(tmp_path), tmp_path / "q.jsonl"
    with serve(Behaviour()) as behaviour:
        place = f"openai:{behaviour.url}"
        assert run(corpus, output, place, "--num_documents=10") == 0
        assert len(behaviour.requests) == 10
        small = {row["doc_id"] for row in read(output)}
        assert run(corpus, output, place, "--num_documents=25") == 0
        assert len(behaviour.requests) == 25
        assert small < {row["doc_id"] for row in read(output)}
        assert run(corpus, output, place, "--num_documents=10", "--top_k=3") == 0
        assert len(behaviour.requests) == 25
        assert len(read(output)) == 3
        assert len(set(behaviour.prompts())) == 25


def test_a_changed_document_is_asked_again(tmp_path: pathlib.Path) -> None:
    corpus, output = write_corpus(tmp_path, 5), tmp_path / "q.jsonl"
    with serve(Behaviour()) as behaviour:
        assert run(corpus, output, f"openai:{behaviour.url}") == 0
        corpus.write_text(corpus.read_text("utf-8").replace("word3", "other3"), encoding="utf-8")
        assert run(corpus, output, f"openai:{behaviour.url}") == 0
    assert len(behaviour.requests) == 6
    assert [row["query"] for row in read(output)][3] == "what is meant by other3 here?"


def test_other_settings_do_not_mix(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, output = write_corpus(tmp_path, 5), tmp_path / "q.jsonl"
    with serve(Behaviour()) as behaviour:
        assert run(corpus, output, f"openai:{behaviour.url}") == 0
        assert run(corpus, output, f"openai:{behaviour.url}", "--document_tokens=8") == 2
    assert "- document_tokens: 256\n+ document_tokens: 8\n" in capsys.readouterr().err


def test_a_budget_ends_the_run_cleanly(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, output = write_corpus(tmp_path), tmp_path / "q.jsonl"
    with serve(Behaviour()) as behaviour:
        place = f"openai:{behaviour.url}"
        assert run(corpus, output, place, "--budget_requests=12") == 3
        assert len(behaviour.requests) == 12
        assert len(read(output)) == 12
        error = capsys.readouterr().err
        assert "the budget of 12 requests is spent: 12 of 40 documents have an answer" in error
        assert "incomplete: 28 documents of the sample have no answer" in error
        assert "with a larger budget" in error
        found = report(output)
        assert (found["complete"], found["stopped"]) == (False, "the budget of 12 requests is spent")
        assert found["counts"]["unanswered"] == 28
        # The budget is of the journal, not of a session.
        assert run(corpus, output, place, "--budget_requests=12") == 3
        assert len(behaviour.requests) == 12
        assert run(corpus, output, place, "--usd_per_million_tokens=1,2") == 0
        assert len(behaviour.requests) == 40
    found = report(output)
    assert found["complete"]
    cost = found["cost"]
    assert cost["usd"] == pytest.approx((cost["prompt_tokens"] + 2 * cost["completion_tokens"]) / 1e6)
    assert cost["requests"] == 40


def test_failures_are_left_out_and_asked_again(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, output = write_corpus(tmp_path, 8), tmp_path / "q.jsonl"
    flags = ["--max_retries=0", "--concurrency=1"]
    with serve(Behaviour(troubles=[None, status(500), None, status(500)])) as behaviour:
        place = f"openai:{behaviour.url}"
        assert run(corpus, output, place, *flags) == 3
        assert [row["doc_id"] for row in read(output)] == ["d0", "d2", "d4", "d5", "d6", "d7"]
        assert list(report(output)["failed"]) == ["d1", "d3"]
        assert "2 documents of the sample have no answer (some failed)" in capsys.readouterr().err
        assert run(corpus, output, place, *flags) == 0
        assert len(read(output)) == 8
        assert report(output)["failed"] == {}


def test_too_many_failures(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, output = write_corpus(tmp_path), tmp_path / "q.jsonl"
    troubles: list[Any] = [None, None, *[status(503)] * 60]
    with serve(Behaviour(troubles=troubles)) as behaviour:
        flags = ["--max_retries=1", "--concurrency=1", "--max_failures=3"]
        assert run(corpus, output, f"openai:{behaviour.url}", *flags) == 2
        assert len(behaviour.requests) == 2 + 4 * 2
    error = capsys.readouterr().err
    assert "4 documents got no answer; the last was 'd5': status 503 (no luck), after 2 attempts" in error
    assert not output.exists()
    assert len(read(tmp_path / "q.generated.jsonl")) == 1 + 2 + 4


def troubled_by(word: str, trouble: server.Trouble) -> server.Trouble:
    """A server that stumbles over one document, always."""

    def answer(handler: server.Handler, request: dict[str, Any]) -> None:
        if word in request["prompt"].rsplit("Document: ", 1)[-1]:
            trouble(handler, request)
        else:
            handler.send_json(200, handler.completion(request))

    return answer


def asked(behaviour: Behaviour) -> list[str]:
    return [prompt.rsplit("word", 1)[-1].split("\n")[0] for prompt in behaviour.prompts()]


def test_a_document_that_is_always_refused_does_not_keep_others_out(tmp_path: pathlib.Path) -> None:
    """Be it the first of all, the only one that is left, or one of several that are."""
    corpus, output = write_corpus(tmp_path, 4), tmp_path / "q.jsonl"
    refuse = troubled_by("word0", status(400))
    with serve(Behaviour(troubles=[refuse] * 99)) as behaviour:
        place = f"openai:{behaviour.url}"
        assert run(corpus, output, place) == 3
        assert asked(behaviour)[0] == "0"
        assert [row["doc_id"] for row in read(output)] == ["d1", "d2", "d3"]
        assert run(corpus, output, place) == 3
        write_corpus(tmp_path, 6)
        behaviour.requests.clear()
        assert run(corpus, output, place, "--concurrency=1") == 3
        assert asked(behaviour) == ["4", "5", "0"], "what failed before comes last"
    assert [row["doc_id"] for row in read(output)] == ["d1", "d2", "d3", "d4", "d5"]


def test_a_document_that_silences_the_server_does_not_keep_others_out(tmp_path: pathlib.Path) -> None:
    """At first it looks like a server that is not up; the next session asks another document, and then knows."""
    corpus, output = write_corpus(tmp_path, 4), tmp_path / "q.jsonl"
    with serve(Behaviour(troubles=[troubled_by("word0", server.reset)] * 99)) as behaviour:
        place, flags = f"openai:{behaviour.url}", ["--max_retries=1", "--concurrency=1"]
        assert run(corpus, output, place, *flags) == 2
        assert asked(behaviour) == ["0", "0"]
        assert run(corpus, output, place, *flags) == 3
        assert asked(behaviour)[2:5] == ["1", "2", "3"]
        assert run(corpus, output, place, *flags) == 3
    assert [row["doc_id"] for row in read(output)] == ["d1", "d2", "d3"]


def test_a_server_that_refuses_everything(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, output = write_corpus(tmp_path), tmp_path / "q.jsonl"
    with serve(Behaviour(troubles=[status(400)] * 99)) as behaviour:
        assert run(corpus, output, f"openai:{behaviour.url}", "--max_failures=2") == 2
    assert len(behaviour.requests) == 3
    assert "status 400 (no luck). None ever got one: check --model and --api." in capsys.readouterr().err


def wait_for(behaviour: Behaviour, number: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while len(behaviour.requests) < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_again_and_again(tmp_path: pathlib.Path) -> None:
    """SIGKILL at random moments: the output equals that of an uninterrupted run, and little is asked twice."""
    corpus = write_corpus(tmp_path, 120)
    with serve(Behaviour()) as behaviour:
        assert run(corpus, tmp_path / "whole.jsonl", f"openai:{behaviour.url}") == 0
    output = tmp_path / "q.jsonl"
    chance = random.Random(0)
    with serve(Behaviour(delay=0.03)) as behaviour:
        kills = 0
        for number in (9, 30, 55, 80):
            process = start(corpus, output, f"openai:{behaviour.url}", ["--concurrency=4"])
            wait_for(behaviour, number, process)
            time.sleep(chance.uniform(0, 0.05))
            process.kill()
            kills += process.wait() == -signal.SIGKILL
        assert kills == 4
        assert not output.exists()
        process = start(corpus, output, f"openai:{behaviour.url}", ["--concurrency=4"])
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    prompts = behaviour.prompts()
    assert len(set(prompts)) == 120
    # At most the requests in flight, and the answers not yet on disk, are lost by a kill.
    assert len(prompts) <= 120 + 4 * 2 * 4


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(tmp_path: pathlib.Path, number: signal.Signals, expected: int) -> None:
    corpus, output = write_corpus(tmp_path, 60), tmp_path / "q.jsonl"
    with serve(Behaviour(delay=0.05)) as behaviour:
        process = start(corpus, output, f"openai:{behaviour.url}", ["--concurrency=3"])
        wait_for(behaviour, 10, process)
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
        assert process.returncode == expected
        assert "what was finished is kept" in error
        assert "Traceback" not in error
        answered = len(read(tmp_path / "q.generated.jsonl")) - 1
        assert answered == len(behaviour.requests), "answers in flight are waited for"
        assert answered < 60
        assert run(corpus, output, f"openai:{behaviour.url}") == 0
        assert len(behaviour.requests) == 60
    assert len(read(output)) == 60


# ---------------------------------------------------------------------------------------------- filters


def test_filters_on_the_command_line(tmp_path: pathlib.Path) -> None:
    corpus, output = write_corpus(tmp_path, 6), tmp_path / "q.jsonl"
    texts = {
        "word0": "",
        "word1": "too short",
        "word2": "this is text number2",
        "word3": "What fruit is native to Australia?",
        "word4": "what goes on?",
        "word5": "What goes on",
    }
    with serve(Behaviour(answer=lambda prompt: texts[server.answer_of(prompt).split()[-2]])) as behaviour:
        assert run(corpus, output, f"openai:{behaviour.url}", "--filter_copied") == 0
    assert [row["doc_id"] for row in read(output)] == ["d4"]
    counts = report(output)["counts"]
    assert {key: value for key, value in counts.items() if key.startswith("dropped")} == {
        "dropped_empty": 1,
        "dropped_short": 1,
        "dropped_copied": 1,
        "dropped_from_prompt": 1,
        "dropped_duplicate": 1,
    }
    assert counts["written"] == 1
    assert sum(value for key, value in counts.items() if key.startswith("dropped")) + 1 == counts["answered"]


def test_a_teacher_chooses_without_asking_again(tmp_path: pathlib.Path) -> None:
    corpus, output = write_corpus(tmp_path, 6), tmp_path / "q.jsonl"
    with serve(Behaviour()) as behaviour:
        assert run(corpus, output, f"openai:{behaviour.url}") == 0
        scores = {row["query_id"]: {row["doc_id"]: float(i % 4)} for i, row in enumerate(read(output))}
        write_run(tmp_path / "teacher.trec", scores, "teacher")
        chosen = tmp_path / "chosen.jsonl"
        flags = [
            f"--journal={tmp_path / 'q.generated.jsonl'}",
            f"--teacher_labels={tmp_path / 'teacher.trec'}",
            "--teacher_top_k=2",
        ]
        assert run(corpus, chosen, f"openai:{behaviour.url}", *flags) == 0
        assert len(behaviour.requests) == 6
    assert [row["doc_id"] for row in read(chosen)] == ["d2", "d3"]


def test_no_log_probabilities_no_top_k(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, output = write_corpus(tmp_path, 4), tmp_path / "q.jsonl"
    assert run(corpus, output, "title", "--top_k=2") == 2
    assert "rank by a teacher with --teacher_labels" in capsys.readouterr().err
    assert not output.exists()


# ---------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("generator", "flags", "words"),
    [
        ("titel", [], "no kind 'titel'. Did you mean 'title'?"),
        ("http://host/v1", [], "Write --generator=openai:http:"),
        ("openai:", [], "expected openai:URL"),
        ("openai:ftp://host", ["--model=m"], "expected a URL such as"),
        (f"openai:http://me:{KEY}@host/v1", ["--model=m"], "holds a user name or password"),
        (f"openai:https://host/v1?key={KEY}", ["--model=m"], "more than a path after the host"),
        ("title", ["--filter_copied"], "none would be left"),
        ("title", ["--model=m"], "--model belongs to --generator=openai:URL"),
        ("local:m", ["--tokenizer=m"], "--tokenizer belongs to --generator=openai:URL"),
        ("title", ["--num_document=3"], "Did you mean '--num_documents'?"),
        ("title", ["--output=q.tsv"], "ends with .jsonl or .jsonl.gz"),
        ("title", ["--min_document_words=99"], "none of the 4 documents has 99 words"),
        ("title", ["--budget_usd=3"], "--usd_per_million_tokens"),
        ("title", [f"--api_key_env={KEY}"], ""),
        ("openai:http://127.0.0.1:9/v1", [f"--api_key_env={KEY}"], "no environment variable of that name"),
    ],
)
def test_bad_flags(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    generator: str,
    flags: list[str],
    words: str,
) -> None:
    status_found = run(write_corpus(tmp_path, 4), tmp_path / "q.jsonl", generator, *flags)
    error = capsys.readouterr().err
    assert status_found == (2 if words else 0)
    assert words in error
    assert KEY not in error
    assert status_found == 0 or not list(tmp_path.glob("q.*"))


def test_malformed_rows(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, output = write_corpus(tmp_path, 4), tmp_path / "q.jsonl"
    with corpus.open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    assert run(corpus, output, "title") == 2
    assert "corpus.jsonl:5" in capsys.readouterr().err
    assert run(corpus, output, "title", "--skip_malformed") == 0
    assert "left out 1 malformed row" in capsys.readouterr().err
    assert report(output)["corpus"]["malformed"] == {"json": 1}
    assert len(read(output)) == 4
