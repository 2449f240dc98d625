"""Verified labels for people: a report in text, and histograms of the margins in text and as a picture."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from inranker_jax import paths
from inranker_jax.errors import InputError
from inranker_jax.labeling.verification import QUANTILES, Verification
from inranker_jax.records import PathType

_BINS, _WIDTH = 16, 40
_IMAGE_BINS = 60
_IMAGES = (".png", ".pdf", ".svg")


def text_report(verification: Verification) -> str:
    """A report of a few dozen lines."""
    figures = verification.figures
    teacher = f", teacher {verification.teacher}" if verification.teacher else ""
    sizes = {int(size): count for size, count in figures["list_sizes"].items()}
    usual = max(sizes, key=lambda size: sizes[size]) if sizes else 0
    span = f" ({min(sizes)} to {max(sizes)})" if len(sizes) > 1 else ""
    lines = [
        f"{verification.name}: {verification.path} ({verification.form}{teacher})",
        f"  {figures['queries']} queries, {figures['pairs']} pairs, {usual} a list{span}",
    ]
    if figures["pairs"]:
        centred = "centred" if figures["centred"] else "not centred"
        off = f"{figures['mean_abs_sum']:.3g}"
        lines.append(f"  logits are {centred} (their sum differs from 0 by {off} on average)")
        lines += _quantile_table(figures["margin"])
        lines += _histogram(verification.positives, verification.others)
    if figures["positive_on_top"] is not None:
        lines.append(
            f"  the positive has the highest margin in {figures['positive_on_top']:.1%} of lists; "
            f"on average {figures['positive_minus_others']:+.2f} against the others"
        )
    if "qrels" in figures:
        lines.append(_agreement(figures["qrels"]))
    for finding in verification.findings:
        lines.append(f"  {'ERROR' if finding.is_error else 'note'} [{finding.check}] {finding.message}")
    count = len(verification.errors)
    lines.append(f"  {count} error{'s' * (count > 1)}" if count else "  ok")
    return "\n".join(lines)


def _agreement(qrels: dict[str, Any]) -> str:
    accuracy, area = qrels["pairwise_accuracy"], qrels["auc"]
    if accuracy is None:
        return (
            f"  qrels: {qrels['judged_lists']} judged lists, none with both a relevant document and another"
        )
    return (
        f"  qrels: a relevant document has the higher margin in {accuracy:.1%} of comparisons within a query "
        f"(mean over {qrels['compared_queries']} queries), AUC over all {area:.3f}"
    )


def _quantile_table(margin: dict[str, Any]) -> list[str]:
    names = ["min", *(f"{q:.0%}" for q in QUANTILES[1:-1]), "max"]
    rows = ["  margin true - false" + "".join(f"{n:>9}" for n in ("pairs", "mean", "std", *names))]
    for kind in ("positives", "others"):
        part = margin[kind]
        if part["count"]:
            values = [part["mean"], part["std"], *part["quantiles"].values()]
            rows.append(f"    {kind:<15}  {part['count']:>9}" + "".join(f"{v:>9.2f}" for v in values))
    return rows


def _histogram(positives: np.ndarray, others: np.ndarray) -> list[str]:
    """Two columns of bars, each scaled to its own largest bin; outliers are in the first and the last bin."""
    edges = _edges(positives, others, _BINS)
    if edges is None:
        return []
    counts = [_counts(values, edges) for values in (positives, others)]
    lines = ["    margin      positives" + " " * (_WIDTH // 2 - 8) + "others"]
    for index in range(_BINS):
        bars = []
        for part in counts:
            length = round(part[index] / max(1, part.max()) * (_WIDTH // 2))
            bars.append("#" * max(length, int(part[index] > 0)))
        lines.append(f"    {edges[index]:>+8.2f}  |{bars[0]:<{_WIDTH // 2}} |{bars[1]}")
    return lines


def _edges(positives: np.ndarray, others: np.ndarray, bins: int) -> np.ndarray | None:
    """Bin edges over all but one in a thousand margins at either end."""
    margins = np.concatenate([positives, others]).astype(np.float64)
    if not len(margins):
        return None
    low, high = np.quantile(margins, [0.001, 0.999])
    if low == high:
        return None
    return np.linspace(low, high, bins + 1)


def _counts(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]


def check_image(path: PathType) -> None:
    """Raises InputError, before the work begins, where `plot` could not write `path`."""
    if _ending(path) not in _IMAGES:
        raise InputError(f"{os.fspath(path)}: expected a name that ends with {', '.join(_IMAGES)}.")
    _figure_class()


def _ending(path: PathType) -> str:
    return os.path.splitext(os.fspath(path))[1].lower()


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"plots need matplotlib, which cannot be imported ({error}). Run `pip install 'inranker_jax[label]'`."
        ) from error
    return Figure


def plot(verifications: Sequence[Verification], path: PathType) -> None:
    """Draws one histogram of margins for each of `verifications`, positives and others, into an image.

    Args:
      verifications: at least one.
      path: local or remote, ends with `.png`, `.pdf` or `.svg`; missing folders are made.

    Raises:
      InputError: another ending, or matplotlib is not installed.
    """
    check_image(path)
    columns = min(3, len(verifications))
    rows = -(-len(verifications) // columns)
    # A Figure without pyplot draws by Agg, needs no display and leaves no global state.
    figure = _figure_class()(figsize=(5 * columns, 3.4 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, verification in zip(panels, verifications, strict=False):
        edges = _edges(verification.positives, verification.others, _IMAGE_BINS)
        for kind, values in (("positives", verification.positives), ("others", verification.others)):
            if edges is not None and len(values):
                density = _counts(values, edges) / len(values) / np.diff(edges)
                panel.stairs(density, edges, fill=True, alpha=0.5, label=f"{kind} ({len(values)})")
        state = "" if not verification.errors else f": {len(verification.errors)} errors"
        panel.set_title(f"{verification.name}{state}", fontsize=10)
        panel.set_xlabel("teacher's margin, true - false logit")
        panel.set_ylabel("density")
        if edges is not None:
            panel.legend(fontsize=8)
    for panel in panels[len(verifications) :]:
        panel.set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format=_ending(path).removeprefix("."), dpi=120)
    paths.write(path, image.getvalue())
