"""How often a loop of a compiled program runs: what the compiler notes, else what its counter says."""

from __future__ import annotations

import dataclasses
import math
import re

from inranker_jax.aot.hlo import Computation, Instruction, Module

_SAME = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start", "optimization-barrier")
_KNOWN = re.compile(r'known_trip_count["\\]*:\s*\{["\\]*n["\\]*:["\\]*(\d+)')


@dataclasses.dataclass(frozen=True)
class _Value:
    """A whole number: entry `index` of a loop's state, if any, plus `offset`."""

    index: int | None
    offset: int


def trips(module: Module, loop: Instruction, home: Computation) -> int | None:
    """Executions of a `while`, or None where they depend on the program's input.

    A counter is recognised that starts at a constant, is compared with a constant, and changes by a constant: loops
    over layers, and those into which the TPU compiler cuts a product to run it beside its collective.

    Args:
      module: the program.
      loop: the instruction.
      home: the computation that holds it.

    Returns:
      The number, from 0.
    """
    noted = _KNOWN.search(loop.attributes)
    if noted:
        return int(noted[1])
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    compared = _comparison(module, module.computations[condition])
    if compared is None:
        return None
    direction, left, right = compared
    first, last = (_initial(module, value, loop, home) for value in (left, right))
    if left.index is None or first is None or last is None:
        return None
    after = _entry(module, _root(module.computations[body]), left.index, module.computations[body])
    if after is None or after.index != left.index or after.offset == 0:
        return None
    distance = {"LT": last - first, "LE": last + 1 - first, "GT": first - last, "GE": first + 1 - last}[
        direction
    ]
    step = after.offset if direction[0] == "L" else -after.offset
    return max(0, math.ceil(distance / step)) if step > 0 else None


def _root(computation: Computation) -> Instruction:
    return next(item for item in computation.values() if item.is_root)


def _comparison(module: Module, condition: Computation) -> tuple[str, _Value, _Value] | None:
    """Direction and sides of the comparison that keeps a loop running."""
    root, computation, given = _root(condition), condition, dict[int, _Value | None]()
    while root.opcode in ("fusion", "call"):
        (called,) = root.called("calls", "to_apply")
        given = {n: _value(module, name, computation, given) for n, name in enumerate(root.operands)}
        computation = module.computations[called]
        root = _root(computation)
    direction = re.search(r"direction=(\w+)", root.attributes)
    if root.opcode != "compare" or direction is None or direction[1] not in ("LT", "LE", "GT", "GE"):
        return None
    left, right = (_value(module, name, computation, given) for name in root.operands)
    return None if left is None or right is None else (direction[1], left, right)


def _initial(module: Module, value: _Value, loop: Instruction, home: Computation) -> int | None:
    """The number that a value is before the first trip."""
    if value.index is None:
        return value.offset
    start = _entry(module, home[loop.operands[0]], value.index, home)
    return None if start is None or start.index is not None else start.offset + value.offset


def _entry(module: Module, state: Instruction, index: int, home: Computation) -> _Value | None:
    """Entry `index` of a loop's state."""
    return _value(module, state.operands[index], home, {}) if state.opcode == "tuple" else None


def _value(
    module: Module, name: str, computation: Computation, given: dict[int, _Value | None]
) -> _Value | None:
    """What a scalar is, followed through copies, additions of constants and fusions."""
    item = computation.get(name)
    if item is None:
        return None
    if item.opcode == "constant":
        return _Value(None, int(item.argument)) if re.fullmatch(r"-?\d+", item.argument.strip()) else None
    if item.opcode == "parameter":
        return given.get(int(item.argument))
    if item.opcode in _SAME:
        return _value(module, item.operands[0], computation, given)
    if item.opcode == "get-tuple-element":
        source, index = computation.get(item.operands[0]), re.search(r"index=(\d+)", item.attributes)
        if source is None or index is None:
            return None
        if source.opcode == "tuple":
            return _value(module, source.operands[int(index[1])], computation, given)
        return _Value(int(index[1]), 0) if source.opcode == "parameter" else None
    if item.opcode in ("fusion", "call"):
        (called,) = item.called("calls", "to_apply")
        inner = module.computations[called]
        passed = {n: _value(module, operand, computation, given) for n, operand in enumerate(item.operands)}
        return _value(module, _root(inner).name, inner, passed)
    if item.opcode in ("add", "subtract"):
        left, right = (_value(module, operand, computation, given) for operand in item.operands)
        if left is None or right is None or (left.index is not None and right.index is not None):
            return None
        if item.opcode == "subtract":
            return None if right.index is not None else _Value(left.index, left.offset - right.offset)
        return _Value(right.index if left.index is None else left.index, left.offset + right.offset)
    return None
