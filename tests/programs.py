"""What a compiled program does: its matrix products and what its devices tell each other, loops counted.

Read from the text of the compiled module, which is that of one device; a loop's body counts as often as it runs, where
XLA knows, and once where it does not.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

SHAPE = re.compile(r"(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
NAME = r"%[\w.\-]+"
RESULT = re.compile(rf"\s*(?:ROOT )?({NAME}) = (\(.*?\)|\S+) ([\w\-]+)\(")
CALLED = re.compile(rf"(?:body|condition|calls|to_apply|\w+_computations)=\{{?({NAME}(?:, {NAME})*)")
TRIPS = re.compile(r"known_trip_count[^\d]*(\d+)")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Operation(NamedTuple):
    """One operation: its name, how often it runs, whether in a loop, shapes of result and operands, its line."""

    name: str
    times: int
    in_loop: bool
    result: str
    operands: list[str]
    line: str

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        bits = lambda kind: 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
        return sum(math.prod(_dims(shape)) * bits(kind) // 8 for kind, shape in SHAPE.findall(self.result))

    @property
    def devices(self) -> int:
        """How many devices a collective joins; 0 for all of them. XLA has three ways to write that."""
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", self.line):
            return len(listed[1].split(","))
        if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", self.line):
            return int(counted[1])
        if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", self.line):
            sizes = dict(axis.split("=") for axis in named[1].split(","))
            return math.prod(int(sizes[axis.strip()]) for axis in named[2].split(","))
        return 0

    @property
    def multiplications(self) -> int:
        """Of a matrix product."""
        result, left = (_dims(SHAPE.search(shape)[2]) for shape in (self.result, self.operands[0]))
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", self.line)[1]
        return math.prod(result) * math.prod(left[i] for i in _dims(contracted))


def operations(text: str) -> Iterator[Operation]:
    """All operations of a compiled module."""
    bodies, name, entry = {}, None, None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        header = re.match(rf"(ENTRY )?({NAME}) .*\{{$", line)
        if header:
            name = header[2]
            entry = name if header[1] else entry
            bodies[name] = []
        elif name and (found := RESULT.match(line)):
            bodies[name].append((*found.groups(), line))
    shapes = {name: shape for body in bodies.values() for name, shape, *_ in body}

    def walk(name: str, times: int, in_loop: bool) -> Iterator[Operation]:
        for _, result, operation, line in bodies[name]:
            arguments = line.split(f" {operation}(", 1)[1].split(")")[0]
            operands = [shapes.get(operand, "") for operand in re.findall(NAME, arguments)]
            yield Operation(operation, times, in_loop, result, operands, line)
            is_loop = operation == "while"
            trips = TRIPS.search(line) if is_loop else None
            for called in ", ".join(CALLED.findall(line)).split(", "):
                if called in bodies:
                    yield from walk(called, times * (int(trips[1]) if trips else 1), in_loop or is_loop)

    return walk(entry, 1, False)


def multiplications(text: str) -> int:
    """Of all matrix products."""
    return sum(op.times * op.multiplications for op in operations(text) if op.name == "dot")


def collectives(text: str) -> list[Operation]:
    """What devices tell each other, and not only themselves."""
    found = [op for op in operations(text) if op.name.removesuffix("-start") in COLLECTIVES]
    return [op for op in found if op.devices != 1]


def _dims(shape: str) -> list[int]:
    return [int(n) for n in shape.split(",") if n]
