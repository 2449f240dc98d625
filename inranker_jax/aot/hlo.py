"""Reads the text of a compiled program (HLO): instructions, their shapes, and which computation calls which."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]\w*?)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*->.*\{\s*$")
_LINE = re.compile(r"^\s*(ROOT\s+)?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_SPACE = re.compile(r"S\((\d+)\)")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Array:
    """Shape of one array.

    Attributes:
      dtype: HLO's name, such as "bf16".
      dims: its sizes.
      space: memory space; 0 is the device's main memory (HBM), others lie on the chip.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> float:
        """Size without the padding of tiled layouts."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            digits = re.search(r"\d+", self.dtype)
            bits = int(digits[0]) if digits else 0
        return math.prod(self.dims) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in its computation.
      opcode: such as "fusion".
      outputs: arrays of its result, several for a tuple.
      operands: names of instructions.
      attributes: what follows the operands, as text.
      argument: of parameters their number, else the text in the parentheses.
      is_root: whether it is the computation's result.
    """

    name: str
    opcode: str
    outputs: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    argument: str
    is_root: bool

    @property
    def cycles(self) -> float:
        """Cycles that the TPU compiler's own cost model gives it; 0 where it says nothing, as for transfers."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return float(found[1]) if found else 0.0

    def called(self, *keys: str) -> list[str]:
        """Names of the computations that the attributes `keys` call."""
        names: list[str] = []
        for key in keys:
            found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            if found:
                names += [name.strip().lstrip("%") for name in found[1].strip("{}").split(",")]
        return names


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: instructions by name, in the order in which they run, of each computation.
      entry: name of the one that runs first.
    """

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Parses the text of a module, as `Compiled.as_text()` gives it.

    Raises:
      ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = ""
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header and not line.startswith("HloModule"):
                current = computations[header[2]] = {}
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            instruction = _instruction(line)
            if instruction is not None:
                current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text of the compiled program has no ENTRY computation")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    match = _LINE.match(line)
    if match is None:
        return None
    rest = _COMMENT.sub("", line[match.end() :]) if "/*" in line else line[match.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    argument = rest[opening + 1 : closing]
    return Instruction(
        name=match[2],
        opcode=rest[:opening].strip(),
        outputs=arrays(shape),
        operands=tuple(_NAME.findall(argument)),
        attributes=rest[closing + 1 :],
        argument=argument,
        is_root=bool(match[1]),
    )


def _closing(text: str, opening: int) -> int:
    """Position of the parenthesis that closes the one at `opening`; quoted text does not count."""
    depth, quoted = 0, False
    for place in range(opening, len(text)):
        character = text[place]
        if character == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif character == "(":
            depth += 1
        elif character == ")":
            depth -= 1
            if depth == 0:
                return place
    raise ValueError(f"unbalanced parentheses in {text[:200]!r}")


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape's text.

    >>> arrays("(f32[4,8]{1,0:T(8,128)S(1)}, s32[])")
    (Array(dtype='f32', dims=(4, 8), space=1), Array(dtype='s32', dims=(), space=0))
    """
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = _SPACE.search(layout)
        sizes = tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size)
        found.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def product_flops(instruction: Instruction, computation: Computation) -> float:
    """Operations of a `dot` or `convolution`, into which the TPU compiler turns products; 0 for anything else.

    A convolution's are counted as XLA's own cost analysis does: positions of the window where it meets an element that
    is not padding, since products with batch axes become windows with dilation.
    """
    if instruction.opcode == "dot":
        first = computation[instruction.operands[0]].outputs[0]
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        summed = [first.dims[int(axis)] for axis in axes[1].split(",") if axis] if axes else []
        return 2.0 * math.prod(instruction.outputs[0].dims) * math.prod(summed)
    if instruction.opcode != "convolution":
        return 0.0
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"convolution {instruction.name} without dim_labels")
    left, right = (computation[name].outputs[0].dims for name in instruction.operands[:2])
    output = instruction.outputs[0].dims
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    batch = output[labels[3].index("b")] if groups is None else left[labels[1].index("b")] // int(groups[1])
    total = 2.0 * batch * output[labels[3].index("f")] * right[labels[2].index("i")]
    windows = _windows(instruction.attributes, len(output) - 2)
    for axis, window in enumerate(windows):
        sizes = (left[labels[1].index(str(axis))], output[labels[3].index(str(axis))])
        total *= _meetings(*sizes, window)
    return total


@dataclasses.dataclass(frozen=True)
class _Window:
    size: int = 1
    stride: int = 1
    low: int = 0
    lhs_dilate: int = 1
    rhs_dilate: int = 1


def _windows(attributes: str, rank: int) -> list[_Window]:
    text = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in text[1].split()) if text else {}
    columns: dict[str, list[int]] = {}
    for name in ("size", "stride", "lhs_dilate", "rhs_dilate"):
        if name in fields:
            columns[name] = [int(value) for value in fields[name].split("x")]
    if "pad" in fields:
        columns["low"] = [int(value.split("_")[0]) for value in fields["pad"].split("x")]
    return [_Window(**{name: values[axis] for name, values in columns.items()}) for axis in range(rank)]


def _meetings(inputs: int, outputs: int, window: _Window) -> int:
    """Pairs of output and window position that fall on an element of the input."""
    starts = np.arange(outputs)[:, None] * window.stride - window.low
    places = starts + np.arange(window.size)[None, :] * window.rhs_dilate
    inside = (places >= 0) & (places <= (inputs - 1) * window.lhs_dilate)
    return int(np.sum(inside & (places % window.lhs_dilate == 0)))


def group_of(attributes: str, devices: int) -> tuple[int, ...]:
    """The first group of partitions of a collective; all `devices` where nothing is said.

    HLO writes groups as lists `{{0,1},{2,3}}`, as a reshaped range `[2,2]<=[4]T(1,0)`, or as axes of a mesh
    `mesh['a'=2,'b'=4] {'b'}`.

    >>> group_of("replica_groups={{0,2},{1,3}}", 4), group_of("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    ((0, 2), (0, 2))
    >>> group_of("replica_groups=mesh['a'=2,'b'=4] {'b'}", 8)
    (0, 1, 2, 3)
    """
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return tuple(map(int, listed[1].split(",")))
    ranged = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if ranged:
        shape, source = (tuple(map(int, ranged[part].split(","))) for part in (1, 2))
        numbers = np.arange(math.prod(source)).reshape(source)
        if ranged[3]:
            numbers = numbers.transpose([int(axis) for axis in ranged[3].split(",")])
        return tuple(numbers.reshape(shape).reshape(shape[0], -1)[0].tolist())
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\(([^{]*)\))?\s*\{([^}]*)\}", attributes
    )
    if mesh:
        places = _mesh_group(mesh[1], mesh[3])
        order = _device_order(mesh[2])
        return places if order is None else tuple(sorted(order[place] for place in places))
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return (int(pairs[1]), int(pairs[2]))
    return tuple(range(devices))


def _device_order(text: str | None) -> list[int] | None:
    """Partitions in the order of a mesh: a reshaped range `[2,4]T(1,0)`, or a list; None where they ascend."""
    if not text:
        return None
    ranged = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if ranged is None:
        return [int(number) for number in text.split(",")]
    shape = tuple(map(int, ranged[1].split(",")))
    axes = tuple(map(int, ranged[2].split(","))) if ranged[2] else range(len(shape))
    return [int(number) for number in np.arange(math.prod(shape)).reshape(shape).transpose(axes).ravel()]


def _mesh_group(axes: str, chosen: str) -> tuple[int, ...]:
    """Partitions that differ only in the chosen axes, or in parts of axes, written `'a':(2)4`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    offsets = np.zeros(1, np.int64)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        inner = math.prod(size for other, size in _after(sizes, name))
        size = int(part) if part else sizes[name]
        step = inner * (sizes[name] // (int(before) * size) if part else 1)
        offsets = (offsets[:, None] + np.arange(size)[None, :] * step).reshape(-1)
    return tuple(sorted(offsets.tolist()))


def _after(sizes: dict[str, int], name: str) -> Iterator[tuple[str, int]]:
    names = list(sizes)
    for other in names[names.index(name) + 1 :]:
        yield other, sizes[other]
