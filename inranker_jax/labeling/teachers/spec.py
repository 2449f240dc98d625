"""How a teacher is named on a command line: `[NAME=][KIND:]PATH[?option=value&option=value...]`.

    unicamp-dl/InRanker-base                       a T5 reranker from the hub
    big=t5:/models/monot5-3b?dtype=bfloat16&fsdp=4 the same, from a folder, divided over four devices
    cross-encoder:BAAI/bge-reranker-v2-m3?dtype=bfloat16
    minilm=bi-encoder:/models/all-MiniLM-L6-v2?scale=12&offset=-4.5
    bm25=run:run.trec.gz?scale=0.5

Values may be percent-encoded (`query_prompt=query:%20`). A `?` or a `%` in a path is only text, unless a `?`
begins options.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

from inranker_jax import packing
from inranker_jax.errors import InputError, did_you_mean

DTYPES = ("float32", "bfloat16")
POOLINGS = ("mean", "cls", "max", "lasttoken")
SIMILARITIES = ("cosine", "dot")
GRAMMAR = "[NAME=][KIND:]PATH[?option=value&...]"

_NAMED = re.compile(r"([\w.+-]+)=(.+)", re.DOTALL)
_PREFIXED = re.compile(r"([A-Za-z][\w-]*):(?!//)(.*)", re.DOTALL)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("expected a finite number")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError("expected a number of at least 1")
    return value


def _axis(text: str) -> int:
    value = int(text)
    if value < 1 and value != -1:
        raise ValueError("expected a positive number, or -1 for all remaining devices")
    return value


def _index(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("expected an output's number, from 0")
    return value


def _text(text: str) -> str:
    return text


def _one_of(options: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in options:
            raise ValueError(f"expected one of {', '.join(options)}{did_you_mean(text, options)}")
        return text

    return parse


_TORCH_OPTIONS: dict[str, Callable[[str], Any]] = {
    "dtype": _one_of(DTYPES),
    "tokens_per_call": _count,
    "max_length": _count,
    "device": _text,
}
_LINEAR: dict[str, Callable[[str], Any]] = {"scale": _number, "offset": _number}

# Kinds and their options, each with what reads its value.
KINDS: dict[str, dict[str, Callable[[str], Any]]] = {
    "t5": {
        "contract": _text,
        "dtype": _one_of(DTYPES),
        "layout": _one_of(packing.KINDS),
        "row_length": _count,
        "slots": _count,
        "tokens_per_call": _count,
        "data": _axis,
        "fsdp": _axis,
        "model": _axis,
    },
    "cross-encoder": {**_TORCH_OPTIONS, "false": _index, "true": _index},
    "bi-encoder": {
        **_TORCH_OPTIONS,
        **_LINEAR,
        "similarity": _one_of(SIMILARITIES),
        "pooling": _one_of(POOLINGS),
        "query_prompt": _text,
        "document_prompt": _text,
        "cache": _count,
    },
    "run": dict(_LINEAR),
}


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """A parsed specification.

    Attributes:
      name: what the teacher is called in `labels.json` and on the command line.
      kind: a key of `KINDS`.
      path: a folder, a file or a hub id.
      options: values by option, only those that were given.
    """

    name: str
    kind: str
    path: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def parse_spec(text: str) -> TeacherSpec:
    """Parses `[NAME=][KIND:]PATH[?option=value&...]`.

    Args:
      text: the specification. Without a kind it is a T5 reranker; without a name it gets the last part of its
        path. A path that exists as it is written is never taken apart.

    Returns:
      The parsed specification, options checked.

    Raises:
      InputError: an unknown kind or option (with the nearest known one), a value of the wrong type, or an
        empty path.

    >>> parse_spec("mini=bi-encoder:models/MiniLM?scale=12&offset=-4.5")
    TeacherSpec(name='mini', kind='bi-encoder', path='models/MiniLM', options={'scale': 12.0, 'offset': -4.5})
    >>> parse_spec("unicamp-dl/InRanker-base").name
    'InRanker-base'
    """
    if not isinstance(text, str) or not text.strip():
        raise InputError(
            f"teacher {text!r} is empty. Expected {GRAMMAR}, with KIND one of {', '.join(KINDS)}."
        )
    text = text.strip()
    if os.path.exists(text):
        return TeacherSpec(_default_name(text, text), "t5", text)
    target, question, query = text.partition("?")
    name = None
    named = _NAMED.fullmatch(target)
    if named and not os.path.exists(target):
        name, target = named.groups()
    kind, path = "t5", target
    prefixed = _PREFIXED.fullmatch(target)
    if prefixed and not os.path.exists(target):
        kind, path = prefixed.groups()
        if kind not in KINDS:
            raise InputError(
                f"teacher {text!r}: {kind!r} is no kind of teacher.{did_you_mean(kind, KINDS)} "
                f"Expected {GRAMMAR}, with KIND one of {', '.join(KINDS)}."
            )
    if not path:
        raise InputError(f"teacher {text!r} has no path. Expected {GRAMMAR}.")
    options = _options(text, kind, query) if question else {}
    return TeacherSpec(name or _default_name(path, text), kind, path, options)


def _default_name(path: str, text: str) -> str:
    last = re.sub(r"[^\w.+-]", "_", re.split(r"[/\\]", path.rstrip("/\\"))[-1])
    if last in ("", ".", ".."):
        raise InputError(f"teacher {text!r}: its path gives no name. Name it: NAME={text}.")
    return last


def _options(text: str, kind: str, query: str) -> dict[str, Any]:
    known = KINDS[kind]
    values: dict[str, Any] = {}
    for part in query.split("&"):
        key, equals, raw = part.partition("=")
        if not equals or not key:
            raise InputError(f"teacher {text!r}: {part!r} is no option. Expected option=value, joined by &.")
        if key not in known:
            raise InputError(
                f"teacher {text!r}: a {kind} teacher has no option {key!r}.{did_you_mean(key, known)} "
                f"It has {', '.join(known)}."
            )
        if key in values:
            raise InputError(f"teacher {text!r}: option {key!r} is given twice.")
        value = urllib.parse.unquote(raw)
        try:
            values[key] = known[key](value)
        except ValueError as error:
            raise InputError(f"teacher {text!r}: {key}={value!r}: {error}.") from None
    return values
