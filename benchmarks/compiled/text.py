"""The text of a compiled program (HLO after all passes) as data: computations of operations, arrays with their layout.

%fused (p: f32[8,4]) -> f32[8] {                        a computation
  %p = f32[8,4]{1,0} parameter(0)                       an operation: name, result, opcode, operands, attributes
  ROOT %r = f32[8]{0} reduce(%p, %zero), dimensions={1}, to_apply=%add
}
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

NAME = r"%?([\w.\-]+)"
ARRAY = re.compile(r"\b(pred|[a-z]+\d\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
COMPUTATION = re.compile(rf"(ENTRY )?{NAME} \(.*\{{$")
OPERATION = re.compile(rf"\s+(ROOT )?{NAME} = ")
CALLED = re.compile(r"(calls|body|condition|to_apply|\w+_computations?)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)")
TRIPS = re.compile(r'known_trip_count[^\d}]*"(\d+)"')


class Array(NamedTuple):
    """One array: dtype, dimensions, their order in memory (the fastest first), its tile, and the memory it lies in."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def width(self) -> float:
        """Bytes of one number."""
        return 1.0 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0]) / 8

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def nbytes(self) -> float:
        """Bytes in memory, what fills up the last tile of each axis included."""
        dims = list(self.dims)
        for axis, step in zip(self.order, reversed(self.tile)):
            dims[axis] = -(-dims[axis] // step) * step
        return math.prod(dims) * self.width


def arrays(kind: str) -> tuple[Array, ...]:
    """The arrays of a type: one, or those of a tuple."""
    return tuple(_array(*found.groups()) for found in ARRAY.finditer(kind))


def _array(dtype: str, dims: str, layout: str | None) -> Array:
    shape = _integers(dims)
    order, _, details = (layout or "").partition(":")
    tile, space = re.search(r"T\(([\d,]*)\)", details), re.search(r"S\((\d+)\)", details)
    default = tuple(reversed(range(len(shape))))
    # A tile of more axes than the array has, as of a scalar, says nothing of its size here.
    steps = _integers(tile[1]) if tile and len(_integers(tile[1])) <= len(shape) else ()
    return Array(dtype, shape, _integers(order) or default, steps, int(space[1]) if space else 0)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


@dataclasses.dataclass(frozen=True)
class Operation:
    name: str
    result: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    inside: str  # what stands between the parentheses: a parameter's number, a constant's value
    attributes: str
    root: bool

    def called(self, *keys: str) -> Iterator[str]:
        """Names of the computations that it calls under these attributes."""
        for key, names in CALLED.findall(self.attributes):
            if key in keys:
                yield from re.findall(r"%([\w.\-]+)", names)

    @property
    def trips(self) -> int | None:
        """How often a loop runs, where XLA knows."""
        found = TRIPS.search(self.attributes)
        return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    operations: dict[str, Operation]

    @functools.cached_property
    def root(self) -> Operation:
        return next(op for op in self.operations.values() if op.root)

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Names of the parameters by their number."""
        return {int(op.inside): op.name for op in self.operations.values() if op.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Operation, int]]]:
        """For each value, who uses it and as which operand."""
        users: dict[str, list[tuple[Operation, int]]] = {name: [] for name in self.operations}
        for op in self.operations.values():
            for i, operand in enumerate(op.operands):
                users[operand].append((op, i))
        return users

    def operands(self, op: Operation) -> list[tuple[Array, ...]]:
        """Types of the operands."""
        return [self.operations[name].result for name in op.operands]


class Program(NamedTuple):
    entry: Computation
    computations: dict[str, Computation]


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    computations, entry, name = {}, "", ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        header = COMPUTATION.match(line)
        if header and not line.startswith("HloModule"):
            name = header[2]
            entry = name if header[1] else entry
            computations[name] = Computation(name, {})
        elif line.startswith("}"):
            name = ""
        elif name and (found := OPERATION.match(line)):
            op = _operation(found[2], line[found.end() :], root=bool(found[1]))
            computations[name].operations[op.name] = op
    return Program(computations[entry], computations)


def _operation(name: str, line: str, root: bool) -> Operation:
    """From `f32[8]{0} reduce(%p, %zero), dimensions={1}`."""
    end = _closing(line) if line.startswith("(") else line.index(" ")
    kind, rest = line[:end], line[end:].strip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 2
    inside, attributes = rest[:end], rest[end + 1 :]
    return Operation(name, arrays(kind), opcode, tuple(re.findall(r"%([\w.\-]+)", inside)), inside, attributes, root)


def _closing(text: str) -> int:
    """Where the parenthesis that `text` begins with is closed, the place behind it."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"a parenthesis is never closed: {text[:80]}")
