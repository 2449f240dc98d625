"""Queries from a server with OpenAI's HTTP interface: vLLM, llama.cpp, TGI, hosted models.

Every prompt is one POST to `/completions` (or `/chat/completions`), greedy, stopped at the line break. Worker threads
keep `concurrency` requests in flight. What may pass is tried again with exponential back-off and jitter: refused and
reset connections, stalls, answers cut short, status 408, 429 and 5xx (`Retry-After` counts, and holds every worker).
What will not pass, a refused key or an unknown path or model, ends the run at once. Other refusals may be about one
document, such as one too long for the model: they are failures of their documents, which the caller counts.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import math
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.progress import announce, clock
from inranker_jax.query_generation import answers
from inranker_jax.query_generation.budget import Budget, BudgetSpent, Tally
from inranker_jax.query_generation.generators import Generation, Request, first_line
from inranker_jax.query_generation.http import Address, Connection, Reply, TransportError
from inranker_jax.query_generation.secret import Secret
from inranker_jax.query_generation.templates import Cutter, cut_by_estimate, estimate_tokens, tokenizer_cutter

APIS = ("completions", "chat")
_PATHS = {"completions": "/completions", "chat": "/chat/completions"}
_RETRIED = frozenset({408, 425, 429, *range(500, 600)}) - {501, 505}
_LONGEST_BACK_OFF = 60.0
_LONGEST_RETRY_AFTER = 900.0
# After a signal or a fatal error, answers that are already paid for may still arrive for this long.
_GRACE = 5.0
_NOTE_SECONDS = 10.0


@dataclass(frozen=True)
class EndpointSettings:
    """How to talk to a server.

    Attributes:
      url: the base, such as `http://localhost:8000/v1`; `/v1` is added to a bare host, and a URL that already ends
        with `/completions` or `/chat/completions` chooses the interface.
      model: None asks the server, which must serve exactly one.
      api: "completions" or "chat".
      concurrency: requests in flight.
      max_retries: further attempts after the first, for each prompt; at most one where a server that never
        answered refuses the connection, is unknown, or fails in TLS.
      timeout: seconds for one attempt.
      max_new_tokens: of an answer.
      tokenizer: counts the tokens of documents (see `templates.tokenizer_cutter`); None estimates.
      key_header: the header of the key; "Authorization" sends "Bearer KEY", another one the key alone.
      back_off: seconds before the first further attempt; doubled each time.
    """

    url: str
    model: str | None = None
    api: str | None = None
    concurrency: int = 8
    max_retries: int = 6
    timeout: float = 120.0
    max_new_tokens: int = 64
    tokenizer: str | None = None
    key_header: str = "Authorization"
    back_off: float = 1.0


class _Abandoned(Exception):
    """The run is ending; nothing was sent for this prompt, or its attempt failed."""


class EndpointGenerator:
    """Writes queries through an OpenAI-compatible server.

    Args:
      settings: see there.
      key: sent with every request, shown nowhere.
      budget: what may be spent.

    Raises:
      InputError: a bad URL; no model is named and the server does not serve exactly one; the server refuses.
    """

    prompted = True

    def __init__(
        self, settings: EndpointSettings, key: Secret | None = None, budget: Budget | None = None
    ) -> None:
        self._settings = settings
        self._key = key or Secret("")
        self._headers = {"User-Agent": "inranker_jax"}
        if key is not None:
            bearer = settings.key_header.lower() == "authorization"
            self._headers[settings.key_header] = f"Bearer {key.reveal()}" if bearer else key.reveal()
        self._has_key = key is not None
        self._budget = budget or Budget()
        self._address, self._api = _address(settings)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._resume_at = 0.0
        self._note_after = 0.0
        self._fatal: InputError | None = None
        self._answered_once = False
        self._fields: dict[str, Any] = {"logprobs": True if self._api == "chat" else 1}
        self._length_field = "max_tokens"
        self._cutter: Cutter = tokenizer_cutter(settings.tokenizer) if settings.tokenizer else cut_by_estimate
        model = settings.model or self._only_model()
        self._model = model
        self.name = f"openai:{model}"
        self.identity: dict[str, Any] = {
            "kind": "openai",
            "model": model,
            "api": self._api,
            "max_new_tokens": settings.max_new_tokens,
            "document_tokens_counted_by": settings.tokenizer or "estimate",
        }

    @property
    def shown(self) -> str:
        """The endpoint as messages and files show it."""
        return f"{self._address.shown}{_PATHS[self._api]}"

    def cut(self, text: str, limit: int) -> str:
        """Cuts a document after `limit` tokens, of `settings.tokenizer` or estimated."""
        return self._cutter(text, limit)

    def close(self) -> None:
        """Lets the worker threads end."""
        self._stopping.set()

    # ------------------------------------------------------------------------------------ the main thread

    def generate(self, requests: Iterable[Request], stop: Callable[[], bool]) -> Iterator[list[Generation]]:
        """Yields answers as they arrive, in lists of those that arrived together.

        The caller has added a list to `budget.spent` when it asks for the next. Until the first answer there is one
        request in flight, so that a server which refuses everything is asked once.

        Raises:
          InputError: the server refuses in a way that no further attempt changes.
        """
        inbox: queue.SimpleQueue[tuple[Request, int] | None] = queue.SimpleQueue()
        outbox: queue.SimpleQueue[tuple[Generation | None, int]] = queue.SimpleQueue()
        # Daemons: a stalled server must not keep the process from leaving.
        for number in range(self._settings.concurrency):
            threading.Thread(
                target=self._work, args=(inbox, outbox), name=f"endpoint-{number}", daemon=True
            ).start()
        try:
            yield from self._dispatch(iter(requests), inbox, outbox, stop)
        finally:
            self._stopping.set()
            for _ in range(self._settings.concurrency):
                inbox.put(None)
        if self._fatal is not None:
            raise self._fatal

    def _dispatch(
        self,
        requests: Iterator[Request],
        inbox: queue.SimpleQueue[Any],
        outbox: queue.SimpleQueue[tuple[Generation | None, int]],
        stop: Callable[[], bool],
    ) -> Iterator[list[Generation]]:
        held: tuple[Request, int] | None = None
        in_flight, answered, more = 0, False, True
        leave_at = float("inf")
        while more or in_flight:
            ending = self._fatal is not None or stop()
            if ending and leave_at == float("inf"):
                leave_at = time.monotonic() + _GRACE
                self._stopping.set()
            more = more and not ending
            while more and in_flight < (self._settings.concurrency if answered else 1):
                if held is None:
                    request = next(requests, None)
                    if request is None:
                        more = False
                        break
                    held = (request, estimate_tokens(request.prompt))
                if not self._budget.reserve(held[1], self._settings.max_new_tokens):
                    # What is in flight may cost less than was set aside for it: look again when it is back.
                    more = in_flight > 0
                    break
                inbox.put(held)
                held, in_flight = None, in_flight + 1
            if not in_flight:
                break
            arrived = _take_all(outbox, wait=0.2)
            if arrived:
                in_flight -= len(arrived)
                found = [generation for generation, _ in arrived if generation is not None]
                answered = answered or any(not generation.error for generation in found)
                yield found
                for generation, estimate in arrived:
                    attempts = generation.attempts if generation else 1
                    self._budget.release(estimate, self._settings.max_new_tokens, attempts)
            elif time.monotonic() > leave_at:
                return

    # ------------------------------------------------------------------------------------ worker threads

    def _work(self, inbox: queue.SimpleQueue[Any], outbox: queue.SimpleQueue[Any]) -> None:
        connection = Connection(self._address, self._headers, self._settings.timeout)
        try:
            while (item := inbox.get()) is not None:
                request, estimate = item
                generation: Generation | None = None
                try:
                    generation = self._answer(connection, request, estimate, Tally(self._budget))
                except _Abandoned:
                    pass
                except InputError as error:
                    self._fatal = self._fatal or error
                except (
                    Exception
                ) as error:  # a defect here must end the run, not hang it; nothing of it is shown
                    self._fatal = self._fatal or InputError(
                        f"{self.shown}: {type(error).__name__} in a worker"
                    )
                outbox.put((generation, estimate))
        finally:
            connection.close()

    def _answer(self, connection: Connection, request: Request, estimate: int, tally: Tally) -> Generation:
        def failure(why: str) -> Generation:
            return Generation(request.document.id, "", attempts=tally.sent, error=why)

        reason = ""
        for attempt in range(self._settings.max_retries + 1):
            self._wait_for_turn()
            delay: float | None = None
            try:
                tally.take()
                reply = self._post(connection, request.prompt, tally)
            except BudgetSpent:
                return failure("the budget of requests is spent")
            except TransportError as error:
                reason = str(error)
                if error.hopeless:
                    raise InputError(f"{self.shown}: {reason}.") from None
                # A server that never answered and turns us away is no busy one: mostly its URL is wrong.
                known = self._answered_once or self._budget.spent.answers
                last = 1 if error.turned_away and not known else self._settings.max_retries
                if attempt >= min(last, self._settings.max_retries):
                    self._judge_silence(error, tally.sent)
            else:
                if reply.status == 200:
                    try:
                        return self._parse(reply, request, estimate, tally.sent)
                    except answers.BadAnswer as error:
                        reason = str(error)
                elif reply.status in _RETRIED and not answers.is_out_of_credit(reply.body):
                    reason = self._describe(reply)
                    delay = self._retry_after(reply)
                else:
                    self._raise_if_hopeless(reply)
                    return failure(self._describe(reply))
            if attempt < self._settings.max_retries:
                delay = self._delay(attempt) if delay is None else delay + random.uniform(0, 0.5)
                self._note(reason, delay)
                self._sleep(delay)
        return failure(f"{reason}, after {tally.sent} attempts")

    def _judge_silence(self, error: TransportError, attempts: int) -> None:
        """Ends the run when the server is not up, which is not to be told from a first document that silences it."""
        if self._answered_once or (error.reached and self._budget.spent.answers):
            return
        fatal = InputError(
            f"{self.shown}: {error}, after {attempts} attempts. Check that the server runs at this URL."
        )
        if not error.reached:
            raise fatal from None
        # The document is journaled as failed, so that the next session asks another one first.
        self._fatal = self._fatal or fatal

    def _post(self, connection: Connection, prompt: str, tally: Tally) -> Reply:
        while True:
            fields = dict(self._fields)
            length_field = self._length_field
            body = {"model": self._model, "temperature": 0, "stop": ["\n"], **fields}
            body[length_field] = self._settings.max_new_tokens
            if self._api == "chat":
                body["messages"] = [{"role": "user", "content": prompt}]
            else:
                body["prompt"] = prompt
            data = json.dumps(body).encode()
            reply = connection.request("POST", _PATHS[self._api], data, tally.take)
            if reply.status not in (400, 422) or not self._adapt(reply, fields, length_field):
                return reply
            tally.take()

    def _adapt(self, reply: Reply, fields: dict[str, Any], length_field: str) -> bool:
        """Leaves out, or renames, an optional field that the server refuses; True when asking again makes sense."""
        text = answers.error_message(reply.body)
        with self._lock:
            if self._answered_once:  # A message that quotes a document may hold these words as well.
                return False
            if "logprob" in text and "logprobs" in fields:
                if self._fields.pop("logprobs", None) is not None:
                    announce(
                        f"{self.shown} refuses to give log-probabilities; going on without: --top_k will not work."
                    )
                return True
            if "max_completion_tokens" in text and length_field == "max_tokens":
                self._length_field = "max_completion_tokens"
                return True
        return False

    def _parse(self, reply: Reply, request: Request, estimate: int, attempts: int) -> Generation:
        answer = answers.parse(reply.body, chat=self._api == "chat")
        query = self._key.hide_exact(first_line(answer.text)) if self._has_key else first_line(answer.text)
        estimated = answer.prompt_tokens is None or answer.completion_tokens is None
        completion = (
            estimate_tokens(answer.text) if answer.completion_tokens is None else answer.completion_tokens
        )
        with self._lock:
            if not self._answered_once and query and answer.log_probs is None and self._fields:
                announce(f"{self.shown} sends no log-probabilities: --top_k will not work.")
            self._answered_once = True
        return Generation(
            request.document.id,
            query,
            log_probs=answer.log_probs,
            finish=answer.finish,
            prompt_tokens=estimate if answer.prompt_tokens is None else answer.prompt_tokens,
            completion_tokens=completion,
            attempts=attempts,
            estimated=estimated,
        )

    # ------------------------------------------------------------------------------------ waiting

    def _delay(self, attempt: int) -> float:
        whole = min(_LONGEST_BACK_OFF, self._settings.back_off * 2.0**attempt)
        return random.uniform(0.5 * whole, whole)  # jitter, so that the workers do not return all at once

    def _note(self, reason: str, delay: float) -> None:
        """Says that something is being tried again, at most every ten seconds."""
        with self._lock:
            now = time.monotonic()
            if now < self._note_after:
                return
            self._note_after = now + _NOTE_SECONDS
        announce(f"{self.shown}: {reason}; trying again in {clock(delay)}")

    def _sleep(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise _Abandoned

    def _wait_for_turn(self) -> None:
        """Waits as long as the server asked all of us to wait."""
        while (wait := self._resume_at - time.monotonic()) > 0:
            self._sleep(wait)
        if self._stopping.is_set():
            raise _Abandoned

    def _retry_after(self, reply: Reply) -> float | None:
        wait = parse_retry_after(reply.headers.get("Retry-After"), time.time())
        if wait is None:
            return None
        if wait > _LONGEST_RETRY_AFTER:
            raise InputError(
                f"{self.shown} asks to wait for {clock(wait)} (Retry-After). What was finished is kept: run the same "
                "command then."
            )
        with self._lock:
            self._resume_at = max(self._resume_at, time.monotonic() + wait)
        return wait

    # ------------------------------------------------------------------------------------ errors

    def _describe(self, reply: Reply) -> str:
        """Status and the server's own message, without the key."""
        message = answers.error_message(reply.body)
        message = self._key.hide(message) if self._has_key else message
        return f"status {reply.status}" + (f" ({message[:300]})" if message else "")

    def _raise_if_hopeless(self, reply: Reply) -> None:
        where, status = self.shown, reply.status
        if status in (401, 403, 407):
            # The server's text stays out altogether: this is where servers quote keys.
            sent = "refused the key of --api_key_env" if self._has_key else "wants a key, and none was sent"
            raise InputError(
                f"{where}: status {status}: the server {sent}. Put a valid key into an environment variable "
                "(OPENAI_API_KEY, or the one that --api_key_env names)."
            )
        described = self._describe(reply)
        if status in (404, 405):
            raise InputError(
                f"{where}: {described}: there is no such path, or no model {self._model!r}. Check the URL (mostly it "
                "ends with /v1), --model and --api (completions or chat)."
            )
        if 300 <= status < 400:
            raise InputError(
                f"{where}: {described}: the server redirects, and a key is not sent elsewhere. Give the final URL."
            )
        if status in (402, 429, 501, 505):
            raise InputError(
                f"{where}: {described}: the server refuses the request. Check --model and --api."
            )

    def _only_model(self) -> str:
        connection = Connection(self._address, self._headers, min(30.0, self._settings.timeout))
        try:
            reply = connection.request("GET", "/models")
        except TransportError as error:
            raise InputError(
                f"{self._address.shown}: {error}. Check that the server runs at this URL."
            ) from None
        finally:
            connection.close()
        self._model = "(not named)"
        if reply.status in (401, 403, 407):
            self._raise_if_hopeless(reply)
        names = answers.model_names(reply.body) if reply.status == 200 else []
        if len(names) == 1:
            return self._key.hide(names[0]) if self._has_key else names[0]
        some = self._key.hide(", ".join(names[:10])) if self._has_key else ", ".join(names[:10])
        has = f"it serves {some}" if names else "it does not say what it serves"
        raise InputError(f"{self._address.shown}: which model? Give --model=NAME; {has}.")


def _take_all(outbox: queue.SimpleQueue[Any], wait: float) -> list[Any]:
    """Everything that has arrived; waits for the first."""
    arrived: list[Any] = []
    with contextlib.suppress(queue.Empty):
        arrived.append(outbox.get(timeout=wait))
        while True:
            arrived.append(outbox.get_nowait())
    return arrived


def _address(settings: EndpointSettings) -> tuple[Address, str]:
    """The base address and the interface.

    Raises:
      InputError: a bad URL, or an interface that contradicts it.
    """
    address = Address.parse(settings.url)
    path, api = address.path, settings.api
    for name in ("chat", "completions"):
        if path.endswith(_PATHS[name]):
            path = path.removesuffix(_PATHS[name])
            if api not in (None, name):
                raise InputError(
                    f"--api={api}, and the URL {address.shown} is that of --api={name}. Leave one out."
                )
            api = name
            break
    if not path:
        path = "/v1"
    api = api or "completions"
    if api not in APIS:
        raise InputError(f"--api={api}: expected completions or chat.{did_you_mean(api, APIS)}")
    return Address(address.scheme, address.host, address.port, path, address.query), api


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Seconds to wait, of a `Retry-After` header: a number of seconds or an HTTP date; None when it says nothing.

    >>> parse_retry_after("3", 0.0), parse_retry_after("Thu, 01 Jan 1970 00:01:00 GMT", 50.0)
    (3.0, 10.0)
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return None
    return None if math.isnan(seconds) else max(0.0, seconds)
