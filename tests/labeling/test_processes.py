"""Processes that share a folder: who is who, what one that waits says, and when it gives up. Real ones are in
`tests/test_label_processes.py`."""

from __future__ import annotations

import argparse
import dataclasses
import signal
from collections.abc import Callable

import jax
import pytest

from inranker_jax import distributed
from inranker_jax.errors import InputError
from inranker_jax.interruption import Interruption
from inranker_jax.labeling import processes
from inranker_jax.labeling.processes import ALONE, PeerStopped, Processes
from inranker_jax.telemetry.phases import Phases
from tests.hangs import wait_for_report
from tests.telemetry.test_phases import Clock


@dataclasses.dataclass(frozen=True)
class Board:
    """The store of the coordination service, without the service."""

    rows: dict[str, str] = dataclasses.field(default_factory=dict)

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        assert allow_overwrite or key not in self.rows
        self.rows[key] = value

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.rows.items() if key.startswith(folder)]


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    board = Board()
    monkeypatch.setattr(distributed, "client", lambda: board)
    monkeypatch.setattr(processes, "_LONGEST_PAUSE", 0.001)
    return board


def joined(index: int) -> Processes:
    return Processes(index, 3, joined=True)


def flags(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    distributed.add_flags(parser)
    return parser.parse_args(argv)


def steps(*values: dict[int, str]) -> Callable[[], dict[int, str]]:
    """What is missing, at one look after another; in the end nothing."""
    left = iter(values)
    return lambda: next(left, {})


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], ALONE),
        (["--process_index=1", "--process_count=3"], Processes(1, 3)),
        (["--process_count=1"], ALONE),
        (["--process_index=0"], ALONE),
    ],
)
def test_flags_without_a_coordinator_are_independent_processes(argv: list[str], expected: Processes) -> None:
    assert Processes.join(flags(*argv)) == expected


@pytest.mark.parametrize("count", ["0", "3"])
def test_a_count_without_an_index_is_refused(count: str) -> None:
    """Two machines that both forgot it would do the same share, and nobody the other."""
    with pytest.raises(InputError, match="needs --process_index too"):
        Processes.join(flags(f"--process_count={count}"))


@pytest.mark.parametrize("argv", [["--process_index=2", "--process_count=2"], ["--process_index=1"]])
def test_an_index_beyond_the_count_is_refused(argv: list[str]) -> None:
    with pytest.raises(InputError, match="expected a number from 0 to one less than the count"):
        Processes.join(flags(*argv))


def test_a_coordinator_needs_the_others() -> None:
    with pytest.raises(InputError, match="--process_count"):
        Processes.join(flags("--coordinator_address=localhost:1", "--process_index=0"))


def test_signals_come_back_after_jax_took_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "join", lambda *_: (1, 2))
    given: list[int] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: given.append(number))
    assert Processes.join(flags()) == Processes(1, 2, joined=True)
    assert given == list(Interruption.SIGNALS)


def test_what_is_told_is_heard_by_name(board: Board) -> None:
    joined(1).tell("scores of cqadupstack/android", "x")
    joined(2).tell("scores of cqadupstack/android")
    joined(2).tell("scores of cqadupstack")
    assert joined(0).heard("scores of cqadupstack/android") == {1: "x", 2: "yes"}
    assert joined(0).heard("scores of cqadupstack") == {2: "yes"}
    assert Processes(0, 3).heard("scores of cqadupstack") == {}
    Processes(1, 3).tell("nobody listens")
    assert len(board.rows) == 3


def test_waiting_names_what_is_missing(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_FIRST_SECONDS", 0.0)
    lines: list[str] = []
    joined(0).wait("labelled", steps({2: "4 chunks", 1: "1 chunk"}, {1: "1 chunk"}), "DIR", lines.append)
    assert len(lines) == 1, "now and then, not always"
    assert lines[0].startswith("waiting for process 1 (1 chunk), process 2 (4 chunks). Should one have died")
    Processes(0, 20).wait(
        "labelled", steps({index: "1 chunk" for index in range(1, 20)}), "DIR", lines.append
    )
    assert "process 8 (1 chunk) and 11 others. Start those that do not run" in lines[1]


def test_who_looks_for_others_is_not_stuck(board: Board) -> None:
    clock = Clock()
    first = Processes(0, 3, joined=True, phases=Phases.of_scoring(now=clock))
    seen: list[tuple[str, float]] = []

    def check() -> None:
        seen.append((first.phases.current[0], first.phases.seconds_without_step))
        clock.time += 100

    first.wait("labelled", steps(*[{1: "1 chunk"}] * 3), "DIR", lambda _: None, check)
    assert seen == [("waiting", 0)] * 3
    assert first.phases.current == ("startup", 0)


def test_a_look_that_stands_still_is_told(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []

    def missing() -> dict[int, str]:
        """As where a network file system does not answer."""
        told.append(wait_for_report(capsys))
        return {}

    third = joined(2)
    with third.watched(0.2, "chunk"):
        third.wait("labelled", missing, "DIR", print)
    assert "process 2 of 3 on " in told[0]
    assert "phase: waiting, for " in told[0]
    assert " in missing\n" in told[0]


def test_a_part_that_is_told_and_not_there_is_no_shared_folder(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 2.0)
    looks: list[int] = []

    def missing() -> dict[int, str]:
        looks.append(1)
        return {1: "4 chunks"}

    joined(1).tell("labelled")
    with pytest.raises(InputError, match="process 1 has written its part, but 4 chunks is not in DIR here"):
        joined(0).wait("labelled", missing, "DIR", print)
    assert len(looks) > 2, "a network file system may be late"


def test_a_stopped_process_stops_the_others_with_its_status(board: Board) -> None:
    with pytest.raises(InputError), joined(1).ending_together(print):
        raise InputError("DIR/x:3: no such thing.")
    with pytest.raises(PeerStopped, match=r"process 1 has stopped \(DIR/x:3: no such thing.\)") as stopped:
        joined(0).wait("labelled", lambda: {1: "1 chunk"}, "DIR", print)
    assert stopped.value.status == 2
    joined(1).check()  # it is not its own peer


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(143), 143), (KeyboardInterrupt(), 130), (OSError("disk"), 1)]
)
def test_the_status_of_other_ends(board: Board, error: BaseException, status: int) -> None:
    with pytest.raises(type(error)), joined(0).ending_together(print):
        raise error
    with pytest.raises(PeerStopped) as stopped:
        joined(2).check()
    assert stopped.value.status == status


def test_nobody_leaves_before_the_last(board: Board) -> None:
    order: list[str] = []

    def announce(line: str) -> None:
        order.append(line)

    for index in (1, 2):
        joined(index).tell("finished")
    with joined(0).ending_together(announce):
        order.append("work")
    assert order == ["work"]
    board.rows.clear()
    joined(1).tell("finished")
    joined(2).tell("stopped", "1 OSError: disk")
    with pytest.raises(PeerStopped, match="process 2 has stopped"), joined(0).ending_together(announce):
        order.append("work")


def test_a_signal_ends_the_waiting(board: Board) -> None:
    with Interruption() as interruption:
        interruption.signal_number = signal.SIGTERM
        with pytest.raises(KeyboardInterrupt) as stopped, joined(0).ending_together(print, interruption):
            pass
        assert stopped.value.args == (143,)
    assert joined(1).heard("stopped") == {0: "143 by a signal"}


def test_a_coordinator_that_is_gone_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect\nmore")

        key_value_set = key_value_dir_get

    monkeypatch.setattr(distributed, "client", Gone)
    with pytest.raises(PeerStopped, match=r"cannot be reached \(UNAVAILABLE: failed to connect\)"):
        joined(1).check()
