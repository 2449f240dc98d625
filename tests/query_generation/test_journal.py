"""The journal: nothing paid twice, nothing torn read, nothing of other settings continued."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from inranker_jax.errors import InputError
from inranker_jax.query_generation.generators import Generation
from inranker_jax.query_generation.journal import Journal, prompt_key

SETTINGS: dict[str, Any] = {"kind": "openai", "model": "m", "document_tokens": 256}
ONE = Generation("d1", "o quê?\u2028", (-0.5, -1.0), "stop", 10, 2, 3)
TWO = Generation("d2", "two", None, "length", 20, 64, estimated=True)
FAILED = Generation("d3", "", attempts=7, error="status 500")


def write(path: pathlib.Path, *answers: Generation) -> None:
    with Journal.open(path, SETTINGS) as journal:
        journal.add([(prompt_key(answer.document_id), answer) for answer in answers])


def test_round_trip(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / "j.jsonl"
    write(path, ONE)
    write(path, TWO, FAILED)
    with Journal.open(path, SETTINGS) as journal:
        assert {key: answer for key, (_, answer) in journal.answers.items()} == {"d1": ONE, "d2": TWO}
        assert journal.failed == {"d3": "status 500"}
        assert (journal.spent.requests, journal.spent.prompt_tokens, journal.spent.completion_tokens) == (
            11,
            30,
            66,
        )
        assert (journal.spent.tokens, journal.spent.failures, journal.spent.estimated) == (96, 1, True)
        assert journal.spent.usd((1.0, 2.0)) == pytest.approx(162e-6)
        assert journal.spent.usd(None) is None
        assert journal.has("d1", prompt_key("d1"))
        assert not journal.has("d1", prompt_key("another text of the document"))
        assert not journal.has("d3", prompt_key("d3")), "a failure is asked again"
    assert len(path.read_text("utf-8").split("\n")) == 5


def test_a_later_answer_clears_a_failure(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "j"
    write(path, FAILED, Generation("d3", "three"))
    with Journal.open(path, SETTINGS) as journal:
        assert journal.failed == {}
        assert journal.answers["d3"][1].query == "three"


def test_torn_at_every_byte(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever part of the file a killed process left, what was whole is read, and writing goes on."""
    monkeypatch.setattr("os.fsync", lambda _: None)  # hundreds of them take seconds
    whole = tmp_path / "whole"
    write(whole, ONE, TWO)
    data = whole.read_bytes()
    ends = [index + 1 for index, byte in enumerate(data) if byte == ord("\n")]
    path = tmp_path / "torn"
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        with Journal.open(path, SETTINGS) as journal:
            answers = sum(end <= length for end in ends[1:])
            assert len(journal.answers) == answers
            assert journal.dropped_bytes == length - max([0, *(end for end in ends if end <= length)])
            journal.add([("k", Generation("d9", "nine"))])
        with Journal.open(path, SETTINGS) as journal:
            assert len(journal.answers) == answers + 1


def test_a_last_line_of_zeros_is_torn(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "j"
    write(path, ONE)
    with path.open("ab") as file:
        file.write(b"\0" * 100)
    with Journal.open(path, SETTINGS) as journal:
        assert list(journal.answers) == ["d1"]
        assert journal.dropped_bytes == 100


def test_other_settings(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "j"
    write(path, ONE)
    with pytest.raises(InputError, match="other settings") as caught:
        Journal.open(path, SETTINGS | {"model": "n"})
    assert "- model: m\n+ model: n\n" in str(caught.value)
    assert "document_tokens" not in str(caught.value)


def test_two_processes(tmp_path: pathlib.Path) -> None:
    with (
        Journal.open(tmp_path / "j", SETTINGS),
        pytest.raises(InputError, match="another process is writing this journal"),
    ):
        Journal.open(tmp_path / "j", SETTINGS)
    with Journal.open(tmp_path / "j", SETTINGS) as journal:
        assert journal.answers == {}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", ":2: not a line of a journal"),
        ('{"document_id": "d"}', ":2: not an answer"),
        ('{"document_id": "d", "prompt": "p", "query": "q", "log_probs": ["x"]}', ":2: not an answer"),
        ('{"document_id": "d", "prompt": "p", "query": "q", "colour": 1}', ":2: not an answer"),
    ],
)
def test_malformed_lines(tmp_path: pathlib.Path, line: str, words: str) -> None:
    path = tmp_path / "j"
    head = json.dumps({"journal": 1, "settings": SETTINGS})
    good = '{"document_id": "d", "prompt": "p", "query": "q"}'
    path.write_text(f"{head}\n{line}\n{good}\n", encoding="utf-8")
    with pytest.raises(InputError, match=words):
        Journal.open(path, SETTINGS)


def test_another_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "j"
    path.write_text('{"doc_id": "1"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="not a journal of generated queries"):
        Journal.open(path, SETTINGS)
    assert path.read_text("utf-8") == '{"doc_id": "1"}\n'


def test_lines_are_synced(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer is on disk when `add` returns: the bytes are written before the sync, and one sync serves a list."""
    path, sizes = tmp_path / "j", []
    monkeypatch.setattr("os.fsync", lambda _: sizes.append(path.stat().st_size))
    write(path, ONE, TWO)
    assert len(sizes) == 2
    assert sizes[1] == path.stat().st_size > sizes[0] > 0
