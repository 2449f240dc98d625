"""Work that stands still until the watchdog has told of it."""

from __future__ import annotations

import time

import pytest


def wait_for_report(capsys: pytest.CaptureFixture[str], seconds: float = 60.0) -> str:
    """Waits for a whole report of `watchdog.Watchdog` on standard error, and returns it."""
    said, end = "", time.monotonic() + seconds
    while "end of report" not in said:
        assert time.monotonic() < end, f"no report of a hang in {seconds} s; said: {said}"
        time.sleep(0.02)
        said += capsys.readouterr().err
    return said
