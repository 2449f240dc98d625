"""Reads the JSON that OpenAI-compatible servers send: completions, chat completions, log-probabilities, errors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class BadAnswer(Exception):
    """A body that is not the answer it should be, such as JSON cut short. The message holds nothing of the body."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion.

    Attributes:
      text: as generated.
      log_probs: of the tokens of the first line; None when the server sent none, or not finite ones.
      finish: "stop" or "length".
      prompt_tokens, completion_tokens: the server's count, or None.
    """

    text: str
    log_probs: tuple[float, ...] | None
    finish: str
    prompt_tokens: int | None
    completion_tokens: int | None


def parse(body: bytes, chat: bool) -> Answer:
    """Reads the body of a 200 answer.

    Raises:
      BadAnswer: not JSON, or without a text.
    """
    try:
        row = json.loads(body)
    except ValueError:
        raise BadAnswer("the answer is not whole JSON") from None
    try:
        choice = row["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
    except (KeyError, IndexError, TypeError):
        raise BadAnswer("the answer holds no choices with a text") from None
    if text is None and chat:
        text = ""  # a refusal, or nothing but reasoning
    if not isinstance(text, str):
        raise BadAnswer("the text of the answer is not a string")
    usage = row.get("usage") if isinstance(row.get("usage"), dict) else {}
    return Answer(
        text=text,
        log_probs=_log_probs(choice.get("logprobs"), text),
        finish="length" if choice.get("finish_reason") == "length" else "stop",
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _log_probs(found: Any, text: str) -> tuple[float, ...] | None:
    """Log-probabilities of the first line's tokens, from either shape that servers use for either interface."""
    if not isinstance(found, dict):
        return None
    if isinstance(found.get("content"), list):
        pairs = [
            (item.get("token"), item.get("logprob")) for item in found["content"] if isinstance(item, dict)
        ]
    elif isinstance(found.get("tokens"), list) and isinstance(found.get("token_logprobs"), list):
        pairs = list(zip(found["tokens"], found["token_logprobs"], strict=False))
    else:
        return None
    return first_line_log_probs(pairs, text)


def first_line_log_probs(pairs: Sequence[tuple[Any, Any]], text: str) -> tuple[float, ...] | None:
    """Keeps what belongs to the text before its first line break: not the break, not the end-of-text token.

    >>> first_line_log_probs([(" a", -1.0), (" b", -2.0), ("\\\\n", -0.1)], " a b\\\\n")
    (-1.0, -2.0)
    """
    length = len(text.split("\n", 1)[0])
    kept: list[float] = []
    reached = 0
    for token, value in pairs:
        if reached >= length:
            break
        if not isinstance(token, str) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        kept.append(float(value))
        reached += len(token)
    return tuple(kept) if kept or not length else None


def error_message(body: bytes) -> str:
    """The message in the body of a refused request, on one line: OpenAI's `error.message`, FastAPI's `detail`."""
    text = body[:65536].decode("utf-8", "replace")
    try:
        row = json.loads(text)
    except ValueError:
        row = None
    if isinstance(row, dict):
        found = row.get("error", row.get("detail", row.get("message")))
        if isinstance(found, dict):
            found = found.get("message")
        if found is not None:
            text = found if isinstance(found, str) else json.dumps(found)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def is_out_of_credit(body: bytes) -> bool:
    """Whether a 429 says that the account's quota is used up, which waiting does not change."""
    return b"insufficient_quota" in body


def model_names(body: bytes) -> list[str]:
    """Names in the answer of `/models`; empty when it is something else."""
    try:
        return [str(model["id"]) for model in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError):
        return []
