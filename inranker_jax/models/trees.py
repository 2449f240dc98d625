"""Nested dictionaries of arrays as flat `a/b/c` paths, and the message for two trees that differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": x}}` -> `{"a/b": x}`; anything but a mapping is a leaf."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else str(name)
        if isinstance(value, Mapping):
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a/b": x}` -> `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def mismatch(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """Compares two flat trees of shapes.

    Args:
      expected: path -> shape that the reader needs.
      found: path -> shape that is there.

    Returns:
      An empty string where they agree. Otherwise every line of both trees in order: `-` is expected and not
      found, `+` is found and not expected, and unmarked lines are in both; long unmarked stretches are cut.
    """
    if dict(expected) == dict(found):
        return ""
    lines: list[str] = []
    agreeing: list[str] = []

    def flush() -> None:
        shown = (
            agreeing
            if len(agreeing) <= 4
            else [agreeing[0], f"  ... {len(agreeing) - 2} equal ...", agreeing[-1]]
        )
        lines.extend(shown)
        agreeing.clear()

    for path in sorted({*expected, *found}):
        if path in expected and path in found and tuple(expected[path]) == tuple(found[path]):
            agreeing.append(f"  {path} {tuple(expected[path])}")
            continue
        flush()
        if path in expected:
            lines.append(f"- {path} {tuple(expected[path])}")
        if path in found:
            lines.append(f"+ {path} {tuple(found[path])}")
    flush()
    return "\n".join(lines)
