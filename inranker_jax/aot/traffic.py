"""Bytes that one instruction of a compiled program moves to and from the device's memory (HBM).

What a fusion slices out of an operand is read, not the operand; of an array that it updates in place, the update is
written. Loops over layers keep their parameters, activations and gradients stacked: whole arrays would count each layer
once per layer.
"""

from __future__ import annotations

import functools
import math

from inranker_jax.aot.hlo import Array, Computation, Instruction, Module

_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")
# Inside a fusion they are computed for those elements only that are asked for.
_ELEMENTWISE = ("convert", "copy", "transpose")


class Traffic:
    """Counts the traffic of the instructions of one module."""

    def __init__(self, module: Module) -> None:
        self._computations = module.computations

    def of(self, instruction: Instruction, computation: Computation) -> float:
        """Bytes that an instruction reads and writes when it runs once."""
        arrays = [computation[name].outputs if name in computation else () for name in instruction.operands]
        outputs, opcode = instruction.outputs, instruction.opcode
        read = sum(_hbm(array) for operand in arrays for array in operand)
        if opcode == "copy-start":  # its result is the copy, the source again, and a context
            return read + _hbm(outputs[0])
        if opcode == "slice-start":  # the source again, the slice, and a context
            source, part = outputs[0], outputs[1]
            return (part.bytes if source.space == 0 else 0.0) + _hbm(part)
        if opcode in _SLICES:
            return sum(min(_hbm(arrays[0][0]), array.bytes) + _hbm(array) for array in outputs)
        if opcode in _UPDATES:
            return 2.0 * sum(_hbm(array) for operand in arrays[1:] for array in operand)
        called = instruction.called("calls") if opcode == "fusion" else []
        if not called:
            return read + sum(_hbm(array) for array in outputs)
        return self._fusion(called[0], arrays, outputs)

    def _fusion(self, name: str, operands: list[tuple[Array, ...]], outputs: tuple[Array, ...]) -> float:
        total = 0.0
        for number, arrays in enumerate(operands):
            whole = sum(_hbm(array) for array in arrays)
            total += whole * self._read(name, number) if whole else 0.0
        written = self._written(name)
        if len(written) != len(outputs):
            return total + sum(_hbm(array) for array in outputs)
        return total + sum(size for size, array in zip(written, outputs, strict=True) if array.space == 0)

    @functools.cache  # noqa: B019 - it lives as long as one count
    def _read(self, name: str, number: int) -> float:
        """Share of its parameter `number` that a computation reads, at most all of it."""
        for instruction in self._computations[name].values():
            if instruction.opcode == "parameter" and instruction.argument == str(number):
                return min(1.0, self._used(name, instruction))
        return 0.0

    @functools.cache  # noqa: B019
    def _users(self, name: str) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self._computations[name].values():
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    def _used(self, name: str, value: Instruction) -> float:
        """Share of a value that its users read, each by itself."""
        if value.is_root:
            return 1.0
        total = 0.0
        for user in self._users(name).get(value.name, []):
            only_first = user.operands[0] == value.name and value.name not in user.operands[1:]
            if user.opcode in _ELEMENTWISE or _is_alias(user):
                total += self._used(name, user)
            elif user.opcode in _SLICES and only_first:
                total += _elements(user.outputs) / max(1, _elements(value.outputs))
            elif user.opcode in _UPDATES and only_first and self._is_result(name, user):
                continue  # what is not updated stays where it is
            elif user.opcode == "fusion" and user.called("calls"):
                inner = user.called("calls")[0]
                places = [place for place, operand in enumerate(user.operands) if operand == value.name]
                total += sum(self._read(inner, place) for place in places)
            else:
                return 1.0
        return total

    def _is_result(self, name: str, instruction: Instruction) -> bool:
        """Whether nothing but the computation's result uses an instruction."""
        users = self._users(name).get(instruction.name, [])
        return all(
            (user.opcode == "tuple" and user.is_root) or (_is_alias(user) and self._is_result(name, user))
            for user in users
        )

    @functools.cache  # noqa: B019
    def _written(self, name: str) -> tuple[float, ...]:
        """Bytes that a computation writes of each of its results."""
        computation = self._computations[name]
        root = next(instruction for instruction in computation.values() if instruction.is_root)
        parts = [computation[operand] for operand in root.operands] if root.opcode == "tuple" else [root]
        return tuple(size for part in parts for size in self._part(part, computation))

    def _part(self, part: Instruction, computation: Computation) -> tuple[float, ...]:
        whole = tuple(array.bytes for array in part.outputs)
        if _is_alias(part):
            return self._part(computation[part.operands[0]], computation)
        if part.opcode in _UPDATES and self._is_parameter(part.operands[0], computation):
            update = part.operands[1] if part.opcode == "dynamic-update-slice" else part.operands[-1]
            return (min(whole[0], computation[update].outputs[0].bytes),)
        if part.opcode == "fusion" and part.called("calls"):
            inner = self._written(part.called("calls")[0])
            return inner if len(inner) == len(whole) else whole
        return whole

    def _is_parameter(self, name: str, computation: Computation) -> bool:
        """Whether a value is a parameter, whose memory the result takes."""
        found = computation[name]
        if _is_alias(found):
            return self._is_parameter(found.operands[0], computation)
        return found.opcode == "parameter"


def _is_alias(instruction: Instruction) -> bool:
    """Whether it gives its operand another shape or tiling in place."""
    if instruction.opcode in ("bitcast", "reshape"):
        return True
    return (
        instruction.opcode == "fusion"
        and "output_to_operand_aliasing={{}: (0, {})}" in instruction.attributes
    )


def _elements(arrays: tuple[Array, ...]) -> int:
    return sum(math.prod(array.dims) for array in arrays)


def _hbm(array: Array) -> float:
    return array.bytes if array.space == 0 else 0.0
