"""The journal of generated queries: one JSON object a line, appended and synced, so that no answer is paid twice.

The first line says what decides the answers; every other line is an answer or a failure. A process killed while it
writes leaves at most a torn last line, which the next one drops. In an object store it is a folder (`segments`).
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, BinaryIO

from inranker_jax import paths
from inranker_jax.errors import InputError
from inranker_jax.query_generation.generators import Generation
from inranker_jax.query_generation.segments import Segments

_FORMAT = 1


def prompt_key(prompt: str) -> str:
    """First 16 hex digits of a prompt's SHA-256: an answer is used again for the same prompt only."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass
class Spent:
    """What all sessions of a journal asked for.

    Attributes:
      requests: times the generator was asked, retries included.
      prompt_tokens, completion_tokens: of the answers.
      answers: documents that got one, each time counted.
      failures: documents that got none, each time counted.
      estimated: whether some token counts are estimates.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    answers: int = 0
    failures: int = 0
    estimated: bool = False

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens."""
        return self.prompt_tokens + self.completion_tokens

    def add(self, generation: Generation) -> None:
        """Counts one answer or failure."""
        self.requests += generation.attempts
        self.prompt_tokens += generation.prompt_tokens
        self.completion_tokens += generation.completion_tokens
        self.answers += not generation.error
        self.failures += bool(generation.error)
        self.estimated |= generation.estimated

    def usd(self, prices: tuple[float, float] | None) -> float | None:
        """The cost at (prompt, completion) prices in dollars for a million tokens; None without prices."""
        if prices is None:
            return None
        return (self.prompt_tokens * prices[0] + self.completion_tokens * prices[1]) / 1e6


@dataclass
class Journal:
    """An open journal, locked against other processes.

    Attributes:
      path: the file, or the remote folder.
      answers: document id -> (prompt key, answer), the latest of each document.
      failed: document id -> why, of documents whose last attempt failed.
      spent: over all sessions.
    """

    path: Any
    answers: dict[str, tuple[str, Generation]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)
    dropped_bytes: int = 0
    _file: BinaryIO | Segments | None = field(default=None, repr=False)

    @classmethod
    def open(cls, path: Any, settings: dict[str, Any]) -> Journal:
        """Opens or starts a journal.

        Args:
          path: the file; it is made when missing.
          settings: what decides the answers.

        Raises:
          InputError: another process has it open, it was written with other settings (the message shows which),
            or a line other than the last is malformed.
        """
        if paths.is_remote(path):
            segments = Segments(path)
            journal = cls(path, _file=segments)
            journal._read(io.BytesIO(segments.read()), json.loads(json.dumps(settings)))
            return journal
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115 - stays open, and holds the lock
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError.at(
                    path, None, "another process is writing this journal", remedy="Wait for it, or stop it"
                ) from None
            journal = cls(path, _file=file)
            journal._read(file, json.loads(json.dumps(settings)))
        except BaseException:
            file.close()
            raise
        return journal

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file, and with it the lock."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _read(self, file: BinaryIO, settings: dict[str, Any]) -> None:
        file.seek(0)
        good = 0
        stored = None
        for number, line in enumerate(file, start=1):
            row = _parse(line)
            if row is None:
                if file.read(1):
                    raise InputError.at(
                        self.path, number, "not a line of a journal", "one JSON object a line",
                        "Delete the line (its document is generated again), or choose another --output",
                    )  # fmt: skip
                break
            if stored is None:
                stored = self._check(row, settings)
            else:
                self._take(row, number)
            good += len(line)
        self.dropped_bytes = file.seek(0, os.SEEK_END) - good
        if self.dropped_bytes:
            file.truncate(good)
        file.seek(0, os.SEEK_END)
        if stored is None:
            self._write([{"journal": _FORMAT, "settings": settings}])

    def _check(self, row: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        if row.get("journal") != _FORMAT:
            raise InputError.at(
                self.path, 1, "not a journal of generated queries", f'{{"journal": {_FORMAT}, ...}}',
                "Choose another --output, or move the file away",
            )  # fmt: skip
        stored: dict[str, Any] = row["settings"]
        if stored != settings:
            keys = [key for key in sorted({*stored, *settings}) if stored.get(key) != settings.get(key)]
            lines = "\n".join(f"- {key}: {stored.get(key)}\n+ {key}: {settings.get(key)}" for key in keys)
            raise InputError(
                f"{self.path} holds answers made with other settings (- those, + now):\n{lines}\n"
                "Go on with those settings, choose another --output, or delete the file to start again."
            )
        return stored

    def _take(self, row: dict[str, Any], number: int) -> None:
        try:
            key = row.pop("prompt")
            log_probs = row.get("log_probs")
            row["log_probs"] = None if log_probs is None else tuple(float(value) for value in log_probs)
            generation = Generation(**row)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError.at(
                self.path, number, f"not an answer ({error})", "a line that this command wrote",
                "Delete the line; its document is generated again",
            ) from error  # fmt: skip
        self._remember(key, generation)

    def _remember(self, key: str, generation: Generation) -> None:
        self.spent.add(generation)
        if generation.error:
            self.failed[generation.document_id] = generation.error
        else:
            self.failed.pop(generation.document_id, None)
            self.answers[generation.document_id] = (key, generation)

    def add(self, answers: Sequence[tuple[str, Generation]]) -> None:
        """Appends (prompt key, answer) lines; they are on disk when this returns (see `Segments` for remote ones)."""
        rows = []
        for key, generation in answers:
            row: dict[str, Any] = {
                "document_id": generation.document_id,
                "prompt": key,
                "query": generation.query,
            }
            row["log_probs"] = generation.log_probs
            row["finish"] = generation.finish
            row["prompt_tokens"], row["completion_tokens"] = (
                generation.prompt_tokens,
                generation.completion_tokens,
            )
            row["attempts"], row["estimated"] = generation.attempts, generation.estimated
            rows.append(row | {"error": generation.error} if generation.error else row)
        self._write(rows)
        for key, generation in answers:
            self._remember(key, generation)

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        assert self._file is not None, "the journal is closed"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._file.write(text.encode("utf-8", "replace"))
        if isinstance(self._file, Segments):
            return
        self._file.flush()
        os.fsync(self._file.fileno())

    def has(self, document_id: str, key: str) -> bool:
        """Whether there is an answer for that document and prompt."""
        found = self.answers.get(document_id)
        return found is not None and found[0] == key


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object of a whole line, or None."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
