"""Lines of progress on standard error, and how they put time and memory."""

from __future__ import annotations

import resource
import sys


def clock(seconds: float) -> str:
    """Formats a duration: `42s`, `3m07s`, `5h02m`.

    >>> clock(42), clock(187), clock(18120)
    ('42s', '3m07s', '5h02m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def cost(seconds: float) -> str:
    """Time and peak memory of this process, such as `6m35s, 1.6 GiB of memory at the peak`."""
    return f"{clock(seconds)}, {host_peak_bytes() / 2**30:.1f} GiB of memory at the peak"


def host_peak_bytes() -> int:
    """Most memory that this process ever had (resident set size)."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


_prefix = ""


def prefix(text: str) -> None:
    """Puts `text` before every later line of `announce`: which of several processes speaks."""
    global _prefix
    _prefix = text


def announce(message: str) -> None:
    """Prints a line of progress, or several, to standard error at once."""
    lines = "".join(f"{_prefix}{line}\n" for line in message.split("\n"))
    print(lines, end="", file=sys.stderr, flush=True)
