"""SIGTERM and Ctrl-C as a flag which the train loop reads between steps, so that it can save and leave."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType


class Interruption:
    """Context manager: while it is open, the first SIGTERM or SIGINT only sets a flag; a second one kills.

    Attributes:
      signal_number: the signal that arrived, or None.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

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
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal_number = number
        name = signal.Signals(number).name
        print(f"\n{name}: saving, then leaving. Send it again to leave at once.", file=sys.stderr, flush=True)

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal_number is not None

    @property
    def exit_status(self) -> int:
        """The shell's convention for a process ended by that signal (143 for SIGTERM, 130 for Ctrl-C)."""
        return 128 + (self.signal_number or 0)
