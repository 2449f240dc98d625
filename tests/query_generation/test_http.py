"""One exchange: whole or an error, within its time."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from inranker_jax.query_generation.http import Address, Connection, TransportError
from tests.query_generation import server
from tests.query_generation.server import Behaviour, Handler, serve

BODY = json.dumps({"model": "m", "prompt": "Document: a word\nQuery:"}).encode()


def connect(behaviour: Behaviour, timeout: float = 10.0) -> Connection:
    return Connection(Address.parse(behaviour.url), {}, timeout)


def test_a_connection_is_kept() -> None:
    ports = []

    def note(handler: Handler, request: dict[str, Any]) -> None:
        ports.append(handler.client_address[1])
        handler.send_json(200, handler.completion(request))

    with serve(Behaviour(troubles=[note, note, note])) as behaviour:
        connection = connect(behaviour)
        for _ in range(3):
            assert connection.request("POST", "/completions", BODY).status == 200
        connection.close()
    assert len(set(ports)) == 1


def test_a_kept_connection_that_the_server_closed_is_opened_again() -> None:
    def last(handler: Handler, request: dict[str, Any]) -> None:
        handler.send_json(200, handler.completion(request))
        handler.close_connection = True  # without saying so

    with serve(Behaviour(troubles=[last, last])) as behaviour:
        connection = connect(behaviour)
        for _ in range(3):
            assert connection.request("POST", "/completions", BODY).status == 200
    assert len(behaviour.requests) == 3


def test_a_body_cut_short_is_an_error_even_if_it_is_json() -> None:
    def padded(handler: Handler, _: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "50")
        handler.end_headers()
        handler.wfile.write(b'{"choices": []}')
        handler.close_connection = True

    with (
        serve(Behaviour(troubles=[padded])) as behaviour,
        pytest.raises(TransportError, match="the answer was cut short"),
    ):
        connect(behaviour).request("POST", "/completions", BODY)


@pytest.mark.parametrize("trouble", [server.stall(20.0), server.dribble(20.0)], ids=["stall", "dribble"])
def test_the_timeout_is_of_the_whole_exchange(trouble: server.Trouble) -> None:
    with serve(Behaviour(troubles=[trouble])) as behaviour:
        started = time.monotonic()
        with pytest.raises(TransportError, match=r"no whole answer within 0\.4 s"):
            connect(behaviour, 0.4).request("POST", "/completions", BODY)
        assert 0.3 < time.monotonic() - started < 5


def test_an_endless_body_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inranker_jax.query_generation.http.MAX_BODY", 1000)
    long = Behaviour(answer=lambda prompt: "x" * 5000)
    with serve(long), pytest.raises(TransportError, match="not a whole HTTP answer"):
        connect(long).request("POST", "/completions", BODY)
