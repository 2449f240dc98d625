"""An OpenAI-compatible HTTP server for tests, on a real socket, that misbehaves on request."""

from __future__ import annotations

import contextlib
import json
import pathlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What a misbehaving server does with one request: called with the handler and the parsed request.
Trouble = Callable[["Handler", dict[str, Any]], None]


def answer_of(prompt: str) -> str:
    """What the server writes for a prompt: a question that repeats the last word of the document."""
    document = prompt.rsplit("Document: ", 1)[-1].split("\n", 1)[0]
    return f" what is meant by {document.split()[-1]} here?"


@dataclass
class Behaviour:
    """What the server is to do.

    Attributes:
      troubles: what befalls the first requests, one each; None for a good answer.
      answer: prompt -> completion.
      log_probs: whether completions come with log-probabilities.
      usage: whether they come with token counts.
      delay: seconds before each good answer.
      models: what /models names.
    """

    troubles: list[Trouble | None] = field(default_factory=list)
    answer: Callable[[str], str] = answer_of
    log_probs: bool = True
    usage: bool = True
    delay: float = 0.0
    models: Sequence[str] = ("tiny",)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def prompts(self) -> list[str]:
        """The prompts asked for, in the order of their arrival."""
        return [
            request["prompt"] if "prompt" in request else request["messages"][0]["content"]
            for request in self.requests
        ]


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    behaviour: Behaviour

    def log_message(self, *_: object) -> None:
        """Keeps quiet."""

    def send_json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        """Sends a whole answer."""
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.send_json(200, {"data": [{"id": name} for name in self.behaviour.models]})

    def do_POST(self) -> None:
        behaviour = self.behaviour
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with behaviour.lock:
            behaviour.requests.append(request)
            behaviour.headers.append(dict(self.headers))
            behaviour.paths.append(self.path)
            behaviour.times.append(time.monotonic())
            trouble = behaviour.troubles.pop(0) if behaviour.troubles else None
            behaviour.at_once += 1
            behaviour.most_at_once = max(behaviour.most_at_once, behaviour.at_once)
        try:
            if trouble is not None:
                trouble(self, request)
            else:
                time.sleep(behaviour.delay)
                self.send_json(200, self.completion(request))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with behaviour.lock:
                behaviour.at_once -= 1

    def completion(self, request: dict[str, Any]) -> dict[str, Any]:
        """A good answer to a request of either interface."""
        chat = "messages" in request
        prompt = request["messages"][0]["content"] if chat else request["prompt"]
        text = self.behaviour.answer(prompt)
        tokens = [f" {word}" for word in text.split()]
        values = [-0.25 * (index + 1) for index in range(len(tokens))]
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if self.behaviour.log_probs and request.get("logprobs"):
            if chat:
                pairs = zip(tokens, values, strict=True)
                content = [{"token": token, "logprob": value, "top_logprobs": []} for token, value in pairs]
                choice["logprobs"] = {"content": content}
            else:
                choice["logprobs"] = {"tokens": tokens, "token_logprobs": values}
        row: dict[str, Any] = {"model": request["model"], "choices": [choice]}
        if self.behaviour.usage:
            row["usage"] = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(tokens)}
        return row


@contextlib.contextmanager
def serve(behaviour: Behaviour, certificate: pathlib.Path | None = None) -> Iterator[Behaviour]:
    """Runs a server on a free port of this machine, over TLS with a certificate; `behaviour.url` is its base."""
    handler = type("BoundHandler", (Handler,), {"behaviour": behaviour})

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that went away is no news."""

    server = Server(("127.0.0.1", 0), handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    scheme = "http" if certificate is None else "https"
    behaviour.url = f"{scheme}://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield behaviour
    finally:
        server.shutdown()
        server.server_close()


def status(code: int, body: Any = None, **headers: str) -> Trouble:
    """Trouble: an error status."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _: handler.send_json(
        code, {"error": {"message": "no luck"}} if body is None else body, named
    )


def reset(handler: Handler, _: dict[str, Any]) -> None:
    """Trouble: the connection is closed without an answer."""
    handler.close_connection = True
    handler.connection.close()


def stall(seconds: float) -> Trouble:
    """Trouble: silence."""

    def silent(handler: Handler, _: dict[str, Any]) -> None:
        time.sleep(seconds)
        handler.close_connection = True

    return silent


def dribble(seconds: float) -> Trouble:
    """Trouble: a byte now and then, so that no single read takes long."""

    def slow(handler: Handler, _: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.02)
        handler.close_connection = True

    return slow


def cut_short(handler: Handler, request: dict[str, Any]) -> None:
    """Trouble: half of the announced body, then the end."""
    body = json.dumps(handler.completion(request)).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True


def half_json(handler: Handler, request: dict[str, Any]) -> None:
    """Trouble: a whole answer of half an object, as a proxy sends when its own server dies."""
    body = json.dumps(handler.completion(request)).encode()
    half = body[: len(body) // 2]
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(half)))
    handler.end_headers()
    handler.wfile.write(half)
