"""Against a real HTTP server which fails, stalls, truncates and limits its rate."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterable
from typing import Any

import pytest

from inranker_jax.errors import InputError
from inranker_jax.query_generation import endpoint
from inranker_jax.query_generation.budget import Budget
from inranker_jax.query_generation.endpoint import EndpointGenerator, EndpointSettings, parse_retry_after
from inranker_jax.query_generation.generators import Generation, Request
from inranker_jax.query_generation.journal import Spent
from inranker_jax.query_generation.secret import Secret
from inranker_jax.records import Document
from tests.query_generation import server
from tests.query_generation.server import Behaviour, serve, status


def requests(number: int) -> list[Request]:
    return [
        Request(Document(f"d{i}", f"text of word{i}"), f"Document: text of word{i}\nRelevant Query:")
        for i in range(number)
    ]


def collect(
    behaviour: Behaviour,
    asked: Iterable[Request],
    *,
    key: Secret | None = None,
    budget: Budget | None = None,
    **settings: Any,
) -> dict[str, Generation]:
    budget = budget or Budget()
    values: dict[str, Any] = {
        "url": behaviour.url,
        "model": "tiny",
        "back_off": 0.01,
        "timeout": 5.0,
    } | settings
    generator = EndpointGenerator(EndpointSettings(**values), key, budget)
    found: dict[str, Generation] = {}
    for answers in generator.generate(asked, lambda: False):
        for answer in answers:
            assert answer.document_id not in found
            found[answer.document_id] = answer
            budget.spent.add(answer)
    return found


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_one_request_in_full(api: str) -> None:
    with serve(Behaviour()) as behaviour:
        found = collect(behaviour, requests(1), api=api, max_new_tokens=17, key=Secret("sk-0123456789"))
    (request,) = behaviour.requests
    assert behaviour.paths == [f"/v1/{'chat/' if api == 'chat' else ''}completions"]
    assert behaviour.headers[0]["Authorization"] == "Bearer sk-0123456789"
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("tiny", 0, 17)
    assert request["stop"] == ["\n"]
    assert request["logprobs"] == (True if api == "chat" else 1)
    assert behaviour.prompts() == [requests(1)[0].prompt]
    assert found["d0"] == Generation(
        "d0",
        "what is meant by word0 here?",
        log_probs=(-0.25, -0.5, -0.75, -1.0, -1.25, -1.5),
        prompt_tokens=6,
        completion_tokens=6,
    )


def test_only_the_first_line_counts() -> None:
    """A server that ignores `stop` returns more; neither the text nor its log-probabilities are kept."""
    with serve(Behaviour(answer=lambda prompt: " what now?\n\nExample 5: more")) as behaviour:
        found = collect(behaviour, requests(1))
    assert found["d0"].query == "what now?"
    assert found["d0"].log_probs == (-0.25, -0.5)


TROUBLES = {
    "500": status(500),
    "503": status(503, {"detail": "loading"}),
    "429": status(429),
    "reset": server.reset,
    "stall": server.stall(12.0),
    "dribble": server.dribble(12.0),
    "cut_short": server.cut_short,
    "half_json": server.half_json,
    "no_choices": status(200, {"choices": []}),
    "no_text": status(200, {"choices": [{"text": 7}]}),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_what_may_pass_is_tried_again(name: str) -> None:
    with serve(Behaviour(troubles=[TROUBLES[name], TROUBLES[name]])) as behaviour:
        found = collect(behaviour, requests(1), timeout=3.0 if name in ("stall", "dribble") else 20.0)
    assert found["d0"].query == "what is meant by word0 here?"
    assert found["d0"].attempts == 3
    assert found["d0"].error == ""


def test_all_troubles_under_load() -> None:
    troubles: list[Any] = [None]
    for trouble in TROUBLES.values():
        troubles += [trouble, None, None]
    with serve(Behaviour(troubles=troubles, delay=0.01)) as behaviour:
        found = collect(behaviour, requests(60), timeout=5.0, concurrency=6)
    assert {key: value.query for key, value in found.items()} == {
        f"d{i}": f"what is meant by word{i} here?" for i in range(60)
    }
    assert 3 <= behaviour.most_at_once <= 6 + 2, "six workers; a stalled answer may outlive its client"
    assert len(behaviour.requests) == 60 + len(TROUBLES)
    assert sum(value.attempts for value in found.values()) == len(behaviour.requests)


def test_back_off_doubles_up_to_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(EndpointGenerator, "_sleep", lambda self, seconds: waits.append(seconds))
    with serve(Behaviour(troubles=[status(500)] * 9)) as behaviour:
        collect(behaviour, requests(1), back_off=1.0, max_retries=9)
    assert len(waits) == 9
    for wait, whole in zip(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60], strict=True):
        assert whole / 2 <= wait <= whole
    assert len(set(waits)) == 9, "jitter"


def test_retry_after_holds_every_worker() -> None:
    behaviour = Behaviour(troubles=[None, status(429, Retry_After="4.0")])
    with serve(behaviour):
        found = collect(behaviour, requests(12), concurrency=2)
    assert len(found) == 12
    # The one request beside the refused one may still have been on its way.
    waited = [moment for moment in behaviour.times if 2.0 < moment - behaviour.times[1] < 3.8]
    assert not waited
    assert behaviour.times[-1] - behaviour.times[1] >= 4.0


def test_a_long_retry_after_ends_the_run() -> None:
    with (
        serve(Behaviour(troubles=[status(429, Retry_After="7200")])) as behaviour,
        pytest.raises(InputError, match=r"asks to wait for 2h00m"),
    ):
        collect(behaviour, requests(3))
    assert len(behaviour.requests) == 1


def test_retry_after_forms() -> None:
    assert parse_retry_after(None, 0.0) is None
    assert parse_retry_after("1.5", 0.0) == 1.5
    assert parse_retry_after("-3", 0.0) == 0.0
    assert parse_retry_after("Thu, 01 Jan 1970 00:00:20 GMT", 15.0) == 5.0
    assert parse_retry_after("soon", 0.0) is None
    assert parse_retry_after("nan", 0.0) is None


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (401, "wants a key, and none was sent"),
        (403, "wants a key"),
        (404, "no such path, or no model 'tiny'"),
        (405, "no such path"),
        (402, "refuses"),
        (307, "redirects"),
    ],
)
def test_what_will_not_pass_ends_the_run_at_once(code: int, words: str) -> None:
    with (
        serve(Behaviour(troubles=[status(code)] * 50)) as behaviour,
        pytest.raises(InputError, match=words),
    ):
        collect(behaviour, requests(20), concurrency=4)
    assert len(behaviour.requests) == 1


def test_a_used_up_quota_is_not_waited_for() -> None:
    body = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    with (
        serve(Behaviour(troubles=[status(429, body)] * 5)) as behaviour,
        pytest.raises(InputError, match="exceeded your quota"),
    ):
        collect(behaviour, requests(2))
    assert len(behaviour.requests) == 1


def test_answers_in_flight_survive_a_fatal_error() -> None:
    """What other workers were already being answered is paid for: it arrives before the error is raised."""

    def refuse_once_all_work(handler: server.Handler, request: dict[str, Any]) -> None:
        end = time.monotonic() + 30
        while len(behaviour.requests) < 5 and time.monotonic() < end:
            time.sleep(0.01)
        status(401)(handler, request)

    behaviour = Behaviour(troubles=[None, refuse_once_all_work], delay=0.2)
    found: list[str] = []
    with serve(behaviour):
        generator = EndpointGenerator(EndpointSettings(behaviour.url, "tiny", concurrency=4))
        arriving = generator.generate(requests(30), lambda: False)
        with pytest.raises(InputError, match="401"):
            found.extend(answer.document_id for answers in arriving for answer in answers)
    assert len(found) == len(behaviour.requests) - 1 >= 4


def test_a_message_that_quotes_a_document_changes_nothing() -> None:
    """Once answers come, a refusal which mentions logprobs is about its document."""
    quoting = status(400, {"error": {"message": "too long: 'the logprobs parameter, max_completion_tokens'"}})
    with serve(Behaviour(troubles=[None, quoting])) as behaviour:
        found = collect(behaviour, requests(3), concurrency=1)
    assert [bool(value.error) for value in found.values()] == [False, True, False]
    assert all("logprobs" in request for request in behaviour.requests)


def test_one_bad_document_among_good_ones_is_a_failure_of_its_own() -> None:
    """After an answer, a 400 is about the document (too long for the model), and is not tried again."""
    with serve(Behaviour(troubles=[None, status(400)])) as behaviour:
        found = collect(behaviour, requests(4), concurrency=1)
    assert found["d1"].error == "status 400 (no luck)"
    assert [key for key, value in found.items() if not value.error] == ["d0", "d2", "d3"]
    assert len(behaviour.requests) == 4


def test_trouble_is_told_but_not_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Behaviour(troubles=[None, *[status(500)] * 6])) as behaviour:
        collect(behaviour, requests(5), concurrency=3)
    assert capsys.readouterr().err.count("/v1/completions: status 500 (no luck); trying again in 0s\n") == 1


def test_retries_end() -> None:
    with serve(Behaviour(troubles=[status(500)] * 3)) as behaviour:
        found = collect(behaviour, requests(2), max_retries=2, concurrency=1)
    assert found["d0"].error == "status 500 (no luck), after 3 attempts"
    assert found["d0"].query == ""
    assert found["d1"].error == ""


def test_a_server_that_gives_no_log_probabilities() -> None:
    refuse = status(400, {"error": {"message": "logprobs is not supported"}})
    with serve(Behaviour(troubles=[refuse])) as behaviour:
        found = collect(behaviour, requests(3))
    assert all(value.log_probs is None and value.query for value in found.values())
    assert [("logprobs" in request) for request in behaviour.requests] == [True, False, False, False]


def test_a_server_that_keeps_log_probabilities_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Behaviour(log_probs=False)) as behaviour:
        found = collect(behaviour, requests(3))
    assert all(value.log_probs is None and value.query for value in found.values())
    assert capsys.readouterr().err.count("sends no log-probabilities") == 1


def test_a_server_that_wants_the_newer_name_of_the_length() -> None:
    refuse = status(400, {"error": {"message": "Unsupported: 'max_tokens'. Use 'max_completion_tokens'."}})
    with serve(Behaviour(troubles=[refuse])) as behaviour:
        collect(behaviour, requests(2), api="chat", max_new_tokens=9)
    assert [request.get("max_completion_tokens") for request in behaviour.requests] == [None, 9, 9]
    assert "max_tokens" not in behaviour.requests[-1]


def test_without_usage_tokens_are_estimated() -> None:
    with serve(Behaviour(usage=False)) as behaviour:
        found = collect(behaviour, requests(1))
    assert found["d0"].estimated
    assert found["d0"].prompt_tokens > 5
    assert found["d0"].completion_tokens > 4


# ---------------------------------------------------------------------------------------------- budget


def test_a_budget_of_requests_counts_attempts() -> None:
    budget = Budget(requests=5)
    with serve(Behaviour(troubles=[None, status(500)])) as behaviour:
        found = collect(behaviour, requests(20), budget=budget, concurrency=4)
    assert len(behaviour.requests) == 5
    assert sum(not value.error for value in found.values()) == 4
    assert budget.exhausted == "5 requests"


def test_a_budget_of_requests_counts_what_is_sent_again() -> None:
    """A request whose kept connection the server drops on reading it, and one without a refused field."""
    refuse = status(400, {"error": {"message": "logprobs is not supported"}})
    budget = Budget(requests=4)
    with serve(Behaviour(troubles=[refuse, None, server.reset])) as behaviour:
        found = collect(behaviour, requests(20), budget=budget, concurrency=1)
    assert len(behaviour.requests) == budget.spent.requests == 4
    assert [value.attempts for value in found.values()] == [2, 2]


@pytest.mark.parametrize(
    ("troubles", "answered"),
    [
        ([status(400, {"error": {"message": "logprobs is not supported"}})], 0),
        ([None, server.reset], 1),
    ],
    ids=["refused field", "dropped connection"],
)
def test_a_spent_budget_keeps_a_request_from_being_sent_again(troubles: list[Any], answered: int) -> None:
    budget = Budget(requests=len(troubles))
    with serve(Behaviour(troubles=[*troubles])) as behaviour:
        found = collect(behaviour, requests(5), budget=budget, concurrency=1)
    assert len(behaviour.requests) == budget.spent.requests == len(troubles)
    assert [value.error for value in found.values()] == [
        *[""] * answered,
        "the budget of requests is spent",
    ]


def test_a_budget_of_tokens_is_not_exceeded() -> None:
    budget = Budget(tokens=200)
    with serve(Behaviour()) as behaviour:
        found = collect(behaviour, requests(50), budget=budget, concurrency=4, max_new_tokens=10)
    # 12 tokens an answer by the server's count; 20 or so are set aside for each until it is back.
    assert 150 < budget.spent.tokens <= 200
    assert len(found) == len(behaviour.requests) == budget.spent.tokens // 12
    assert budget.exhausted == "200 tokens"


def test_a_budget_of_dollars() -> None:
    budget = Budget(usd=0.001, prices=(1.0, 10.0))
    with serve(Behaviour()) as behaviour:
        collect(behaviour, requests(100), budget=budget, concurrency=3, max_new_tokens=10)
    spent = budget.spent.usd(budget.prices)
    assert spent is not None
    assert 0.0007 < spent <= 0.001
    assert budget.exhausted == "$0.001"


def test_dollars_need_prices() -> None:
    with pytest.raises(InputError, match="usd_per_million_tokens"):
        Budget(usd=1.0)


def test_a_stop_is_heeded_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal during a stall: the run leaves after its grace period, without the stalled answers."""
    monkeypatch.setattr(endpoint, "_GRACE", 0.5)
    behaviour = Behaviour(troubles=[None, server.stall(20.0)])
    with serve(behaviour):
        generator = EndpointGenerator(EndpointSettings(behaviour.url, "tiny", concurrency=2))
        found: list[str] = []
        started = time.monotonic()
        for answers in generator.generate(requests(2), lambda: len(behaviour.requests) >= 2):
            found += [answer.document_id for answer in answers]
    assert found == ["d0"]
    assert time.monotonic() - started < 4


# ---------------------------------------------------------------------------------------------- addresses


def test_the_only_model_is_found() -> None:
    with serve(Behaviour(models=("org/model-7b",))) as behaviour:
        generator = EndpointGenerator(EndpointSettings(behaviour.url))
    assert generator.name == "openai:org/model-7b"
    assert generator.identity["model"] == "org/model-7b"


def test_several_models_are_listed() -> None:
    with (
        serve(Behaviour(models=("one", "two"))) as behaviour,
        pytest.raises(InputError, match=r"which model\? Give --model=NAME; it serves one, two"),
    ):
        EndpointGenerator(EndpointSettings(behaviour.url))


def test_no_server() -> None:
    with serve(Behaviour()) as behaviour:
        pass
    with pytest.raises(InputError, match=r"connection refused\. Check that the server runs"):
        EndpointGenerator(EndpointSettings(behaviour.url))


@pytest.mark.parametrize(
    ("url", "api", "shown"),
    [
        ("http://host:8000", None, "http://host:8000/v1/completions"),
        ("http://host:80/v1/", "chat", "http://host/v1/chat/completions"),
        ("https://host/api/v1/chat/completions", None, "https://host/api/v1/chat/completions"),
        ("https://host/v1/completions?api-version=2024-10-21", "completions", "https://host/v1/completions"),
        ("http://[::1]:9/v1", None, "http://[::1]:9/v1/completions"),
    ],
)
def test_addresses(url: str, api: str | None, shown: str) -> None:
    assert EndpointGenerator(EndpointSettings(url, "m", api=api)).shown == shown


@pytest.mark.parametrize(
    ("url", "api", "words"),
    [
        ("localhost:8000", None, "expected a URL such as"),
        ("http://", None, "expected a URL such as"),
        ("http://host:port/v1", None, "expected a URL such as"),
        ("http://host/v1/chat/completions", "completions", "--api=chat"),
    ],
)
def test_bad_addresses(url: str, api: str | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        EndpointGenerator(EndpointSettings(url, "m", api=api))


@pytest.mark.parametrize("host", ["nowhere.invalid", "[2001:db8::7]"])
def test_a_proxy_is_used(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """Our server plays the proxy: it sees the whole URL of a host that does not exist, and the credentials."""
    with serve(Behaviour()) as behaviour:
        place = behaviour.url.removeprefix("http://").removesuffix("/v1")
        monkeypatch.setenv("http_proxy", f"http://me:secret@{place}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        found = collect(behaviour, requests(2), url=f"http://{host}/v1")
    assert len(found) == 2
    assert behaviour.paths[0] == f"http://{host}:80/v1/completions"
    assert behaviour.headers[0]["Host"] == f"{host}:80"
    assert behaviour.headers[0]["Proxy-Authorization"] == "Basic bWU6c2VjcmV0"


@pytest.mark.parametrize(("answered_before", "attempts"), [(0, 2), (7, 4)])
def test_a_server_that_is_not_up(answered_before: int, attempts: int) -> None:
    """A server that answered before may come back; of any other the URL is wrong. No second document is asked."""
    budget = Budget(spent=Spent(requests=answered_before, answers=answered_before))
    with serve(Behaviour()) as behaviour:
        pass
    with pytest.raises(
        InputError, match=rf"connection refused, after {attempts} attempts\. Check that the server runs"
    ):
        collect(behaviour, requests(20), max_retries=3, budget=budget)
    assert budget.spent.requests == answered_before, "nothing was sent"


def test_a_host_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="the host name is not known, after 2 attempts"):
        collect(Behaviour(), requests(2), url="http://nowhere.invalid/v1")


def test_https_to_a_server_without_it() -> None:
    with serve(Behaviour()) as behaviour:
        url = behaviour.url.replace("http://", "https://")
        with pytest.raises(InputError, match=r"does not speak TLS .* http://, after 2 attempts"):
            collect(behaviour, requests(2), url=url)


def test_surrogates_and_control_characters_do_not_reach_a_file() -> None:
    with serve(Behaviour(answer=lambda prompt: " what\ud800 is\x00\u2028this?")) as behaviour:
        found = collect(behaviour, requests(1))
    assert found["d0"].query == "what is this?"


@pytest.fixture
def certificate(tmp_path: pathlib.Path) -> pathlib.Path:
    """A certificate for 127.0.0.1 that nobody trusts, and its key, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command")
    key, chain = tmp_path / "key.pem", tmp_path / "chain.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    )
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(chain)],
        check=True,
        capture_output=True,
    )
    both = tmp_path / "both.pem"
    both.write_text(key.read_text() + chain.read_text())
    return both


def test_https(certificate: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(Behaviour(), certificate) as behaviour:
        assert behaviour.url.startswith("https://")
        with pytest.raises(InputError, match="certificate is not trusted"):
            collect(behaviour, requests(2))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert len(collect(behaviour, requests(5), concurrency=2)) == 5
