"""Files of scores: each process writes its own and reads all."""

from __future__ import annotations

from inranker_jax.evaluation.score_memory import ScoreMemory

ONE, TWO, THREE = {"q1": {"d1": 0.5}}, {"q2": {"d2": -1.25}}, {"q3": {"d3": 1e-7, "d1": 3.0}}


def _write(path, index, *groups, fingerprint="settings"):
    memory = ScoreMemory(path, fingerprint, index)
    for group in groups:
        memory.add(group)
    memory.close()


def _known(memory):
    return {query: memory.get(query) for query in ("q1", "q2", "q3") if memory.get(query) is not None}


def test_any_number_of_processes_goes_on_from_any_other(tmp_path):
    path = tmp_path / "new" / "unfinished.jsonl"
    _write(path, 0, ONE)
    _write(path, 2, TWO)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["unfinished-2.jsonl", "unfinished.jsonl"]
    _write(path, 1, THREE)
    for index in (0, 1, 7):
        assert _known(ScoreMemory(path, "settings", index)) == {**ONE, **TWO, **THREE}
    assert not (tmp_path / "new" / "unfinished-7.jsonl").exists(), "who only reads writes nothing"


def test_lines_of_others_are_seen_while_they_grow(tmp_path):
    path = tmp_path / "unfinished.jsonl"
    first, second = ScoreMemory(path, "settings"), ScoreMemory(path, "settings", 1)
    second.add(ONE)
    first.add(TWO)
    assert _known(first) == TWO
    first.refresh()
    assert _known(first) == {**ONE, **TWO}
    other = tmp_path / "unfinished-1.jsonl"
    whole = other.read_bytes()
    second.add(THREE)
    torn = other.read_bytes()[:-5]
    other.write_bytes(torn)  # as seen in the middle of a write
    first.refresh()
    assert _known(first) == {**ONE, **TWO}
    other.write_bytes(whole)
    first.refresh()
    second = ScoreMemory(path, "settings", 1)
    second.add(THREE)
    first.refresh()
    assert _known(first) == {**ONE, **TWO, **THREE}


def test_a_torn_last_line_of_another_is_left_to_it(tmp_path):
    path, other = tmp_path / "unfinished.jsonl", tmp_path / "unfinished-1.jsonl"
    _write(path, 1, ONE, TWO)
    torn = other.read_bytes()[:-3]
    other.write_bytes(torn)
    memory = ScoreMemory(path, "settings")
    assert _known(memory) == ONE
    memory.add(THREE)
    assert other.read_bytes() == torn
    _write(path, 1, TWO)
    assert _known(ScoreMemory(path, "settings", 5)) == {**ONE, **TWO, **THREE}


def test_files_of_other_settings_are_passed_over_until_they_begin_anew(tmp_path):
    path = tmp_path / "unfinished.jsonl"
    _write(path, 0, ONE, fingerprint="old")
    _write(path, 1, TWO, fingerprint="old")
    first = ScoreMemory(path, "settings")
    assert len(first) == 0
    first.add(THREE)
    _write(path, 1, ONE)
    first.refresh()
    assert _known(first) == {**ONE, **THREE}


def test_removed_with_those_of_all(tmp_path):
    path = tmp_path / "unfinished.jsonl"
    (tmp_path / "result.json").touch()
    for index in range(3):
        _write(path, index, ONE)
    ScoreMemory(path, "settings").remove()
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
