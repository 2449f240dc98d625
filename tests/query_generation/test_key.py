"""The key shows nowhere: no message and no file of the command, whatever a server sends back."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from inranker_jax.query_generation import endpoint
from tests.query_generation import server
from tests.query_generation.commands import run, start, write_corpus
from tests.query_generation.server import Behaviour, Handler, serve

KEY = "sk-proj-Abc123Def456Ghi789Jkl012"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_LONGEST_BACK_OFF", 0.02)


def _echo(code: int) -> server.Trouble:
    def send(handler: Handler, _: dict[str, Any]) -> None:
        given = handler.headers["Authorization"]
        body = {
            "error": {"message": f"Incorrect API key provided: {given}", "headers": dict(handler.headers)}
        }
        handler.send_json(code, body, {"Location": f"http://elsewhere/{given}", "X-Key": given})

    return send


def _echo_status_line(handler: Handler, _: dict[str, Any]) -> None:
    handler.wfile.write(f"HTTP/9 {handler.headers['Authorization']} x\r\n\r\n".encode())
    handler.close_connection = True


def _echo_chunk(handler: Handler, _: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(f"{handler.headers['Authorization']}\r\n".encode())
    handler.close_connection = True


def _echo_answer(handler: Handler, request: dict[str, Any]) -> None:
    row = handler.completion(request)
    row["choices"][0]["text"] = f" what is {handler.headers['Authorization']} good for?"
    row["model"] = handler.headers["Authorization"]
    handler.send_json(200, row)


@pytest.mark.parametrize(
    ("troubles", "expected"),
    [
        ([_echo(401)], 2),
        ([_echo(403)], 2),
        ([_echo(404)], 2),
        ([_echo(400)] * 9, 2),
        ([_echo(302)], 2),
        ([_echo(429), _echo(500), None], 0),
        ([None, _echo(400), _echo(422), _echo(413)], 3),
        ([None, *[_echo(500)] * 50], 2),
        ([_echo_status_line, _echo_chunk, _echo_answer, None], 0),
    ],
)
def test_the_key_shows_nowhere(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    troubles: list[Any],
    expected: int,
) -> None:
    """A server sends the key back in every place it has; no message and no file holds six characters of it."""
    monkeypatch.setenv("MY_KEY", KEY)
    corpus, folder = write_corpus(tmp_path, 12), tmp_path / "out"
    with serve(Behaviour(troubles=list(troubles), usage=False)) as behaviour:
        flags = ["--api_key_env=MY_KEY", "--max_retries=3", "--concurrency=2", "--max_failures=4"]
        assert run(corpus, folder / "q.jsonl", f"openai:{behaviour.url}", *flags) == expected
    assert behaviour.headers[0]["Authorization"] == f"Bearer {KEY}", "the server did get it"
    shown = "".join(capfd.readouterr())
    written = "".join(path.read_text("utf-8") for path in folder.rglob("*") if path.is_file())
    assert shown
    assert (folder / "q.generated.jsonl").is_file()
    everything = (shown + written).lower()
    for begin in range(len(KEY) - 5):
        assert KEY[begin : begin + 6].lower() not in everything


def test_no_key_in_the_output_of_a_process(tmp_path: pathlib.Path) -> None:
    """As a user runs it: what reaches the terminal of a refused run, tracebacks included."""
    corpus = write_corpus(tmp_path, 3)
    with serve(Behaviour(troubles=[_echo(500), _echo(401)])) as behaviour:
        process = start(corpus, tmp_path / "q.jsonl", f"openai:{behaviour.url}", key=KEY)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "the server refused the key of --api_key_env" in error
    assert error.count("error:") == 1
    assert "Traceback" not in error
    assert KEY[:6] not in out + error
