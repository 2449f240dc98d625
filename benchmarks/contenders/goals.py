"""The goals for speed, and what a run reached of each. They are meant for 2 CPU cores, t5-small and t5-base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from . import flops
from .report import Goal, goal
from .rounds import Row

_PYTORCH, _OURS = "PyTorch", "ours"
WINDOW = 4096  # pairs that a stream packs together (`scorer`)
_ENGINES = ("CTranslate2", "ONNX Runtime")


class Table:
    """Rows of one workload, found by name and mode."""

    def __init__(self, rows: Sequence[Row], automatic: str) -> None:
        """`automatic` is the layout that ours takes by default."""
        self._rows = rows
        self._automatic = automatic

    def one(self, name: str, mode: str) -> Row | None:
        """The row of a contender in a mode."""
        return next((row for row in self._rows if (row.name, row.mode) == (name, mode)), None)

    def ours(self, precision: str, mode: str | None = None) -> Row | None:
        """Ours in a layout, or in the default one."""
        return self.one(f"{_OURS} {precision}", mode or self._automatic)

    def pytorch(self, precision: str, *modes: str) -> list[Row | None]:
        """PyTorch, not compiled."""
        return [self.one(f"{_PYTORCH} {precision}", mode) for mode in modes]

    def engines(self, precision: str) -> list[Row | None]:
        """CTranslate2 and ONNX Runtime, with any threads."""
        return [row for row in self._rows if row.name.startswith(_ENGINES) and row.precision == precision]


def needed_share(row: Row | None, shape: flops.Shape, roof: float, training: bool) -> float | None:
    """Share of the machine's peak that goes into what the result needs: no padding, an absorbed decoder."""
    if row is None or row.error or not row.seconds:
        return None
    lengths = row.workload.lengths
    # Training's rates are tokens a second, scoring's pairs.
    work = flops.useful(shape, lengths, training) / (lengths.sum() if training else len(lengths))
    return work * (row.rate or 0.0) / roof


def scoring(
    workload: str,
    rows: Sequence[Row],
    automatic: str,
    *,
    packed: Mapping[int, float],
    shape: flops.Shape,
    roof: float | None = None,
) -> list[Goal]:
    """Goals of one workload of the scoring benchmark: those of equal lengths, or of a mix.

    Args:
      workload: its name.
      rows: of its table.
      automatic: the layout that ours takes by default.
      packed: share of useful tokens in packed rows by their length, for a mix.
      shape: the model's.
      roof: FLOP/s of bfloat16 products of an accelerator, which has goals of its own.
    """
    found = Table(rows, automatic)
    f32, bf16 = found.ours("float32"), found.ours("bfloat16")
    if workload.startswith("fixed-"):
        if workload != "fixed-256" or roof is not None:
            return []
        plain = ("sorted", "arrival")
        return [
            goal(workload, "float32", "PyTorch float32", 1.45, f32, found.pytorch("float32", *plain)),
            goal(workload, "float32", "better engine, float32", 1.15, f32, found.engines("float32")),
            goal(workload, "bfloat16", "PyTorch bfloat16", 1.3, bf16, found.pytorch("bfloat16", *plain)),
        ]
    shares = [
        Goal(
            workload, f"packed rows of {length}", f"useful tokens of {WINDOW:,} pairs", 0.95, share, unit="%"
        )
        for length, share in packed.items()
    ]
    if roof is not None:
        reached = needed_share(bf16, shape, roof, training=False) if roof else None
        return [
            Goal(workload, "bfloat16", "share of measured peak", 0.55, reached, unit="%"),
            goal(workload, "bfloat16", "PyTorch padded", 3.0, bf16, found.pytorch("bfloat16", "arrival")),
            *shares,
        ]
    mean = next(row.workload.lengths.mean() for row in rows)
    most = f"padding alone: {512 / mean:.2f}x"
    padded = found.ours("float32", "padded")
    return [
        goal(workload, "float32", "ours float32, padded", 3.6, f32, [padded], most),
        goal(workload, "float32", "PyTorch, arrival order", 2.5, f32, found.pytorch("float32", "arrival")),
        goal(workload, "float32", "PyTorch, sorted", 1.3, f32, found.pytorch("float32", "sorted")),
        goal(workload, "float32", "better engine, float32", 1.1, f32, found.engines("float32")),
        goal(workload, "bfloat16", "PyTorch, sorted", 1.25, bf16, found.pytorch("bfloat16", "sorted")),
        goal(workload, "bfloat16", "ours float32", 1.65, bf16, [f32]),
        *shares,
    ]


def training(
    workload: str, rows: Sequence[Row], automatic: str, *, shape: flops.Shape, roof: float | None = None
) -> list[Goal]:
    """Goals of one workload of the training benchmark; arguments as of `scoring`."""
    found = Table(rows, automatic)
    f32, bf16 = found.ours("float32"), found.ours("bfloat16")
    if roof is not None:
        if workload == "equal":
            return []
        reached = needed_share(bf16, shape, roof, training=True) if roof else None
        return [Goal(workload, "bfloat16", "share of measured peak", 0.45, reached, unit="%")]
    half = found.pytorch("bfloat16", "dynamic")
    if workload == "equal":
        peers = found.pytorch("float32", "dynamic")
        return [
            goal(workload, "float32", "PyTorch, best micro-batch", 1.1, f32, peers),
            goal(workload, "bfloat16", "PyTorch autocast, best micro-batch", 1.0, bf16, half),
        ]
    mean = next(row.workload.lengths.mean() for row in rows)
    most = f"padding alone: {512 / mean:.2f}x"
    recipe = found.pytorch("float32", "padded")
    return [
        goal(workload, "float32", "PyTorch padded to 512", 4.0, f32, recipe, most),
        goal(workload, "bfloat16", "PyTorch autocast, dynamic padding", 1.0, bf16, half),
    ]
