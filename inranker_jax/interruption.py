"""SIGTERM and Ctrl-C as a flag which the train loop reads between steps, so that it can save and leave."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType


def is_running(process: int) -> bool:
    """Whether a process of this number exists on this machine, whosever it is."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Interruption:
    """Context manager: while it is open, the first SIGTERM or SIGINT only sets a flag.

    A SIGINT after it kills, as somebody at the keyboard wants that. A SIGTERM after it does nothing: clusters send it
    again, and tell both a process and its launcher, which must not end a save. SIGKILL is always left.

    Attributes:
      signal_number: the signal that arrived, or None.
    """

    SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            if number == signal.SIGTERM:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal_number = number
        name, again = signal.Signals(number).name, "again " if number == signal.SIGINT else ""
        print(f"\n{name}: saving, then leaving. Ctrl-C {again}leaves at once.", file=sys.stderr, flush=True)

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal_number is not None

    @property
    def exit_status(self) -> int:
        """The shell's convention for a process ended by that signal (143 for SIGTERM, 130 for Ctrl-C)."""
        return 128 + (self.signal_number or 0)


class SharedInterruption(Interruption):
    """One for several processes: a signal to any of them stops all of them at the same step.

    SIGTERM is left to JAX's preemption service, which tells the others and settles the step; Ctrl-C is passed on to
    it. `requested` must be asked by all processes, in the same order.
    """

    SIGNALS = (signal.SIGINT,)

    def __init__(self) -> None:
        super().__init__()
        self._asked = 0
        self._agreed = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is None:
            os.kill(os.getpid(), signal.SIGTERM)
        super()._on_signal(number, frame)

    @property
    def requested(self) -> bool:
        """Whether all processes are to stop now."""
        from jax.experimental import multihost_utils

        self._asked += 1
        self._agreed = self._agreed or multihost_utils.reached_preemption_sync_point(self._asked)
        return self._agreed

    @property
    def exit_status(self) -> int:
        """143, whichever process the signal came to; 130 after Ctrl-C here."""
        return 128 + (self.signal_number or signal.SIGTERM)
